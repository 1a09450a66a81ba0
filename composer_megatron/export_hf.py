"""Export a trained run to Hugging Face transformers: safetensors, configuration, modelling code and tokenizer.

The folder loads with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` and needs nothing of ours
or Megatron's. Its code is `composer_megatron/hf_template/modeling_composite.py`, copied as it is.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from composer_megatron.architecture import Architecture
from composer_megatron.checkpoint import LoadedRun, load_run
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import naming, write_json, write_text

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
) -> Path:
    """Write a run as a transformers model. The folder appears whole or not at all.

    Args:
        run_dir: A run, as for `load_run`.
        output_dir: The folder to make.
        iteration: Which checkpoint; None for the newest.
        dtype: Type of the weights; None for the type in which they were saved.
        shard_bytes: Size of a file of weights, unless a single weight is larger.

    Returns:
        `output_dir`.

    Raises:
        UsageError: If `output_dir` exists, or the type is none of fp32, bf16 and fp16.
        FileError: If the run cannot be loaded, or the folder cannot be written.
        ComposerError: If safetensors is not installed.
    """
    output_dir = Path(os.path.abspath(output_dir))  # noqa: PTH100 - resolve() would replace a link instead of following it
    if os.path.lexists(output_dir):
        raise UsageError(f"{output_dir} exists; nothing is overwritten: choose another folder, or remove it")
    if dtype not in (None, *_DTYPES):
        raise UsageError(f"dtype={dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    _check_safetensors()
    with load_run(run_dir, iteration, dtype=dtype) as run, _new_folder(output_dir) as folder:
        weights = hf_weights(run.model, run.architecture)
        write_json(folder / "config.json", hf_config(run))
        write_text(folder / MODELING_FILE, _modeling_code())
        write_text(folder / "README.md", _model_card(run))
        run.architecture.save(folder / "architecture.json")
        if run.tokenizer is not None:
            _write_tokenizer(folder, run, run.tokenizer)
        _write_weights(folder, weights, shard_bytes)
    return output_dir


def hf_weights(model: HybridModel, architecture: Architecture) -> dict[str, Tensor]:
    """The model's parameters by their names in `modeling_composite.py`.

    Megatron keeps query, key and value in one matrix, group by group, each group's query heads before its key and its
    value head; and gate and up in one, gate first. A tied output layer is left out.
    """
    parameters = dict(model.named_parameters())
    weights = {"model.embed_tokens.weight": parameters["embedding.word_embeddings.weight"]}
    for index, letter in enumerate(architecture.sequence):
        ours, theirs = f"decoder.layers.{index}.", f"model.layers.{index}."
        block = {name.removeprefix(ours): value for name, value in parameters.items() if name.startswith(ours)}
        translated = _attention_weights(block, architecture) if letter == "A" else _mlp_weights(block)
        weights |= {theirs + name: value for name, value in translated.items()}
    weights["model.norm.weight"] = parameters["decoder.final_norm.weight"]
    if not architecture.shape.tied_embeddings:
        weights["lm_head.weight"] = parameters["output_layer.weight"]
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def _attention_weights(block: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    shape = architecture.shape
    queries = shape.num_attention_heads // shape.num_query_groups
    grouped = block["self_attention.linear_qkv.weight"].unflatten(0, (shape.num_query_groups, queries + 2, -1))
    query, key, value = (part.flatten(0, 2) for part in grouped.split((queries, 1, 1), dim=1))
    return {
        "norm.weight": block["input_layernorm.weight"],
        "self_attn.q_proj.weight": query,
        "self_attn.k_proj.weight": key,
        "self_attn.v_proj.weight": value,
        "self_attn.o_proj.weight": block["self_attention.linear_proj.weight"],
    }


def _mlp_weights(block: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gate, up = block["mlp.linear_fc1.weight"].chunk(2)
    return {
        "norm.weight": block["pre_mlp_layernorm.weight"],
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": block["mlp.linear_fc2.weight"],
    }


def hf_config(run: LoadedRun) -> dict[str, Any]:
    """The content of ``config.json``: the fields of `CompositeConfig`, and where its code is."""
    shape, module = run.architecture.shape, MODELING_FILE.removesuffix(".py")
    ends = {} if run.tokenizer is None else {"bos_token_id": run.end_of_text, "eos_token_id": run.end_of_text}
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
        "rms_norm_eps": shape.norm_epsilon,
        "initializer_range": shape.init_std,
        "tie_word_embeddings": shape.tied_embeddings,
        "dtype": str(next(run.model.parameters()).dtype).removeprefix("torch."),
        "use_cache": True,
        **ends,
    }


def _write_tokenizer(folder: Path, run: LoadedRun, tokenizer: Tokenizer) -> None:
    source = run.path / "tokenizer.json"
    with naming(source, "read"):
        write_text(folder / "tokenizer.json", source.read_text(encoding="utf-8"))
    end_of_text = tokenizer.id_to_token(run.end_of_text)
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": run.sequence_length,
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", values)
    ends = {"bos_token_id": run.end_of_text, "eos_token_id": run.end_of_text, "pad_token_id": run.end_of_text}
    write_json(folder / "generation_config.json", ends)


def _write_weights(folder: Path, weights: Mapping[str, Tensor], shard_bytes: int) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    for name, value in weights.items():
        if shards[-1] and sum(map(_bytes, shards[-1].values())) + _bytes(value) > shard_bytes:
            shards.append({})
        shards[-1][name] = value
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise FileError(f"cannot write {folder / name}: {error}; is the disk full?") from error
    if len(shards) > 1:
        places = {weight: name for name, shard in zip(names, shards, strict=True) for weight in shard}
        total = sum(map(_bytes, weights.values()))
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _modeling_code() -> str:
    return (importlib.resources.files("composer_megatron") / "hf_template" / MODELING_FILE).read_text(encoding="utf-8")


def _model_card(run: LoadedRun) -> str:
    architecture = run.architecture
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# Composite {architecture.sequence}

{len(architecture.sequence)} blocks (A: grouped-query attention, M: SwiGLU MLP) of {architecture.params_total:,}
parameters, trained on sequences of {run.sequence_length} tokens; these are the weights of iteration {run.iteration}.
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


def _check_safetensors() -> None:
    try:
        import safetensors.torch  # noqa: F401
    except ModuleNotFoundError:
        raise ComposerError('safetensors is not installed: pip install "composer-megatron[train]"') from None


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to fill, renamed to `output` at the end and removed on failure."""
    with naming(output, "make"):
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".partial"))
    try:
        with naming(output, "write"):
            yield partial
            partial.chmod(0o755)
            partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
