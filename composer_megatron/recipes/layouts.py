"""A recipe on GPUs: the layout that the planner suggests or the user fixes, and the flags of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from composer_megatron.errors import UsageError
from composer_megatron.layout import Layout
from composer_megatron.pipeline import Plan, plan
from composer_megatron.planner.survey import survey
from composer_megatron.recipes.recipe import Recipe
from composer_megatron.roofline import Device


def lay_out(recipe: Recipe, gpus: int, device: Device, fixed: Mapping[str, Any] = MappingProxyType({})) -> Plan:
    """The layout of a recipe on a number of GPUs.

    Args:
        recipe: What is trained.
        gpus: How many.
        device: Which.
        fixed: Fields of `Layout` that are decided: then the others keep their defaults, and data parallelism takes
            what GPUs are left. Where there are none, the fastest layout of `composer_megatron.planner.survey.survey`.

    Raises:
        UsageError: If no layout fits into memory, or the fixed one does not divide GPUs and batch.
    """
    if gpus < 1:
        raise UsageError(f"gpus={gpus}; expected at least 1")
    if not fixed:
        batch = recipe.global_batch_size
        found = survey(recipe.architecture, gpus, device, seq_len=recipe.seq_len, global_batch_size=batch, most=1)
        return found[0]
    one = Layout(**fixed, seq_len=recipe.seq_len)
    if gpus % one.ranks:
        raise UsageError(f"tp x pp x cp = {one.ranks} does not divide {gpus} GPUs; change the sizes or the number")
    replicas = gpus // one.ranks
    together = one.micro_batch_size * replicas
    if recipe.global_batch_size % together:
        problem = f"global_batch_size={recipe.global_batch_size} is no multiple of {together}"
        raise UsageError(f"{problem} (micro_batch_size={one.micro_batch_size} x {replicas} data-parallel ranks)")
    layout = Layout(
        **fixed,
        seq_len=recipe.seq_len,
        data_parallel=replicas,
        micro_batches=recipe.global_batch_size // together,
        sequence_parallel=one.tensor_parallel > 1,
        distributed_optimizer=one.context_parallel * replicas > 1,
    )
    return plan(recipe.architecture, layout, device=device)


def run_flags(recipe: Recipe, found: Plan, architecture: Path) -> dict[str, Any]:
    """The flags of `composer_megatron.train` for a recipe and its layout: all but text and run folder.

    A flag without a value has None. The pattern is the plan's, so that what runs is what was planned.

    Args:
        recipe: What is trained.
        found: On which layout.
        architecture: The file that holds, or will hold, `Recipe.architecture`.
    """
    layout = found.layout
    flags: dict[str, Any] = {
        "--architecture": architecture,
        **recipe.megatron_flags(),
        "--micro-batch-size": layout.micro_batch_size,
        "--tensor-model-parallel-size": layout.tensor_parallel,
        "--pipeline-model-parallel-size": layout.pipeline_parallel,
        "--context-parallel-size": layout.context_parallel,
        # Even without replicas: its checkpoints load into any layout, but not into a run without it, nor theirs here.
        "--use-distributed-optimizer": None,
    }
    if layout.virtual_stages > 1:
        flags["--num-virtual-stages-per-pipeline-rank"] = layout.virtual_stages
    if layout.pipeline_parallel > 1:
        flags["--hybrid-layer-pattern"] = found.pattern
    if layout.sequence_parallel:
        flags["--sequence-parallel"] = None
    if layout.replicas > 1:
        flags |= dict.fromkeys(("--overlap-grad-reduce", "--overlap-param-gather"))
    if layout.recompute == "selective":
        flags["--recompute-granularity"] = "selective"
    if layout.recompute == "full":
        flags |= {"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1}
    return flags


def tokens_of(flags: Mapping[str, Any]) -> list[str]:
    """Flags as arguments, each of them one, since a pattern that starts with an MLP would read as a flag of its own."""
    return [flag if value is None else f"{flag}={value}" for flag, value in flags.items()]
