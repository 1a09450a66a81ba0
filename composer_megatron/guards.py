"""What Megatron-core lets pass and computes wrongly, or refuses late and in words of its own: refused first, here.

Each function raises an error for people, on every rank alike, before any process waits for another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from composer_megatron.architecture import Architecture
from composer_megatron.checkpoint import complete_iterations
from composer_megatron.errors import UsageError
from composer_megatron.layout import Layout
from composer_megatron.primitives import PRIMITIVES

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

_NOT_IN_A_COMPOSITE = {
    "num_layers": "--architecture says how many blocks there are",
    "num_layers_per_virtual_pipeline_stage": "use --num-virtual-stages-per-pipeline-rank",
    "pipeline_model_parallel_layout": "cut by hand with --hybrid-layer-pattern and its '|'",
    "decoder_first_pipeline_num_layers": "cut by hand with --hybrid-layer-pattern and its '|'",
    "decoder_last_pipeline_num_layers": "cut by hand with --hybrid-layer-pattern and its '|'",
    "account_for_embedding_in_pipeline_split": "the cut counts the embedding and the loss already",
    "account_for_loss_in_pipeline_split": "the cut counts the embedding and the loss already",
    "heterogeneous_layers_config_path": "--architecture says what each block is",
    "heterogeneous_layers_config_encoded_json": "--architecture says what each block is",
    "hybrid_override_pattern": "use --hybrid-layer-pattern",
    "num_experts": "no block of the architecture has experts",
    "expert_model_parallel_size": "no block of the architecture has experts",
    "expert_tensor_parallel_size": "no block of the architecture has experts",
    "mtp_num_layers": "the architecture predicts one token; multi-token prediction is not part of it",
    "multi_latent_attention": "attention blocks have grouped queries",
    "experimental_attention_variant": "attention blocks have grouped queries",
    "window_attn_skip_freq": "attention blocks see all earlier tokens",
    "no_rope_freq": "all attention blocks have rotary embeddings",
    "moe_layer_freq": "no block of the architecture has experts",
    "linear_attention_freq": "attention blocks have grouped queries",
    "apply_residual_connection_post_layernorm": "blocks normalise their input and add to it as it was",
    "window_size": "attention blocks see all earlier tokens",
    "softmax_type": "attention is an ordinary softmax",
    "attention_output_gate": "attention blocks have no gate",
    "qk_layernorm": "queries and keys are not normalised",
    "add_qkv_bias": "blocks have no biases",
    "use_rope_scaling": "give its shape a rope_scaling_factor instead",
    "rotary_seq_len_interpolation_factor": "rotary embeddings are scaled by the shape's rope_scaling_factor alone",
    "activation_func_clamp_value": "MLP blocks are SwiGLU",
    "glu_linear_offset": "MLP blocks are SwiGLU",
}
"""Flags of other models of Megatron's, by its name for them, each with what holds for a Composite instead.

Megatron's hybrid model ignores most of them without a word, and trains another model than the one asked for; with the
others the run's ``architecture.json`` would tell of another model than its checkpoints hold.
"""
_HARMLESS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "expert_model_parallel_size": (1,),
        "expert_tensor_parallel_size": (1,),
        "moe_layer_freq": (1,),
        "softmax_type": ("vanilla",),
        "glu_linear_offset": (0.0,),
    }
)
"""Values of those flags that mean nothing, beside None and False."""


def check_checkpoints(folder: Path, architecture: Architecture) -> None:
    """Refuse a folder of checkpoints that belongs to another architecture, to be loaded or to be saved to.

    Looks at the newest checkpoint whose index can be read; a folder without one is nobody's.

    Raises:
        UsageError: With the first block that differs, or the first matrix.
    """
    shapes = _newest_tensors(folder)
    if not shapes:
        return
    letters = architecture.sequence.letters.replace("W", "A")
    problem = _difference(saved_blocks(shapes), letters) or _wrong_matrix(shapes, architecture)
    if problem:
        place = f"{folder} holds checkpoints of another architecture than {architecture.sequence.notation}"
        raise UsageError(f"{place}: {problem}; choose another folder")


def check_optimizer(folder: Path, *, distributed: bool) -> None:
    """Refuse to go on from a checkpoint of the distributed optimizer without it, and the other way round.

    Their states lie in checkpoints in different forms, which Megatron-core does not turn into each other.

    Args:
        folder: Of checkpoints; the newest whose index can be read counts.
        distributed: Whether the run has a distributed optimizer.

    Raises:
        UsageError: With the flag that makes them one.
    """
    states = [name for name in _newest_tensors(folder) if name.startswith(("optimizer.", "chained_"))]
    saved = any(".state.param." in name or ".distributed." in name for name in states)
    if not states or saved == distributed:
        return
    how = "with" if saved else "without"
    change = "add" if saved else "leave out"
    raise UsageError(
        f"{folder} was saved {how} --use-distributed-optimizer and goes on only so: {change} that flag, or go on from "
        "the weights alone with --no-load-optim --no-load-rng --finetune"
    )


def _newest_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of the newest checkpoint whose index can be read; none where there is none."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    for iteration in reversed(complete_iterations(folder)):
        try:
            tensors = load_tensors_metadata(str(folder / f"iter_{iteration:07d}"))
        except Exception:  # a torn index raises anything, and a run passes over such a checkpoint
            continue
        return {name: tuple(tensor.global_shape) for name, tensor in tensors.items()}
    return {}


def check_same(known: Architecture, wanted: Architecture, file: Path) -> None:
    """Refuse to go on with another architecture than the run's.

    Args:
        known: The run's.
        wanted: What is asked for.
        file: Where the run's stands.

    Raises:
        UsageError: With the first block that differs, or the widths that do.
    """
    if known == wanted:
        return
    problem = _difference(known.sequence.letters, wanted.sequence.letters)
    if not problem:
        here = vars(wanted.shape)
        unequal = [name for name, value in vars(known.shape).items() if value != here[name]]
        problem = ", ".join(f"{name} is {vars(known.shape)[name]} there and {here[name]} here" for name in unequal)
    place = f"{file.parent} is a run of another architecture ({file})"
    raise UsageError(f"{place}: {problem or 'its origin differs'}; choose another --run-dir")


def saved_blocks(names: Iterable[str]) -> str:
    """The blocks that a checkpoint holds, by the names of its tensors: ``AAMMMM``.

    A layer of Megatron's GPTModel holds both halves and counts as ``AM``, as its hybrid model loads it; ``?`` stands
    for a layer of neither. A window leaves no trace: ``W`` counts as ``A``.
    """
    found: dict[int, set[str]] = {}
    for name in names:
        match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
        letter = next((letter for part, letter in _MARKS.items() if match and match[2].startswith(part)), None)
        if match and letter:
            found.setdefault(int(match[1]), set()).add(letter)
    return "".join("".join(sorted(found.get(layer, {"?"}))) for layer in range(max(found, default=-1) + 1))


_MARKS: Mapping[str, str] = MappingProxyType(
    {
        "self_attention.linear_qkv.": "A",
        "self_attention.linear_kv_down_proj.": "L",
        "self_attention.in_proj.": "G",
        "mixer.in_proj.": "S",
        "mlp.linear_fc1.": "M",
        "mlp.router.": "E",
    }
)
"""The tensor by which a block in a checkpoint is known, after its layer's name."""


def _difference(there: str, here: str) -> str:
    """Where two sequences part, in words; empty if nowhere."""
    for number, (one, other) in enumerate(zip(there, here, strict=False), start=1):
        if one != other:
            return f"block {number} is {one} there and {other} here"
    return "" if len(there) == len(here) else f"it has {len(there)} blocks there and {len(here)} here"


def _wrong_matrix(shapes: Mapping[str, tuple[int, ...]], architecture: Architecture) -> str:
    shape = architecture.shape
    hidden, heads = shape.hidden_size, shape.num_attention_heads + 2 * shape.num_query_groups
    expected = {
        "word_embeddings.weight": (shape.vocab_size, hidden),
        "linear_qkv.weight": (heads * shape.head_dim, hidden),
        "linear_fc1.weight": (2 * shape.ffn_hidden_size, hidden),
    }
    for name, size in shapes.items():
        wanted = expected.get(".".join(name.split(".")[-2:]), size)
        if name.startswith(("embedding.", "decoder.")) and "experts." not in name and size != wanted:
            return f"{name} is {size} there and {wanted} here"
    if ("output_layer.weight" in shapes) is shape.tied_embeddings:
        return f"its output layer is {'not ' if shape.tied_embeddings else ''}tied to the embedding"
    return ""


_OF_BLOCKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "W": ("window_size", "window_attn_skip_freq"),
        "E": ("num_experts", "moe_layer_freq"),
        "L": ("multi_latent_attention",),
    }
)
"""Of those flags, the ones that an architecture with that primitive sets itself."""
_PARALLELISM: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"E": ("expert_model_parallel_size", "expert_tensor_parallel_size")}
)
"""Of those flags, the ones that an architecture with that primitive gives a meaning to."""


def check_flags(given: Mapping[str, Any], architecture: Architecture | None = None) -> None:
    """Refuse flags that belong to another model of Megatron's than the architecture's.

    Args:
        given: The flags that the user gave, by Megatron's names.
        architecture: What is to be trained; None for one of A and M.

    Raises:
        UsageError: With what to use instead.
    """
    from composer_megatron.arguments import flag_of

    letters = "AM" if architecture is None else architecture.sequence.letters
    set_by_us = {name for letter, names in _OF_BLOCKS.items() if letter in letters for name in names}
    allowed = {name for letter, names in _PARALLELISM.items() if letter in letters for name in names}
    for name, instead in _NOT_IN_A_COMPOSITE.items():
        if name in allowed:
            continue
        if given.get(name) not in (None, False, *_HARMLESS.get(name, ())):
            advice = "the architecture's sequence and shape say it" if name in set_by_us else instead
            raise UsageError(f"{flag_of(name)} does not go with an architecture file: {advice}")
    pattern = given.get("hybrid_layer_pattern") or ""
    known = "".join(dict.fromkeys(row.megatron_symbol for row in PRIMITIVES.values() if row.symbol in letters))
    foreign = next((letter for letter in pattern if letter not in known + "|/"), None)
    if foreign:
        problem = f"--hybrid-layer-pattern {pattern!r}: {foreign!r} is no block of an architecture file"
        raise UsageError(f"{problem}; expected {' and '.join(known)}, with '|' between stages")


def check_layout(
    architecture: Architecture, given: Mapping[str, Any], *, virtual_stages: int, seq_len: int, world_size: int
) -> Layout:
    """The layout that the flags ask for, if the architecture and the number of processes allow it.

    Args:
        architecture: What is to be trained.
        given: The flags that the user gave, by Megatron's names.
        virtual_stages: Stages on each pipeline rank.
        seq_len: Tokens in a sequence.
        world_size: Processes in all.

    Raises:
        UsageError: With the sizes that do not fit.
    """
    tensor, pipeline, context = (
        given.get(f"{kind}_parallel_size", 1) for kind in ("tensor_model", "pipeline_model", "context")
    )
    for name, size in {"tensor-model": tensor, "pipeline-model": pipeline, "context": context}.items():
        if size < 1:
            raise UsageError(f"--{name}-parallel-size {size}; expected at least 1")
    by_hand = given.get("hybrid_layer_pattern")
    one_replica = Layout(
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        virtual_stages=_virtual_stages(by_hand, pipeline, virtual_stages) if by_hand else virtual_stages,
        context_parallel=context,
        micro_batch_size=given.get("micro_batch_size", 1),
        seq_len=seq_len,
        sequence_parallel=bool(given.get("sequence_parallel")),
        distributed_optimizer=bool(given.get("use_distributed_optimizer")),
    )
    # Stages cut by hand may be empty.
    (Layout(tensor_parallel=tensor) if by_hand else one_replica).check(architecture)
    if world_size % one_replica.ranks:
        sizes = f"tensor {tensor} x pipeline {pipeline} x context {context} = {one_replica.ranks} ranks"
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        advice = f"start a multiple of {one_replica.ranks}, or change the sizes"
        raise UsageError(f"{sizes} do not divide {processes}; {advice}")
    replicas, micro_batch = world_size // one_replica.ranks, one_replica.micro_batch_size
    batch = given.get("global_batch_size", micro_batch * replicas)
    _check_batch(batch, micro_batch, replicas)
    return replace(one_replica, data_parallel=replicas, micro_batches=batch // (micro_batch * replicas))


def _virtual_stages(pattern: str, ranks: int, wanted: int) -> int:
    """Stages on each rank of a pattern cut by hand; without a bar in it Megatron cuts it into equal stages."""
    stages = pattern.count("|") + 1
    if stages == 1:
        return 1
    if stages % ranks or (wanted > 1 and stages != ranks * wanted):
        problem = f"--hybrid-layer-pattern {pattern!r} has {stages} stages for {ranks} pipeline ranks"
        raise UsageError(f"{problem}; put in {ranks * wanted - 1} bars, or change --pipeline-model-parallel-size")
    return stages // ranks


def _check_batch(batch: int, micro_batch: int, replicas: int) -> None:
    if micro_batch < 1:
        raise UsageError(f"--micro-batch-size {micro_batch}; expected at least 1")
    step = micro_batch * replicas
    if batch < 1 or batch % step:
        problem = f"--global-batch-size {batch} is no multiple of {step}"
        raise UsageError(f"{problem} (--micro-batch-size {micro_batch} x {replicas} data-parallel ranks)")


def check_tensor_parallelism(symbols: Iterable[str], config: TransformerConfig) -> None:
    """Refuse blocks that are wrong, or that Megatron-core refuses, under tensor parallelism alone.

    Without sequence parallelism Megatron-core does not sum, over the ranks, the gradient of a norm that they share and
    that meets each rank's own heads (Gated DeltaNet). Experts it refuses itself.

    Args:
        symbols: Megatron's letters of the blocks.
        config: With the parallel sizes.

    Raises:
        UsageError: With what to set.
    """
    if config.tensor_model_parallel_size == 1 or config.sequence_parallel:
        return
    rows = [row for row in PRIMITIVES.values() if row.symbol in "EG" and row.megatron_symbol in set(symbols)]
    if rows:
        what = f"{rows[0].symbol} ({rows[0].name})"
        raise UsageError(f"{what} under tensor parallelism needs sequence parallelism: add --sequence-parallel")


def settle_joined_rope(config: TransformerConfig) -> None:
    """Take `fused_single_qkv_rope` back where Megatron-core would fail, or turn the wrong heads in silence.

    Megatron-core does not tell the function of interleaved pairs, and gives it whole query groups alone; test mode,
    flash decoding and gated attention want query, key and value apart.

    Raises:
        UsageError: If there is no such function here.
    """
    if not config.fused_single_qkv_rope:
        return
    from megatron.core.transformer import attention

    if not attention.HAVE_FUSED_QKV_ROPE:
        raise UsageError(
            "fused_single_qkv_rope=True: nothing here turns query, key and value at once: add --backend-part rope=qkv"
        )
    apart = config.rotary_interleaved or config.num_query_groups < config.tensor_model_parallel_size
    if apart or config.test_mode or config.flash_decode or config.attention_output_gate:
        config.fused_single_qkv_rope = False


def check_schedule(config: TransformerConfig) -> None:
    """Refuse a pipeline schedule that gives wrong numbers without a word.

    Between two ranks that hold two stages or more each, a batch of sends and receives (`batch_p2p_comm`, which is
    Megatron-core's default) pairs a stage's output with another one's input. `megatron.training` sets the flags so that
    it does not happen; whoever calls Megatron-core has to.

    Raises:
        UsageError: With what to set.
    """
    two = config.pipeline_model_parallel_size == 2
    if two and (config.virtual_pipeline_model_parallel_size or 1) > 1 and config.batch_p2p_comm:
        raise UsageError(
            "two pipeline ranks with several stages each would exchange wrong tensors in silence: set "
            "overlap_p2p_comm=True and batch_p2p_comm=False in the configuration (Megatron's training does so unless "
            "--no-overlap-p2p-communication is given), or use one stage a rank"
        )
