"""One process of a comparison of layouts: build the rank's stages, run Megatron's schedule, gather, compare, save.

`compare_layouts` starts as many of these as a layout has ranks.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from layout_cases import SHAPE, Case, Layout, Result
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from composer_megatron import cpu
from composer_megatron.backend import get_backend
from composer_megatron.files import append_json_line
from composer_megatron.model import CompositeModel, initialize_weights, transformer_config
from composer_megatron.pattern import hybrid_pattern
from composer_megatron.specs import stack_spec

SEQUENCE_LENGTH, MICRO_BATCHES, MICRO_BATCH_SIZE = 16, 4, 2
TIMEOUT = timedelta(seconds=120)


def run_cases(rank: int, world_size: int, cases: Sequence[Case], folder: str) -> None:
    """One process for all cases of a world size; the first one writes the results."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    cpu.prepare_training()
    if cpu.has_gpu():
        torch.cuda.set_device(rank)
    for name in dict.fromkeys(case.layout for case in cases):
        with process_groups(Layout.parse(name), rank, Path(folder) / f"store-{name}"):
            for case in (case for case in cases if case.layout == name):
                result = _reference(case, Path(folder)) if case == case.reference else _measure(case, Path(folder))
                if rank == 0:
                    append_json_line(Path(folder) / "results.jsonl", asdict(result))


@contextlib.contextmanager
def process_groups(layout: Layout, rank: int, store: Path) -> Iterator[None]:
    """All of Megatron's process groups for a layout, and seeds for its generators; `store` is a file to make."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cpu.has_gpu() else "gloo",
        store=dist.FileStore(str(store), layout.world_size),
        rank=rank,
        world_size=layout.world_size,
        timeout=TIMEOUT,
    )
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build_stages(case: Case, seed: int) -> list[CompositeModel]:
    """The stages of this rank, one for each virtual stage, with weights drawn from `seed`."""
    layout, architecture, backend = Layout.parse(case.layout), case.architecture, get_backend(case.backend)
    virtual = layout.vpp if layout.vpp > 1 else None
    config = transformer_config(
        architecture,
        dtype=getattr(torch, case.dtype),
        backend=backend,
        on_cpu=not cpu.has_gpu(),
        sequence_parallel=layout.sequence_parallel,
        virtual_pipeline_model_parallel_size=virtual,
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        deallocate_pipeline_outputs=True,  # as Megatron's training always does; see `CompositeStack` on empty stages
        finalize_model_grads_func=finalize_model_grads,
    )
    destroy_moe_metrics_tracker()  # it is as long as the first model of a process is deep
    stages = []
    for number in range(layout.vpp):
        place = {"ignore_virtual": False, "vp_stage": number if virtual else None}
        stage = CompositeModel(
            loss=backend.loss.use,
            config=config,
            hybrid_stack_spec=stack_spec(backend),
            vocab_size=SHAPE.vocab_size,
            max_sequence_length=SEQUENCE_LENGTH,
            hybrid_layer_pattern=hybrid_pattern(architecture.sequence, layout.stages(len(architecture.sequence))),
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            share_embeddings_and_output_weights=case.tied,
            position_embedding_type="rope",
            vp_stage=place["vp_stage"],
        )
        initialize_weights(stage, seed)
        stages.append(stage.to(device()))
    return stages


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", torch.cuda.current_device()) if cpu.has_gpu() else torch.device("cpu")


def micro_batches() -> list[dict[str, Tensor]]:
    """The sequences that every layout sees, and their next tokens."""
    generator = torch.Generator().manual_seed(0)
    size = (MICRO_BATCHES, MICRO_BATCH_SIZE, SEQUENCE_LENGTH + 1)
    tokens = torch.randint(SHAPE.vocab_size, size, generator=generator).to(device())
    return [{"tokens": part[:, :-1], "labels": part[:, 1:]} for part in tokens]


def losses_of(stage: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What a stage makes of a micro-batch: hidden states, or on the last stage the loss of each token."""
    tokens = batch["tokens"].contiguous()
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return stage(tokens, places, None, labels=batch["labels"].contiguous())


def _reference(case: Case, folder: Path) -> Result:
    """One process: save weights as a checkpoint, and what they should give."""
    (model,) = build_stages(case, seed=1)
    _save([model], folder / case.reference_name)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1 / MICRO_BATCHES))  # as Megatron's schedules do
    losses = [losses_of(model, batch).mean() for batch in micro_batches()]
    torch.stack(losses).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.save(
        {"losses": [loss.item() for loss in losses], "gradients": gradients, "weights": weights},
        folder / f"{case.reference_name}.pt",
    )
    return Result(case)


def _measure(case: Case, folder: Path) -> Result:
    """A layout, on all of its ranks; the first one compares."""
    stages = build_stages(case, seed=2)
    _load(stages, folder / case.reference_name)
    losses, gradients = _run_schedule(Layout.parse(case.layout), stages)
    saved = folder / f"{case.reference_name}-{case.layout}"
    _save(stages, saved)
    result = Result(case)
    if dist.get_rank() == 0:
        wanted = torch.load(folder / f"{case.reference_name}.pt", map_location="cpu")
        differences = _differences(gradients, wanted["gradients"])
        tensor = max(differences, key=lambda name: differences[name])
        loss = max(abs(found / value - 1) for found, value in zip(losses, wanted["losses"], strict=True))
        same = _is_saved(wanted["weights"], saved)
        result = Result(case, differences[tensor], tensor, loss, same)
    dist.barrier()
    return result


def _run_schedule(layout: Layout, stages: list[CompositeModel]) -> tuple[list[float], list[Piece]]:
    """Forward and backward over all micro-batches by Megatron's schedule; both results on the first rank alone."""
    config = DistributedDataParallelConfig(use_distributed_optimizer=layout.distributed_optimizer)
    wrapped = [
        DistributedDataParallel(stage.config, config, stage, disable_bucketing=number > 0)
        for number, stage in enumerate(stages)
    ]
    for stage in wrapped:
        stage.zero_grad_buffer()
    replica = parallel_state.get_data_parallel_rank()
    mine = list(enumerate(micro_batches()))[replica :: layout.dp]
    batches = [iter(mine) for _ in wrapped]
    found = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=batches if layout.vpp > 1 else batches[0],
        model=wrapped if layout.vpp > 1 else wrapped[0],
        num_microbatches=len(mine),
        seq_length=SEQUENCE_LENGTH,
        micro_batch_size=MICRO_BATCH_SIZE,
        forward_only=False,
    )
    if layout.distributed_optimizer:
        _gather_shards(wrapped)
    counted = parallel_state.get_tensor_model_parallel_rank() == 0  # those ranks have the same losses
    losses = _gather([entry for entry in found if counted])
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for entry in losses:  # of one micro-batch there are several under context parallelism
        sums[entry["micro_batch"]] = [a + b for a, b in zip(sums[entry["micro_batch"]], entry["loss"], strict=True)]
    return [sums[index][0] / sums[index][1] for index in sorted(sums)], _gather(_pieces(stages))


def _forward_step(batches: Iterator[tuple[int, dict[str, Tensor]]], stage: torch.nn.Module) -> Any:
    index, batch = next(batches)
    if parallel_state.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(
            dict(batch), is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
        )

    def loss(output: Tensor) -> Any:
        tokens = torch.tensor(output.numel(), device=output.device)
        total = output.sum()
        return total, tokens, {"micro_batch": index, "loss": [total.item(), tokens.item()]}

    return losses_of(stage, batch), loss


def _gather_shards(stages: Sequence[DistributedDataParallel]) -> None:
    """Make every rank's gradients whole: with the distributed optimizer each has the sum for its own shard alone."""
    for stage in stages:
        for buffer in stage.buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = shard_buffer(bucket.grad_data, group.size())[group.rank()].clone()
                bucket.grad_data.fill_(float("nan"))
                dist.all_gather_into_tensor(bucket.grad_data, shard, group)


class Piece(NamedTuple):
    """One rank's part of a gradient.

    Attributes:
        name: Of the parameter in the whole model.
        ranks: Coordinates of the rank that holds it, without the tensor-parallel one: ranks that differ hold copies.
        part: Which part it is, and None where the tensor is not split.
        dim: Along which dimension.
        blocks: Rows of each block of it along that dimension, where several matrices in one, such as gate and up, are
            split each for itself.
        gradient: The values.
    """

    name: str
    ranks: tuple[int, ...]
    part: int | None
    dim: int
    blocks: tuple[int, ...]
    gradient: Tensor


def _pieces(stages: Sequence[CompositeModel]) -> list[Piece]:
    world, size = dist.get_rank(), parallel_state.get_tensor_model_parallel_world_size()
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    pieces = []
    for number, stage in enumerate(stages):
        for local, parameter in stage.named_parameters():
            split = size > 1 and getattr(parameter, "tensor_model_parallel", False)
            # Ranks of a tensor-parallel group are neighbours. A copy of a tensor that is not split counts for itself.
            ranks = (number, world // size if split else world)
            dim = parameter.partition_dim if split else 0
            stride, rows = getattr(parameter, "partition_stride", 1), parameter.shape[dim]
            blocks = tuple(getattr(parameter, "partition_sizes", None) or [rows // stride] * stride)
            gradient = parameter.main_grad.detach().cpu()
            pieces.append(
                Piece(_whole_name(stage, local), ranks, tensor_rank if split else None, dim, blocks, gradient)
            )
    return pieces


def _whole_name(stage: CompositeModel, name: str) -> str:
    """The name in the whole model: blocks and experts counted from the first, the tied copy by its original's name."""
    if name == "output_layer.weight" and stage.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    expert = parallel_state.get_expert_model_parallel_rank() * (stage.config.num_moe_experts or 0)
    first = expert // parallel_state.get_expert_model_parallel_world_size()
    name = re.sub(r"local_experts\.(\d+)", lambda found: f"local_experts.{first + int(found[1])}", name)
    return re.sub(
        r"^decoder\.layers\.(\d+)",
        lambda found: f"decoder.layers.{stage.decoder.layers[int(found[1])].layer_number - 1}",
        name,
    )


def _differences(pieces: Sequence[Piece], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor max|difference| / max|reference|, the largest over its copies; inf where one is missing."""
    parts: dict[tuple[str, tuple[int, ...]], list[Piece]] = defaultdict(list)
    for piece in pieces:
        parts[piece.name, piece.ranks].append(piece)
    found = dict.fromkeys(wanted, -1.0)
    for (name, _), held in parts.items():
        whole, reference = _join(held), wanted[name]
        if whole.shape != reference.shape or not whole.isfinite().all():
            found[name] = float("inf")
            continue
        found[name] = max(found[name], ((whole - reference).abs().max() / reference.abs().max()).item())
    return {name: value if value >= 0 else float("inf") for name, value in found.items()}


def _join(parts: Sequence[Piece]) -> Tensor:
    """The whole tensor of the parts that tensor-parallel ranks hold."""
    ordered = sorted(parts, key=lambda piece: piece.part or 0)
    dim, blocks = ordered[0].dim, ordered[0].blocks
    split = [piece.gradient.split(blocks, dim) for piece in ordered]
    return torch.cat([torch.cat(chunks, dim) for chunks in zip(*split, strict=True)], dim)


def _gather[T](values: list[T]) -> list[T]:
    """The values of all ranks, on the first one; none on the others."""
    gathered: list[Any] = [None] * dist.get_world_size()
    first = dist.get_rank() == 0
    dist.gather_object(values, gathered if first else None)
    return [value for part in gathered for value in part] if first else []


def _state(stages: Sequence[CompositeModel]) -> dict[str, Any]:
    return {f"model{number}": stage.sharded_state_dict() for number, stage in enumerate(stages)}


def _save(stages: Sequence[CompositeModel], folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(_state(stages), str(folder))
    dist.barrier()


def _load(stages: Sequence[CompositeModel], folder: Path) -> None:
    loaded = dist_checkpointing.load(_state(stages), str(folder))
    for number, stage in enumerate(stages):
        stage.load_state_dict(loaded.get(f"model{number}", {}))  # a stage without blocks has no tensors


def _is_saved(weights: dict[str, Tensor], folder: Path) -> bool:
    """Whether the checkpoint, read by PyTorch's own reader, holds just these tensors.

    Of those that Megatron saves in parts, or several as one, the values count and not their order: that the order is
    right, loading shows.
    """
    whole = folder / "whole.pt"
    dcp_to_torch_save(folder, whole)
    found = {name: value for name, value in torch.load(whole).items() if isinstance(value, Tensor)}
    same = {name for name in found.keys() & weights.keys() if torch.equal(found[name], weights[name])}
    ours, theirs = (_grouped({name: part[name] for name in part.keys() - same}) for part in (weights, found))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _grouped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sorted values of what Megatron saves under one stem: experts together, matrices in one each for itself."""
    groups = defaultdict(list)
    for name, value in tensors.items():
        stem = re.sub(r"experts\.(local_experts\.\d+|experts)\.", "experts.", name)
        stem = re.sub(r"(\.weight|\.bias|_weight|_bias)(\.\w+)?$", r"\1", stem).replace("conv1d_", "conv1d.")
        groups[stem].append(value.flatten())
    return {name: torch.cat(values).sort().values for name, values in groups.items()}
