"""A Llama of transformers' becomes a run that computes the same; whatever would not is refused by name."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason='needs pip install "composer-megatron[hf]"')

from safetensors.torch import load_file, save_file  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from composer_megatron.architecture import Architecture  # noqa: E402
from composer_megatron.checkpoint import load_run  # noqa: E402
from composer_megatron.errors import FileError, UsageError  # noqa: E402
from composer_megatron.export_hf import hf_weights  # noqa: E402
from composer_megatron.generate import generate_tokens  # noqa: E402
from composer_megatron.importing.conversion import write_run  # noqa: E402
from composer_megatron.importing.llama import open_llama  # noqa: E402
from composer_megatron.importing.run import import_run, open_source  # noqa: E402

torch.set_num_threads(1)

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,  # not hidden_size / heads
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "initializer_range": 0.3,  # large: attention must matter to the logits
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
VARIANTS = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "one key head": {"num_key_value_heads": 1},
    "a key for each query": {"num_key_value_heads": 6, "num_hidden_layers": 1},
}


def llama(folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **changes) -> LlamaForCausalLM:
    """A random Llama, saved to `folder` by transformers; norms are not all ones."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    llama(tmp_path / "hf")
    return tmp_path / "hf"


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in (config | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    weights = load_file(folder / "model.safetensors") | changes
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "model.safetensors")


def logits(run_dir: Path, ids: torch.Tensor) -> torch.Tensor:
    with load_run(run_dir) as run, torch.no_grad():
        return run.model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


def tokens(count: int = 20) -> torch.Tensor:
    return torch.randint(0, 97, (2, count), generator=torch.Generator().manual_seed(1))


def assert_same_logits(run_dir: Path, model: LlamaForCausalLM) -> None:
    """Equal to 1e-5 of the largest: both are fp32, and sum in different orders (separate or joined matrices)."""
    with torch.no_grad():
        wanted = model(tokens()).logits
    assert wanted.std() > 0.5  # not a comparison of nothing
    torch.testing.assert_close(logits(run_dir, tokens()), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, changes):
    model = llama(tmp_path / "hf", **changes)
    imported = import_run(tmp_path / "hf", tmp_path / "run").architecture
    assert imported.sequence.letters == "AM" * model.config.num_hidden_layers
    assert imported == imported.baseline() == Architecture.load(tmp_path / "run/architecture.json")
    assert imported.params_total == sum(parameter.numel() for parameter in model.parameters())
    assert_same_logits(tmp_path / "run", model)


def test_a_model_in_several_files_and_in_the_words_of_transformers_4(tmp_path):
    model = llama(tmp_path / "hf", shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    change_config(tmp_path / "hf", rope_parameters="absent", rope_theta=100.0, rope_scaling=None, head_dim=12)
    import_run(tmp_path / "hf", tmp_path / "run")
    assert_same_logits(tmp_path / "run", model)


@pytest.mark.parametrize("files", [1, 3])
def test_a_model_saved_as_bin(tmp_path, files):
    """PyTorch's older files, one or several; weights that share memory, as tied ones do, are not doubled."""
    model = llama(tmp_path / "hf", tie_word_embeddings=True)
    (tmp_path / "hf/model.safetensors").unlink()
    weights = list(model.state_dict().items())
    names = ["pytorch_model.bin"] if files == 1 else [f"pytorch_model-{n}-of-{files}.bin" for n in range(files)]
    for number, name in enumerate(names):
        torch.save(dict(weights[number::files]), tmp_path / "hf" / name)
    if files > 1:
        places = {weight: names[index % files] for index, (weight, _) in enumerate(weights)}
        (tmp_path / "hf/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    import_run(tmp_path / "hf", tmp_path / "run")
    assert_same_logits(tmp_path / "run", model)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["code", "cut", "no table"])
def test_a_bin_that_is_none(folder, tmp_path, damage):
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"model.norm.weight": Evil(tmp_path / "ran")} if damage == "code" else torch.ones(3), path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FileError, match=r"pytorch_model\.bin"):
        import_run(folder, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_lost_file_of_several(tmp_path):
    llama(tmp_path / "hf", shard_size="40KB")
    lost = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileError, match=rf"{lost.name} is missing, a part of the model's weights; download it again"):
        import_run(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bf16_weights_come_over_and_go_back_bit_for_bit(tmp_path):
    model = llama(tmp_path / "hf", dtype=torch.bfloat16)
    assert import_run(tmp_path / "hf", tmp_path / "run").dtype == torch.bfloat16
    stored = load_file(tmp_path / "hf/model.safetensors")
    with load_run(tmp_path / "run") as run:
        exported = hf_weights(run.model, run.architecture)
    assert len(exported) == len(stored)
    for layer in range(model.config.num_hidden_layers):
        for block, modules in enumerate(("self_attn", "mlp")):
            prefix = f"model.layers.{2 * layer + block}."
            norm = ("input_layernorm", "post_attention_layernorm")[block]
            stored[f"{prefix}there.norm.weight"] = stored.pop(f"model.layers.{layer}.{norm}.weight")
            for name in [name for name in stored if name.startswith(f"model.layers.{layer}.{modules}")]:
                stored[prefix + "there." + name.removeprefix(f"model.layers.{layer}.")] = stored.pop(name)
    renamed = {name.replace("there.", ""): value for name, value in stored.items()}
    assert renamed.keys() == exported.keys()
    assert all(torch.equal(value, exported[name]) for name, value in renamed.items())


def test_it_generates_what_transformers_generates(tmp_path):
    model = llama(tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "run")
    prompt = tokens(9)[:1]
    wanted = model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None)
    with load_run(tmp_path / "run") as run:
        assert (run.iteration, run.sequence_length) == (0, 64)
        assert generate_tokens(run.model, prompt[0].tolist(), max_new_tokens=12) == wanted[0, 9:].tolist()
    assert not torch.distributed.is_initialized()


def test_memory_holds_no_more_than_two_tensors(folder, tmp_path):
    source = open_llama(folder)
    memory: list[StorageWeakRef] = []

    def watched(read):
        def call():
            assert all(storage.expired() for storage in memory[:-1])  # the last one may be about to go
            tensor = read()
            memory.append(StorageWeakRef(tensor.untyped_storage()))
            return tensor

        return call

    write_run(replace(source, tensors={name: watched(read) for name, read in source.tensors.items()}), tmp_path / "run")
    assert len(memory) == len(source.tensors)


def test_the_tokenizer_comes_along(folder, text_folder, tmp_path):
    shutil.copy(text_folder / "tokenizer.json", folder)  # of 290 ids
    with pytest.raises(FileError, match=r"tokenizer.json has \d+ token ids, the model only 97 embeddings"):
        import_run(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    llama(tmp_path / "large", vocab_size=300)
    shutil.copy(text_folder / "tokenizer.json", tmp_path / "large")
    import_run(tmp_path / "large", tmp_path / "run")
    with load_run(tmp_path / "run") as run:
        assert run.require_tokenizer().token_to_id("<|endoftext|>") == run.end_of_text


REFUSED = {
    "model_type='qwen2'": {"model_type": "qwen2"},
    "model_type=None": {"model_type": "absent"},
    "hidden_act='gelu'": {"hidden_act": "gelu"},
    "attention_bias=True": {"attention_bias": True},
    "mlp_bias=True": {"mlp_bias": True},
    "quantization_config=": {"quantization_config": {"bits": 4}},
    "low_freq_factor=2.0 (rope_scaling); only 1.0": {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}},
    "high_freq_factor=8 (rope_scaling); only 4.0": {"rope_parameters": LLAMA3 | {"high_freq_factor": 8}},
    "original_max_position_embeddings=4096 (rope_scaling); only 8192": {
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 4096}
    },
    "factor=0.5 (rope_scaling); expected a number of at least 1": {"rope_parameters": LLAMA3 | {"factor": 0.5}},
    "factor=None (rope_scaling)": {"rope_parameters": LLAMA3 | {"factor": None}},
    "rotary embedding of type 'yarn' (rope_scaling)": {"rope_parameters": LLAMA3 | {"rope_type": "yarn"}},
    "rotary embedding of type 'linear' (rope_scaling)": {
        "rope_parameters": "absent",
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "partial_rotary_factor=0.5": {"partial_rotary_factor": 0.5},
    "rope_theta=100.5": {"rope_parameters": {"rope_theta": 100.5}},
    "hidden_size=None": {"hidden_size": "absent"},
    "num_hidden_layers='3'": {"num_hidden_layers": "3"},
    "intermediate_size=0": {"intermediate_size": 0},
    "num_query_groups=4": {"num_key_value_heads": 4},
    "model.embed_tokens.weight is (97, 48); config.json makes it (96, 48)": {"vocab_size": 96},
    "model.layers.3.input_layernorm.weight is missing": {"num_hidden_layers": 4},
    "model.layers.2.input_layernorm.weight is no tensor of a Llama": {"num_hidden_layers": 2},
}


@pytest.mark.parametrize(("named", "changes"), REFUSED.items(), ids=REFUSED)
def test_what_would_not_be_exact_is_refused_by_name(folder, tmp_path, named, changes):
    change_config(folder, **changes)
    with pytest.raises((FileError, UsageError)) as refused:
        import_run(folder, tmp_path / "run")
    assert named in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_scaled_rotary_embeddings_may_be_dropped_and_it_is_said(tmp_path):
    """What is left is the same Llama with a plain rotary embedding; numbers that are not Llama 3's do not matter."""
    scaled = llama(tmp_path / "hf", rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32})
    found = import_run(tmp_path / "hf", tmp_path / "run", drop_rope_scaling=True).architecture
    assert found.origin == {"method": "import", "source": "hf", "dropped": "rope_scaling llama3"}
    plain = llama(tmp_path / "plain")
    assert_same_logits(tmp_path / "run", plain)
    with torch.no_grad():
        assert not torch.allclose(plain(tokens()).logits, scaled(tokens()).logits, atol=0.1)


def test_tensors_that_are_missing_or_more(folder, tmp_path):
    change_weights(folder, {"lm_head.weight": None, "model.layers.0.self_attn.q_norm.weight": torch.ones(12)})
    with pytest.raises(FileError, match=r"lm_head.weight is missing; model.layers.0.self_attn.q_norm.weight is no"):
        import_run(folder, tmp_path / "run")


def test_what_older_files_hold_beside_the_weights_is_left_out(tmp_path):
    model = llama(tmp_path / "hf", tie_word_embeddings=True)
    constants = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    change_weights(tmp_path / "hf", {**constants, "lm_head.weight": model.lm_head.weight.detach().clone()})
    import_run(tmp_path / "hf", tmp_path / "run")
    assert_same_logits(tmp_path / "run", model)


@pytest.mark.parametrize("damage", ["cut", "garbage", "integers"])
def test_damaged_weights(folder, tmp_path, damage):
    path = folder / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "garbage":
        path.write_bytes(b"not safetensors at all")
    else:
        change_weights(folder, {"model.norm.weight": torch.ones(48, dtype=torch.int32)})
    with pytest.raises(FileError, match=r"model\.safetensors"):
        import_run(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_folders_that_are_no_models(folder, tmp_path):
    with pytest.raises(FileError, match="is no folder"):
        open_source(tmp_path / "absent")
    with pytest.raises(FileError, match=r"holds neither config\.json"):
        open_source(tmp_path)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(FileError, match=r"neither model\.safetensors nor pytorch_model\.bin, and no index"):
        open_source(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "lost.safetensors"}}))
    with pytest.raises(FileError, match=r"lost\.safetensors is missing, a part of the model's weights"):
        open_source(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(FileError, match="is not a Hugging Face configuration"):
        open_source(folder)


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(folder, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="run exists; nothing is overwritten"):
        import_run(folder, tmp_path / "run")
    source = open_llama(folder)

    def fails() -> torch.Tensor:
        raise FileError("the disk went away")

    broken = replace(source, tensors={**source.tensors, "decoder.final_norm.weight": fails})
    with pytest.raises(FileError, match="the disk went away"):
        write_run(broken, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
    assert not torch.distributed.is_initialized()
