"""Short training runs in one process group, each in a parallel layout of its own; started by torchrun.

The argument is a JSON list of jobs, the fields of `Job`; the losses and gradient norms of each step go to
``<out>/<name>.json``.
"""

import json
import logging
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from composer_megatron import cpu

cpu.skip_compilation()

import torch  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

from composer_megatron.architecture import Architecture  # noqa: E402
from composer_megatron.model import build_model  # noqa: E402
from composer_megatron.optimizer import using_optimizer  # noqa: E402
from composer_megatron.sequence import CompositeSequence  # noqa: E402
from composer_megatron.shape import Shape  # noqa: E402

SHAPE = Shape(
    name="test",
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=4,
    vocab_size=50,
    tied_embeddings=True,
    baseline_pairs=2,
    rope_theta=1000,
    norm_epsilon=1e-5,
    init_std=0.2,
)
PATTERNS = {1: "*-*--", 2: "*-|*--"}
SEQUENCES, LENGTH = 4, 12


@dataclass(frozen=True)
class Job:
    """Steps `first` to `last` with that Adam (Megatron's as it is without one), from and to a checkpoint, if given."""

    name: str
    adam: str
    first: int = 1
    last: int = 6
    tensor: int = 1
    pipeline: int = 1
    distributed: bool = True
    bf16: bool = False
    load: str = ""
    save: str = ""


def run(job: Job, out: Path) -> None:
    """Train, and write down what came of it."""
    parallel_state.initialize_model_parallel(job.tensor, job.pipeline)
    model_parallel_cuda_manual_seed(1)
    with using_optimizer(job.adam) if job.adam else nullcontext():
        model, optimizer = build(job)
        if job.load:
            load(job, model, optimizer, out / job.load)
        steps = [train_step(model, optimizer, number) for number in range(job.first, job.last + 1)]
        if job.save:
            save(job, model, optimizer, out / job.save)
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_data_parallel_rank() == 0:
        (out / f"{job.name}.json").write_text(json.dumps(steps))
    parallel_state.destroy_model_parallel()


def build(job: Job):
    """The model in Megatron's data parallelism, and its optimizer: two groups, with and without weight decay."""
    model = build_model(
        Architecture(CompositeSequence.parse("1A1M1A2M"), SHAPE),
        max_sequence_length=LENGTH,
        dtype=torch.bfloat16 if job.bf16 else torch.float32,
        pattern=PATTERNS[job.pipeline],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        backend="local",
    )
    model.config.bf16 = job.bf16
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=job.distributed, grad_reduce_in_fp32=True, overlap_grad_reduce=True, bucket_size=2000
    )
    model = DistributedDataParallel(model.config, settings, model)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.no_sync_func = model.no_sync
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.01,
        adam_eps=1e-6,
        weight_decay=0.1,
        clip_grad=0.5,
        bf16=job.bf16,
        params_dtype=torch.bfloat16 if job.bf16 else torch.float32,
        use_distributed_optimizer=job.distributed,
    )
    return model, get_megatron_optimizer(config, [model])


def train_step(model, optimizer, number: int) -> tuple[float, float]:
    """One step on the data of that number: the loss, averaged over the data-parallel ranks, and the gradient norm."""
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(SHAPE.vocab_size, (SEQUENCES, LENGTH + 1), generator=generator).chunk(ranks)[rank]

    def forward(batches, model):
        batch = next(batches)
        losses = model(batch[:, :-1], torch.arange(LENGTH).expand(1, -1), None, labels=batch[:, 1:])
        return losses, lambda losses: (losses.float().mean(), {"loss": losses.detach().float().mean()})

    model.zero_grad_buffer()
    optimizer.zero_grad()
    outputs = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(tokens.split(1)),
        model=model,
        num_microbatches=len(tokens),
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )
    done, norm, _ = optimizer.step()
    assert done
    loss = torch.stack([output["loss"] for output in outputs]).mean() if outputs else torch.zeros(())
    torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    return loss.item() / ranks, float(norm)


def states(job: Job, model, optimizer, **loading):
    """Model and optimizer, sharded as `megatron.training` does it under `composer_megatron.optimizer`'s flag."""
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if job.distributed:
        metadata |= {"distrib_optim_sharding_type": "fully_reshardable"}
    weights = model.module.sharded_state_dict(metadata=metadata)
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, metadata=metadata, **loading)}


def save(job: Job, model, optimizer, folder: Path) -> None:
    """Save both."""
    folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(states(job, model, optimizer), str(folder))


def load(job: Job, model, optimizer, folder: Path) -> None:
    """Load both."""
    loaded = dist_checkpointing.load(states(job, model, optimizer, is_loading=True), str(folder))
    model.module.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    cpu.prepare_training()
    torch.distributed.init_process_group("gloo")
    for fields in json.loads(sys.argv[2]):
        run(Job(**fields), Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
