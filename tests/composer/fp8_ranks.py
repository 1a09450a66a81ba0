"""A model with 8-bit projections on two ranks against one: run by `test_fp8.py` as ``rank store result cases``."""

import json
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state
from two_ranks import RANKS, losses_and_gradients

from composer_megatron import cpu


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the whole, as a norm relative to it."""
    squares = torch.stack([(found - wanted).double().square().sum(), wanted.double().square().sum()])
    torch.distributed.all_reduce(squares)
    return float((squares[0] / squares[1]).sqrt())


def differences(rank: int, case: dict) -> dict[str, float]:
    """In losses, and the worst in a gradient."""
    wanted_losses, wanted, _ = losses_and_gradients({}, case, torch.float32)
    losses, found, model = losses_and_gradients({"tensor_model_parallel_size": RANKS}, case, torch.float32)
    worst = 0.0
    for name, weight in model.named_parameters():
        whole, gradient = wanted[name], found[name]
        if getattr(weight, "sequence_parallel", False):
            torch.distributed.all_reduce(gradient)
        if getattr(weight, "tensor_model_parallel", False):
            pieces = whole.split(weight.shape[weight.partition_dim] // weight.partition_stride, weight.partition_dim)
            whole = torch.cat(pieces[rank::RANKS], weight.partition_dim)
        worst = max(worst, difference(gradient, whole))
    return {"loss": difference(losses, wanted_losses), "gradient": worst}


def main() -> None:
    rank, store, result = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    cpu.prepare_training()
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=RANKS, store=torch.distributed.FileStore(store, RANKS)
    )
    parallel_state.initialize_model_parallel()
    found = {name: differences(rank, case) for name, case in json.loads(sys.argv[4]).items()}
    if rank == 0:
        result.write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
