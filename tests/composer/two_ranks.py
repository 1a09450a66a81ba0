"""What two processes compute, compared with one: run by `test_two_ranks.py` as ``rank store result``.

Each process computes the whole by itself as well, and the first one writes the largest relative differences.
"""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import random
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.backend import get_backend
from composer_megatron.model import CompositeModel, initialize_weights, transformer_config
from composer_megatron.pattern import hybrid_pattern
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_megatron.specs import stack_spec

RANKS = 2
LENGTHS = (4, 12, 8)
SHAPE = dataclasses.replace(PRESETS["tiny"], num_query_groups=2)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the largest value, over all ranks."""
    worst = (found - wanted).abs().max() / wanted.abs().max()
    torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
    return float(worst)


def own(tensor: torch.Tensor, rank: int, lengths: tuple[int, ...]) -> torch.Tensor:
    """The tokens that Megatron gives a rank, of each sequence its chunks `rank` and last but `rank`; tokens first."""
    chunks = (sequence.chunk(2 * RANKS) for sequence in tensor.split(lengths))
    return torch.cat([chunk for sequence in chunks for chunk in (sequence[rank], sequence[-1 - rank])])


def attention_differences(rank: int, backend: str, packed: bool, window: int | None) -> dict[str, float]:
    """Context-parallel attention against attention to the whole: output and gradients."""
    torch.manual_seed(0)
    length = sum(LENGTHS)
    lengths = LENGTHS if packed else (length,)
    batch = () if packed else (3,)
    whole = [torch.randn(length, *batch, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2)]
    gradient = torch.randn(length, *batch, 48, dtype=torch.float64)
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )

    def run(size: int, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=48,
            num_attention_heads=6,
            attention_dropout=0.0,
            context_parallel_size=size,
            window_size=None if window is None else (window, 0),
        )
        layer = get_backend(backend).attention.use(
            config=config,
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            cp_comm_type="p2p",
            pg_collection=SimpleNamespace(cp=torch.distributed.group.WORLD),
        )
        output = layer(*tensors, None, packed_seq_params=params if packed else None)
        output.backward(grad)
        return [output, *(tensor.grad for tensor in tensors)]

    mine = [own(tensor.detach(), rank, lengths).requires_grad_() for tensor in whole]
    found = run(RANKS, mine, own(gradient, rank, lengths))
    wanted = [own(tensor, rank, lengths) for tensor in run(1, whole, gradient)]
    names = ("output", "query", "key", "value")
    return {name: difference(*pair) for name, *pair in zip(names, found, wanted, strict=True)}


def losses_and_gradients(
    layout: dict[str, int], case: dict, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, dict[str, torch.Tensor], CompositeModel]:
    """A model's losses (b, s) and gradients under a layout; tokens are the rank's own under context parallelism."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**layout)
    random.model_parallel_cuda_manual_seed(1)
    backend = get_backend(case["backend"], case.get("parts", {}))
    architecture = Architecture(
        CompositeSequence.parse("2A3M1A"), dataclasses.replace(SHAPE, tied_embeddings=case["tied"])
    )
    tensor_ranks, context_ranks = layout.get("tensor_model_parallel_size", 1), layout.get("context_parallel_size", 1)
    config = transformer_config(
        architecture,
        dtype=dtype,
        backend=backend,
        on_cpu=True,
        sequence_parallel=bool(case.get("sequence_parallel")) and tensor_ranks > 1,
    )
    model = CompositeModel(
        loss=backend.loss.use,
        config=config,
        hybrid_stack_spec=stack_spec(backend),
        vocab_size=SHAPE.vocab_size,
        max_sequence_length=32,
        hybrid_layer_pattern=hybrid_pattern(architecture.sequence),
        share_embeddings_and_output_weights=case["tied"],
        position_embedding_type="rope",
    )
    initialize_weights(model, 7)
    tokens = torch.randint(0, SHAPE.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    if context_ranks > 1:
        tokens, labels = (own(ids.t(), torch.distributed.get_rank(), (16,)).t() for ids in (tokens, labels))
    losses = model(tokens.contiguous(), torch.zeros_like(tokens), None, labels=labels.contiguous())
    losses.double().sum().backward()
    return losses.detach(), {name: weight.grad for name, weight in model.named_parameters()}, model


def model_differences(rank: int, case: dict) -> dict[str, float]:
    """A model on two ranks against one rank on backend local: losses, and the worst gradient."""
    wanted_losses, wanted, _ = losses_and_gradients({}, case | {"backend": "local", "parts": {}})
    losses, found, model = losses_and_gradients(case["layout"], case)
    context = "context_parallel_size" in case["layout"]
    worst = 0.0
    for name, weight in model.named_parameters():
        whole, gradient = wanted[name], found[name]
        if context or getattr(weight, "sequence_parallel", False):
            torch.distributed.all_reduce(gradient)
        if getattr(weight, "tensor_model_parallel", False) and not context:
            pieces = whole.split(weight.shape[weight.partition_dim] // weight.partition_stride, weight.partition_dim)
            whole = torch.cat(pieces[rank::RANKS], weight.partition_dim)
        worst = max(worst, difference(gradient, whole))
    if context:
        wanted_losses = own(wanted_losses.t(), rank, (16,)).t()
    return {"loss": difference(losses.double(), wanted_losses.double()), "gradient": worst}


def main() -> None:
    rank, store, result = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    cases = json.loads(sys.argv[4])
    torch.set_num_threads(1)
    cpu.prepare_training()
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=RANKS, store=torch.distributed.FileStore(store, RANKS)
    )
    parallel_state.initialize_model_parallel()
    kinds = {"attention": attention_differences, "model": lambda rank, **case: model_differences(rank, case)}
    found = {name: kinds[case.pop("kind")](rank, **case) for name, case in cases.items()}
    if rank == 0:
        result.write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
