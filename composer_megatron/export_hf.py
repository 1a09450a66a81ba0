"""Export a trained run to Hugging Face transformers: safetensors, configuration, modelling code and tokenizer.

The folder loads with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` and needs nothing of ours
or Megatron's. Its code is `composer_megatron/huggingface/template/modeling_composite.py`, copied as it is.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from composer_megatron.architecture import Architecture
from composer_megatron.checkpoint import find_checkpoint, open_run
from composer_megatron.errors import UsageError
from composer_megatron.files import new_folder, write_json, write_text
from composer_megatron.huggingface.config import rope_scaling_fields
from composer_megatron.huggingface.names import Part, composite_parts
from composer_megatron.huggingface.write import Piece, write_safetensors
from composer_megatron.importing.conversion import (
    Progress,
    check_absent,
    check_space,
    copy_tokenizer,
    ended_by_sigterm,
    silent,
)
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.stored import StoredRun
from composer_megatron.text import tokenizing

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from tokenizers import Tokenizer

MODELING_FILE = "modeling_composite.py"
SHARD_BYTES = 5 * 10**9
"""Weights are spread over files of about this size, as is the custom on the Hugging Face Hub."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def export(
    run_dir: Path,
    output_dir: Path,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Path:
    """Write a run as a transformers model. The folder appears whole or not at all.

    Whichever parallel layout saved the run, tensors are read and written one at a time, so that memory holds no more
    than the largest of them twice.

    Args:
        run_dir: A run, as for `load_run`.
        output_dir: The folder to make.
        iteration: Which checkpoint; None for the newest.
        dtype: Type of the weights; None for the type in which they were saved.
        shard_bytes: Size of a file of weights, unless a single parameter of ours is larger.
        progress: Told after each parameter how many bytes are written, and how many there are.

    Returns:
        `output_dir`.

    Raises:
        UsageError: If `output_dir` exists, the type is none of fp32, bf16 and fp16, or the run has blocks for which
            there is no modelling code.
        FileError: If the run cannot be read, holds numbers that the type cannot, or the folder cannot be written.
        ComposerError: If Megatron-core is not installed.
    """
    check_absent(output_dir)
    if dtype not in (None, *_DTYPES):
        raise UsageError(f"dtype={dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    found = find_checkpoint(Path(run_dir), iteration)
    parts = composite_parts(Architecture.load(found.run_dir / "architecture.json"))
    run = open_run(found.folder)
    dtype = dtype or run.dtype
    with ended_by_sigterm(), new_folder(output_dir) as folder:
        check_space(folder, run.architecture.params_total * dtype.itemsize)
        write_json(folder / "config.json", hf_config(run, dtype))
        write_text(folder / MODELING_FILE, _modeling_code())
        write_text(folder / "README.md", _model_card(run))
        run.architecture.save(folder / "architecture.json")
        if run.tokenizer is not None:
            _write_tokenizer(folder, run, run.tokenizer)
        pieces = (_piece(part, run) for part in parts)
        write_safetensors(folder, pieces, dtype, shard_bytes=shard_bytes, progress=progress)
    return output_dir


def _piece(part: Part, run: StoredRun) -> Piece:
    sizes = dict(zip(part.theirs, part.sizes, strict=True))
    return Piece(sizes, lambda: part.split(run.read(part.ours), run.architecture.shape))


def hf_weights(model: HybridModel, architecture: Architecture) -> dict[str, Tensor]:
    """The parameters of a model in memory by their names in `modeling_composite.py`, on the CPU.

    A tied output layer is left out.
    """
    parameters = dict(model.named_parameters())
    return {
        name: piece.detach().cpu().contiguous()
        for part in composite_parts(architecture)
        for name, piece in zip(part.theirs, part.split(parameters[part.ours], architecture.shape), strict=True)
    }


def hf_config(run: StoredRun, dtype: torch.dtype) -> dict[str, Any]:
    """The content of ``config.json``: the fields of `CompositeConfig`, and where its code is."""
    shape, module = run.architecture.shape, MODELING_FILE.removesuffix(".py")
    window = {"sliding_window": shape.window} if "W" in run.architecture.sequence.letters else {}
    ends = {} if run.tokenizer is None else _ends(run, run.tokenizer)
    return {
        "architectures": ["CompositeForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.CompositeConfig",
            "AutoModel": f"{module}.CompositeModel",
            "AutoModelForCausalLM": f"{module}.CompositeForCausalLM",
        },
        "model_type": "composite",
        "sequence": str(run.architecture.sequence),
        "num_hidden_layers": len(run.architecture.sequence),
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "max_position_embeddings": run.sequence_length,
        "rope_theta": shape.rope_theta,
        **rope_scaling_fields(shape.rope_scaling_factor),
        "rms_norm_eps": shape.norm_epsilon,
        "initializer_range": shape.init_std,
        "tie_word_embeddings": shape.tied_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **window,
        **ends,
    }


def _ends(run: StoredRun, tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the tokens that begin and end a document.

    The first is what the tokenizer itself puts before a text, as Llama's does; else the end of the text before.
    """
    end = tokenizing.end_of_text_id(tokenizer, run.path / "tokenizer.json")
    return {"bos_token_id": next(iter(tokenizer.encode("").ids), end), "eos_token_id": end}


def _write_tokenizer(folder: Path, run: StoredRun, tokenizer: Tokenizer) -> None:
    copy_tokenizer(run.path, folder)
    ends = _ends(run, tokenizer)
    first, last = (tokenizer.id_to_token(number) for number in ends.values())
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": run.sequence_length,
        "bos_token": first,
        "eos_token": last,
        "pad_token": last,
        "padding_side": "left",  # as generation wants it
        "clean_up_tokenization_spaces": False,
    }
    if not (folder / "tokenizer_config.json").exists():
        write_json(folder / "tokenizer_config.json", values)
    write_json(folder / "generation_config.json", ends | {"pad_token_id": ends["eos_token_id"]})


def _modeling_code() -> str:
    return (importlib.resources.files("composer_megatron") / "huggingface/template" / MODELING_FILE).read_text(
        encoding="utf-8"
    )


def _model_card(run: StoredRun) -> str:
    architecture = run.architecture
    kinds = ", ".join(f"{letter}: {PRIMITIVES[letter].name}" for letter in architecture.sequence.counts)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# Composite {architecture.sequence}

{len(architecture.sequence)} blocks ({kinds}) of {architecture.params_total:,} parameters, trained on
sequences of {run.sequence_length} tokens; these are the weights of iteration {run.iteration}.
Only the attention blocks have a decoding cache: {architecture.kv_bytes_per_token():,} bytes a token in bf16.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```
"""
