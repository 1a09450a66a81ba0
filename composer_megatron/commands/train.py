"""``train`` and ``flags``: pretrain with this program, or with Megatron's own scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from composer_megatron.architecture import Architecture
from composer_megatron.commands.options import multiply_on_one_thread, shell_words
from composer_megatron.display import print_costs, print_json, print_stages


def train(
    *,
    architecture: Path,
    text: tuple[Path, ...],
    run_dir: Path,
    processes: int = 1,
    tp: int = 1,
    pp: int = 1,
    steps: int = 1000,
    micro_batch_size: int = 8,
    global_batch_size: int | None = None,
    seq_len: int = 1024,
    learning_rate: float = 3e-4,
    seed: int = 1234,
    text_weights: tuple[float, ...] = (),
    text_tokenizer: Path | None = None,
    document_masks: bool = False,
    dry_run: bool = False,
    megatron_flags: str = "",
) -> None:
    """Pretrain an architecture on Megatron-core with torchrun; the same command again resumes.

    On several nodes run torchrun ... -m composer_megatron.train yourself; --dry-run prints the command to start from.

    Args:
        architecture: An architecture file.
        text: Folders made by tools/preprocess_text.py; with --text-tokenizer, files and folders of raw text.
        run_dir: Where checkpoints, metrics and logs go.
        processes: Processes on this machine, one a GPU.
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        steps: Optimizer steps.
        micro_batch_size: Sequences in one forward pass.
        global_batch_size: Sequences in a step; by default 4 micro-batches for each pipeline stage and data rank.
        seq_len: Tokens in a sequence.
        learning_rate: Peak of the cosine schedule.
        seed: Seed of weights and data order.
        text_weights: The share of the training sequences that each text gives; by default by their size.
        text_tokenizer: Train on raw text, tokenized on the way with this tokenizer (Hugging Face tokenizers JSON).
        document_masks: Keep attention within documents, and let no token predict another document's first one.
        dry_run: Check, print the plan and the command, and start nothing.
        megatron_flags: Further flags for Megatron, which win over ours, as one quoted text or after a lone --.
    """
    from composer_megatron import pipeline
    from composer_megatron.arguments import parse_options
    from composer_megatron.data_flags import load_text
    from composer_megatron.launch import Launch
    from composer_megatron.planner import estimate

    model = Architecture.load(architecture)
    layout = pipeline.Layout(
        tensor_parallel=tp,
        pipeline_parallel=pp,
        micro_batch_size=micro_batch_size,
        seq_len=seq_len,
        sequence_parallel=tp > 1,
    )
    summary = estimate.summary(pipeline.plan(model, layout))
    launch = Launch(
        architecture=architecture,
        text=text[0],
        run_dir=run_dir,
        processes=processes,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        steps=steps,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size or 4 * pp * micro_batch_size * max(1, processes // (tp * pp)),
        seq_len=seq_len,
        learning_rate=learning_rate,
        seed=seed,
        extra=(*_data_flags(text[1:], text_weights, text_tokenizer, document_masks), *shell_words(megatron_flags)),
    )
    load_text(parse_options(launch.arguments()))
    if dry_run:
        launch.check()
        print_costs(model, seq_len)
        print_stages(summary)
        print(launch.shell())
    else:
        launch.run()


def _data_flags(
    more: tuple[Path, ...], weights: tuple[float, ...], tokenizer: Path | None, document_masks: bool
) -> list[str]:
    """The flags of `composer_megatron.train` for all texts but the first."""
    pairs = [("--text", path) for path in more] + [("--text-weight", weight) for weight in weights]
    given = [*pairs, *([] if tokenizer is None else [("--text-tokenizer", tokenizer)])]
    return [str(part) for pair in given for part in pair] + ["--document-masks"] * document_masks


def flags(
    architecture: Positional[Path],
    *,
    script: Literal["hybrid", "gpt"] = "hybrid",
    pp: int = 1,
    vpp: int = 1,
    seq_len: int = 4096,
    json: bool = False,
) -> None:
    """Print the flags by which Megatron's own pretrain_hybrid.py or pretrain_gpt.py builds an architecture.

    Args:
        architecture: An architecture file.
        script: hybrid for pretrain_hybrid.py, gpt for pretrain_gpt.py, which reads the file named by the environment
            variable COMPOSER_ARCHITECTURE, too.
        pp: Pipeline-parallel ranks, among which the sequence is cut by cost.
        vpp: Pipeline stages on each rank.
        seq_len: Tokens in a sequence.
        json: Print a JSON list of arguments instead of a line for a shell.
    """
    multiply_on_one_thread()
    from composer_megatron import script_flags

    found = script_flags.script_flags(
        Architecture.load(architecture), script, pipeline=pp, virtual_stages=vpp, seq_len=seq_len
    )
    if json:
        print_json(script_flags.as_arguments(found))
    else:
        print(script_flags.as_shell_text(found))
