"""The part of a training command line that says what to train on, and Megatron's flags for it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.mixture import Mixture
from composer_megatron.raw import RawMixture, RawOptions

if TYPE_CHECKING:
    from composer_megatron.arguments import Options

Flags = dict[str, Any]
"""As in `composer_megatron.arguments`."""


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Declare what to train on; the options of raw text are `RawOptions` with ``text_`` before their names."""
    raw, add = RawOptions(), parser.add_argument
    add(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a text folder: train and validate on it; several times for a blend; with --text-tokenizer files and "
        "folders of raw text, tokenized on the way",
    )
    add(
        "--text-weight",
        dest="text_weights",
        type=float,
        action="append",
        default=[],
        metavar="W",
        help="the share of the training sequences that a --text gives, once for each of them; by default by their size",
    )
    add(
        "--document-masks",
        action="store_true",
        help="keep attention within documents, and let no token predict another document's first one",
    )
    add("--text-tokenizer", type=Path, metavar="FILE", help="of raw text: a tokenizer (Hugging Face tokenizers JSON)")
    add("--text-field", default=raw.field, metavar="NAME", help="of raw text: the field of a jsonl line that holds it")
    add(
        "--text-valid-fraction",
        type=float,
        default=raw.valid_fraction,
        metavar="F",
        help="of raw text: part of the documents to hold out, by their content",
    )
    add(
        "--text-shuffle-megabytes",
        type=float,
        default=raw.shuffle_megabytes,
        metavar="MB",
        help="of raw text: documents change places within this much of it; 0 for none",
    )
    add(
        "--text-shards",
        type=int,
        metavar="N",
        help="of raw text: streams to deal it to, which any number of data-parallel ranks that divides N can share; by "
        "default as many as those",
    )


def load_text(options: Options) -> Mixture | RawMixture | None:
    """What ``--text`` names; None where it is not given.

    Raises:
        UsageError: If text folders and raw text are mixed, or the options are impossible.
        FileError: If a text is missing or damaged.
    """
    raw = options.raw.tokenizer is not None or any(path.is_file() for path in options.text)
    if not raw and options.raw != RawOptions():
        raise UsageError("--text-… options are for raw text: give --text-tokenizer FILE, too, or leave them out")
    if not options.text:
        if options.text_weights or raw:
            raise UsageError("--text-… options without --text: name what to train on")
        return None
    if not raw:
        return Mixture.load(options.text, options.text_weights)
    folder = next((path for path in options.text if (path / "text.json").is_file()), None)
    if folder is not None:
        raise UsageError(f"{folder} is a text folder, tokenized already, and does not go with raw text")
    return RawMixture.load(options.text, options.text_weights, options.raw)


_MASKABLE = {"document_masks": "AWME", "reset_attention_mask": "AWMEL"}
"""The blocks that keep to documents, by the kind of mask; the state of others runs on from one into the next."""


def document_flags(
    given: Mapping[str, Any], architecture: Architecture, *, document_masks: bool, own_attention: bool = True
) -> Flags:
    """The flags for document masks: documents are packed sequences to attention, and the loss leaves out their ends.

    Args:
        given: The flags that the user gave, by Megatron's names.
        architecture: What is to be trained.
        document_masks: Whether our flag asks for them.
        own_attention: Whether `composer_megatron.layers.attention.CoreAttention` attends.

    Raises:
        UsageError: If masks are asked for, by our flag or Megatron's, that something else does not know.
    """
    packed = document_masks or bool(given.get("dataloader_inter_document_masking"))
    in_memory = bool(given.get("reset_attention_mask"))
    if not packed and not in_memory:
        return {}
    flag = "--document-masks" if packed else "--reset-attention-mask"
    if packed and in_memory:
        raise UsageError("--document-masks and --reset-attention-mask mean the same in two ways; leave out the second")
    if given.get("context_parallel_size", 1) > 1 and in_memory:
        raise UsageError(f"{flag} does not go with --context-parallel-size; use --document-masks, which does")
    if given.get("context_parallel_size", 1) > 1 and not own_attention:
        problem = f"{flag} goes with --context-parallel-size on our attention alone"
        raise UsageError(f"{problem}: use --backend composer or local, or --backend-part attention=composer")
    known = _MASKABLE["document_masks" if packed else "reset_attention_mask"]
    other = next((letter for letter in architecture.sequence.letters if letter not in known), None)
    if other is not None:
        problem = f"{flag} does not go with {other} blocks, which carry on from one document into the next"
        raise UsageError(f"{problem}; leave it out")
    if not document_masks:
        return {}
    # Micro-batches have unequal numbers of tokens that count; Megatron would take the mean of their means.
    masks: Flags = {"--dataloader-inter-document-masking": None, "--eod-mask-loss": None}
    return masks | {"--calculate-per-token-loss": None}


def data_flags(
    text: Mixture | RawMixture | None, given: Mapping[str, Any], architecture: Architecture, run_dir: Path | None
) -> Flags:
    """Where the data lies, and a tokenizer that knows no more than ids.

    Raises:
        UsageError: If there are no data, or two sources of it.
    """
    sources = ("data_path", "data_args_path", "train_data_path", "per_split_data_args_path", "mock_data")
    source = next((name for name in sources if given.get(name)), None)
    if (text is None) == (source is None):
        if source is None:
            raise UsageError("no data: give --text DIR, or Megatron's --data-path, --train-data-path or --mock-data")
        raise UsageError(f"--text and --{source.replace('_', '-')}: give one source of data")
    flags: Flags = {"--tokenizer-type": "NullTokenizer", "--vocab-size": architecture.shape.vocab_size}
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        _check_blend(name, given.get(name) or ())
    if text is None:
        return flags
    alien = [name for name in ("dataloader_type", "full_validation", "rampup_batch_size") if given.get(name)]
    if isinstance(text, RawMixture) and alien:
        raise UsageError(
            f"--{alien[0].replace('_', '-')} does not go with raw text; leave it out, or make a text folder of it"
        )
    return flags | {"--null-tokenizer-eod-id": text.end_of_text} | text.flags(run_dir)


def _check_blend(name: str, blend: Sequence[str]) -> None:
    """See that there is an indexed data set behind every prefix; a blend has prefixes, perhaps with weights between."""
    for prefix in blend:
        if not prefix.replace(".", "").isdecimal() and not Path(f"{prefix}.idx").is_file():
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag}: there is no {prefix}.idx; expected the path of an indexed data set without .idx")
