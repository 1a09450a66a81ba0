"""The export: transformers loads it without us and computes the same, with a cache for attention blocks alone."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason='needs pip install "composer-megatron[hf]"')

import safetensors.torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils  # noqa: E402

from composer_megatron import export_hf  # noqa: E402
from composer_megatron.architecture import Architecture  # noqa: E402
from composer_megatron.checkpoint import load_run  # noqa: E402
from composer_megatron.errors import FileError, UsageError  # noqa: E402
from composer_megatron.export_hf import MODELING_FILE, export, hf_weights  # noqa: E402
from composer_megatron.generate import generate_tokens  # noqa: E402

torch.set_num_threads(1)

NAMES = ("plain", "pipeline", "mlp")


@pytest.fixture(scope="module", autouse=True)
def modules_folder(tmp_path_factory):
    """Where transformers copies the modelling code to; by default the user's cache."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {name: export(runs[name], folder / name) for name in NAMES}


def assert_same(found: torch.Tensor, wanted: torch.Tensor, **kwargs) -> None:
    """Equal to 1e-5 of the largest value: both are fp32, and sum in different orders (separate or joined matrices)."""
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0, **kwargs)


def load(folder: Path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


@pytest.fixture(scope="module")
def models(exports):
    return {name: load(folder) for name, folder in exports.items()}


def tokens(rows: int = 2, count: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 300, (rows, count), generator=torch.Generator().manual_seed(seed))


def ours(run_dir: Path, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    with load_run(run_dir) as run, torch.no_grad():
        return run.model(ids, torch.arange(ids.shape[1]).expand_as(ids), None, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_loss_are_ours(runs, models, name):
    ids = tokens()
    with torch.no_grad():
        theirs = models[name](ids, labels=ids)
    logits = ours(runs[name], ids)
    assert_same(theirs.logits, logits)
    assert logits.std() > 0.5  # not a comparison of nothing
    losses = ours(runs[name], ids[:, :-1], labels=ids[:, 1:].contiguous())
    assert_same(theirs.loss, losses.mean())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cache", [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generation_is_ours(runs, models, name, cache):
    ids = tokens(1, 9)
    found = models[name].generate(
        ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None, **cache
    )
    with load_run(runs[name]) as run:
        wanted = generate_tokens(run.model, ids[0].tolist(), max_new_tokens=12)
    assert found[0, 9:].tolist() == wanted


def test_only_attention_blocks_have_a_cache(models, runs):
    ids = tokens(1, 9)
    architecture = Architecture.load(runs["plain"] / "architecture.json")
    caches = [
        models["plain"](ids, use_cache=True).past_key_values,
        models["plain"].generate(ids, max_new_tokens=1, return_dict_in_generate=True, do_sample=False).past_key_values,
    ]
    for cache in caches:
        filled = [layer for layer in cache.layers if layer.is_initialized]
        assert len(filled) == 3
        elements = sum(layer.keys.numel() + layer.values.numel() for layer in filled)
        assert elements * 2 == 9 * architecture.kv_bytes_per_token()
    assert models["plain"](ids, use_cache=False).past_key_values is None


def test_a_prompt_may_be_read_in_pieces(models):
    ids = tokens(2, 20)
    with torch.no_grad():
        whole = models["plain"](ids).logits
        first = models["plain"](ids[:, :7])
        second = models["plain"](ids[:, 7:], past_key_values=first.past_key_values)
    assert_same(torch.cat((first.logits, second.logits), dim=1), whole)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_prompts_padded_on_the_left(models, cache):
    prompts = [tokens(1, length, seed=length)[0] for length in (3, 9)]
    padded = torch.stack([torch.nn.functional.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    mask = torch.tensor([[0] * 6 + [1] * 3, [1] * 9])
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None} | cache
    together = models["plain"].generate(padded, attention_mask=mask, **settings)
    for prompt, row in zip(prompts, together, strict=True):
        alone = models["plain"].generate(prompt[None], **settings)
        assert row[9:].tolist() == alone[0, len(prompt) :].tolist()


def test_padding_on_the_right_does_not_show(models):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad():
        found = models["plain"](ids, attention_mask=mask).logits
        wanted = models["plain"](ids[:1, :5]).logits
    assert_same(found[:1, :5], wanted)
    assert found.isfinite().all()


def test_logits_for_the_last_tokens_alone(models):
    ids = tokens()
    with torch.no_grad():
        whole = models["plain"](ids).logits
        last = models["plain"](ids, logits_to_keep=3).logits
        chosen = models["plain"](ids, logits_to_keep=torch.tensor([1, 4])).logits
    assert_same(last, whole[:, -3:])
    assert_same(chosen, whole[:, [1, 4]])


def test_gradient_checkpointing_changes_no_gradient(exports):
    ids = tokens()
    gradients = []
    for checkpointing in (False, True):
        model = load(exports["pipeline"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        assert_same(gradients[1][name], gradient, msg=name)


def test_the_tokenizer_is_ours(runs, exports):
    theirs = AutoTokenizer.from_pretrained(exports["plain"], trust_remote_code=True)
    with load_run(runs["plain"]) as run:
        tokenizer = run.require_tokenizer()
        for text in ("12 Äpfel, 24", " a  b\n\n\tc", "日本語", ""):
            assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
            assert theirs.decode(theirs(text)["input_ids"]) == text
        assert theirs.eos_token_id == theirs.bos_token_id == run.end_of_text
    assert theirs.model_max_length == 32


def test_the_configuration_says_what_the_model_is(runs, exports):
    config = AutoConfig.from_pretrained(exports["pipeline"], trust_remote_code=True)
    shape = Architecture.load(runs["pipeline"] / "architecture.json").shape
    assert (config.sequence, config.blocks, config.num_hidden_layers) == ("1M2A2M1A1M", "MAAMMAM", 7)
    assert config.rope_theta == shape.rope_theta
    assert config.rms_norm_eps == shape.norm_epsilon
    assert config.max_position_embeddings == 32
    assert config.tie_word_embeddings
    assert config.eos_token_id == 0
    with pytest.raises(ValueError, match="sequence='2A4B'; expected counts and the letters A and M"):
        type(config)(sequence="2A4B")


def test_parameters_are_all_there_and_no_more(runs, models):
    for name, model in models.items():
        architecture = Architecture.load(runs[name] / "architecture.json")
        assert sum(parameter.numel() for parameter in model.parameters()) == architecture.params_total
        with load_run(runs[name]) as run:
            weights = hf_weights(run.model, architecture)
        assert sum(map(torch.numel, weights.values())) == architecture.params_total
        assert weights.keys() == dict(model.named_parameters()).keys()


def test_saving_and_loading_again(models, exports, tmp_path):
    """As after fine-tuning: the saved folder carries the code along."""
    models["pipeline"].save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, models["pipeline"](ids).logits)
    assert (tmp_path / "again" / MODELING_FILE).read_text() == (exports["pipeline"] / MODELING_FILE).read_text()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_the_type_of_the_weights(runs, tmp_path, dtype):
    """The run was saved in bf16."""
    folder = export(runs["bf16"], tmp_path / "out", dtype=dtype)
    wanted = dtype or torch.bfloat16
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {wanted}
    model = load(folder, dtype="auto")
    assert model.dtype == wanted
    with load_run(runs["bf16"]) as run:
        for name, value in hf_weights(run.model, run.architecture).items():
            # Weights of about 0.4 need no range beyond fp16's, but its smallest numbers are coarser than bf16's.
            torch.testing.assert_close(weights[name].float(), value.float(), atol=6e-8, rtol=0)


def test_weights_in_several_files(runs, models, tmp_path):
    folder = export(runs["plain"], tmp_path / "out", shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert {file.name for file in files} == set(index["weight_map"].values())
    places = {name: file.name for file in files for name in safetensors.torch.load_file(file)}
    assert places == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in models["plain"].parameters())
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(load(folder)(ids).logits, models["plain"](ids).logits)


def test_the_modelling_code_stands_alone(exports):
    tree = ast.parse((exports["plain"] / MODELING_FILE).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - sys.stdlib_module_names == {"torch", "transformers"}


def test_what_an_export_holds(exports, runs):
    assert {file.name for file in exports["plain"].iterdir()} == {
        "README.md",
        "architecture.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        MODELING_FILE,
        "tokenizer.json",
        "tokenizer_config.json",
    }
    kept = Architecture.load(exports["plain"] / "architecture.json")
    assert kept == Architecture.load(runs["plain"] / "architecture.json")
    assert exports["plain"].stat().st_mode & 0o777 == 0o755


def test_a_run_without_a_tokenizer(run_dir, tmp_path):
    (run_dir / "tokenizer.json").unlink()
    folder = export(run_dir, tmp_path / "out")
    assert not list(folder.glob("tokenizer*"))
    ids = tokens()
    with torch.no_grad():
        assert_same(load(folder)(ids).logits, ours(run_dir, ids))


@pytest.mark.parametrize("there", ["folder", "file", "dangling link"])
def test_nothing_is_overwritten(runs, tmp_path, there):
    output = tmp_path / "out"
    if there == "folder":
        output.mkdir()
    elif there == "file":
        output.write_text("mine")
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="out exists; nothing is overwritten"):
        export(runs["plain"], output)
    assert list(tmp_path.iterdir()) == [output]


def test_a_failure_leaves_nothing_behind(runs, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(
        FileError, match=r"cannot write .*model\.safetensors: No space left on device; is the disk full"
    ):
        export(runs["plain"], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileError, match=r"cannot make .*out: "):
        export(runs["plain"], Path("/proc/nowhere/out"))


def test_wrong_requests(runs, tmp_path):
    with pytest.raises(UsageError, match=r"dtype=torch\.int8; expected one of torch\.float32, torch\.bfloat16"):
        export(runs["plain"], tmp_path / "out", dtype=torch.int8)
    with pytest.raises(FileError, match="iter_0000003 is missing; name one of the complete iterations: 7"):
        export(runs["plain"], tmp_path / "out", 3)
    with pytest.raises(FileError, match="is no folder: expected the folder of a training run"):
        export(tmp_path / "nothing", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_code_is_part_of_the_package():
    assert export_hf._modeling_code().startswith('"""A Composite language model')
