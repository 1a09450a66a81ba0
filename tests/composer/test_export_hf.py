"""The export: transformers loads it without us and computes the same, with a cache for attention blocks alone."""

import ast
import json
import os
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason='needs pip install "composer-megatron[hf]"')

import safetensors.torch  # noqa: E402
from tokenizers import Tokenizer, processors  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    dynamic_module_utils,
    pipeline,
)

from composer_megatron import export_hf  # noqa: E402
from composer_megatron.architecture import Architecture  # noqa: E402
from composer_megatron.checkpoint import load_run  # noqa: E402
from composer_megatron.errors import FileError, UsageError  # noqa: E402
from composer_megatron.export_hf import MODELING_FILE, export, hf_weights  # noqa: E402
from composer_megatron.generate import generate, generate_tokens  # noqa: E402
from composer_megatron.importing.run import import_run  # noqa: E402
from composer_megatron.primitives import PRIMITIVES  # noqa: E402
from composer_megatron.stored import StoredRun  # noqa: E402

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


def test_bf16_logits_are_as_close_to_the_exact_ones_as_ours(runs, tmp_path):
    """Both round each operation to 8 bits, in different orders: their errors are of one size, not equal."""
    ids, model = tokens(8, 30), load(export(runs["bf16"], tmp_path / "out"))
    with torch.no_grad():
        theirs = model(ids).logits
    assert theirs.dtype == torch.bfloat16
    with load_run(runs["bf16"], dtype=torch.float32) as run, torch.no_grad():
        exact = run.model(ids, torch.arange(30).expand_as(ids), None)
    our_error, their_error = (
        float((found - exact).square().mean().sqrt()) for found in (ours(runs["bf16"], ids), theirs)
    )
    assert 0 < their_error < 1.2 * our_error
    assert their_error < 0.05 * float(exact.std())  # large weights make rounding large; 0.03 here


def test_outputs_as_a_tuple(models):
    ids = tokens()
    loss, logits, *_ = models["plain"](ids, labels=ids, return_dict=False)
    assert torch.equal(logits, models["plain"](ids).logits)
    assert loss.ndim == 0


def test_a_compiled_forward_pass_is_one_graph(models):
    """With masks that are made ahead, as `generate` makes them for static caches on a GPU."""
    ids, settings = tokens(), {"use_cache": False, "position_ids": torch.arange(20).expand(2, -1)}
    mask = torch.ones(20, 20).tril().bool().expand(2, 1, 20, 20)
    compiled = torch.compile(models["plain"], backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(ids, attention_mask=mask, **settings).logits, models["plain"](ids).logits)
    torch.compiler.reset()


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


def test_chat_templates_and_special_tokens_come_along(run_dir, tmp_path):
    """As from an imported instruction model, there and back."""
    tokenizer = AutoTokenizer.from_pretrained(export(run_dir, tmp_path / "bare"), trust_remote_code=True)
    tokenizer.chat_template = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(tmp_path / "bare")
    import_run(tmp_path / "bare", tmp_path / "imported")
    again = AutoTokenizer.from_pretrained(export(tmp_path / "imported", tmp_path / "again"), trust_remote_code=True)
    assert again.apply_chat_template([{"role": "user", "content": "12"}], tokenize=False) == "<user>12"
    assert (again.pad_token, again.eos_token, again.padding_side) == ("!", "<|endoftext|>", "left")


def test_a_beginning_that_the_tokenizer_itself_adds(run_dir, tmp_path):
    """Llama's tokenizers put a token before each text; it is the model's first, not the end of the text before."""
    tokenizer = Tokenizer.from_file(str(run_dir / "tokenizer.json"))
    template = {"single": "! $A", "special_tokens": [("!", tokenizer.token_to_id("!"))]}
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    tokenizer.save(str(run_dir / "tokenizer.json"))
    folder = export(run_dir, tmp_path / "out")
    first = tokenizer.token_to_id("!")
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert (theirs.bos_token, theirs.eos_token) == ("!", "<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (first, 0)
    assert theirs("12")["input_ids"] == [first, *tokenizer.encode("12", add_special_tokens=False).ids]


def test_the_configuration_says_what_the_model_is(runs, exports):
    config = AutoConfig.from_pretrained(exports["pipeline"], trust_remote_code=True)
    shape = Architecture.load(runs["pipeline"] / "architecture.json").shape
    assert (config.sequence, config.blocks, config.num_hidden_layers) == ("1M2A2M1A1M", "MAAMMAM", 7)
    assert config.rope_theta == shape.rope_theta
    assert config.rms_norm_eps == shape.norm_epsilon
    assert config.max_position_embeddings == 32
    assert config.tie_word_embeddings
    assert config.eos_token_id == 0
    with pytest.raises(ValueError, match="sequence='2A4B'; expected counts and the letters A, W and M"):
        type(config)(sequence="2A4B")
    with pytest.raises(ValueError, match="sliding_window=None; 2W4M has W blocks and needs at least 1"):
        type(config)(sequence="2W4M")


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


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit, FileError])
def test_what_ends_early_leaves_nothing_behind(runs, tmp_path, ending):
    """An interrupt, SIGTERM and a full disk, in the middle of the weights."""
    before = signal.getsignal(signal.SIGTERM)

    def end(done, total):
        assert 0 < done < total
        assert [path.name for path in tmp_path.iterdir()] != ["out"]
        if ending is SystemExit:
            signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt if ending is KeyboardInterrupt else OSError(28, "No space left on device")

    with pytest.raises(ending, match=r"143|cannot write .*: No space left|^$"):
        export(runs["plain"], tmp_path / "out", progress=end)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_disk_without_room(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(FileError, match=r"has 0\.0 GB free; the weights need"):
        export(runs["plain"], tmp_path / "out")
    with pytest.raises(FileError, match=r"cannot make .*out: "):
        export(runs["plain"], Path("/proc/nowhere/out"))
    assert not list(tmp_path.iterdir())


def test_memory_holds_no_more_than_two_tensors(runs, tmp_path, monkeypatch):
    read, memory, told = StoredRun.read, [], []

    def watched(run, name):
        assert all(storage.expired() for storage in memory[:-1])  # the last one may be about to go
        tensor = read(run, name)
        memory.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(StoredRun, "read", watched)
    export(runs["plain"], tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    architecture = Architecture.load(runs["plain"] / "architecture.json")
    assert len(memory) == len(told) == 3 + 3 * len(architecture.sequence)  # embedding, final norm, output layer
    assert told == sorted(told)
    assert {total for _, total in told} == {told[-1][0]} == {4 * architecture.params_total}


def test_blocks_without_modelling_code_are_refused_by_name(run_dir, tmp_path):
    values = json.loads((run_dir / "architecture.json").read_text())
    other = sorted(set(PRIMITIVES) - {"A", "W", "M"})
    assert other
    for letter in other:
        (run_dir / "architecture.json").write_text(json.dumps(values | {"sequence": f"2A4M2{letter}"}))
        named = re.escape(
            f"has blocks of {letter} ({PRIMITIVES[letter].name}); Hugging Face models of ours have A, W, M"
        )
        with pytest.raises(UsageError, match=named):
            export(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_that_the_type_cannot_hold(run_dir, tmp_path, monkeypatch):
    read = StoredRun.read
    monkeypatch.setattr(StoredRun, "read", lambda run, name: read(run, name) * 1e6)
    with pytest.raises(FileError, match=r"model\.embed_tokens\.weight holds .*e\+06, more than torch\.float16 can"):
        export(run_dir, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["plain", "tensor", "pipeline", "mlp", "bf16"])
def test_back_again_bit_for_bit(runs, exports, tmp_path, name):
    folder = exports.get(name) or export(runs[name], tmp_path / "out")
    import_run(folder, tmp_path / "run")
    with load_run(runs[name]) as run:
        wanted, length = hf_weights(run.model, run.architecture), run.sequence_length
        text = run.require_tokenizer().to_str()
    with load_run(tmp_path / "run") as run:
        found = hf_weights(run.model, run.architecture)
        assert (run.sequence_length, run.require_tokenizer().to_str()) == (length, text)
    assert found.keys() == wanted.keys()
    assert all(
        torch.equal(found[weight], value) and found[weight].dtype == value.dtype for weight, value in wanted.items()
    )
    kept, original = (Architecture.load(path / "architecture.json") for path in (tmp_path / "run", runs[name]))
    assert (kept, kept.origin) == (original, original.origin)


def test_a_step_of_fine_tuning_saved_and_imported(exports, tmp_path):
    """A step of AdamW lowers the loss; what transformers saves becomes a run of the tuned weights."""
    model, ids = load(exports["pipeline"]).train(), tokens(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(2):
        loss = model(ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path / "tuned")
    source = import_run(tmp_path / "tuned", tmp_path / "run")
    assert source.architecture.origin == {"method": "import", "source": "tuned"}
    with torch.no_grad():
        assert_same(ours(tmp_path / "run", ids), model(ids).logits)


def test_beam_search(models):
    """With as many beams as tokens and two steps, beam search finds the likeliest pair of all."""
    ids = tokens(1, 9)
    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    found = models["plain"].generate(ids, num_beams=300, **settings)[0, 9:].tolist()
    with torch.no_grad():
        first = models["plain"](ids).logits[0, -1].log_softmax(-1)
        extended = torch.cat((ids.expand(300, -1), torch.arange(300)[:, None]), dim=1)
        second = models["plain"](extended).logits[:, -1].log_softmax(-1)
    best = (first[:, None] + second).argmax().item()
    assert found == [best // 300, best % 300]
    without = models["plain"].generate(ids, num_beams=4, use_cache=False, **settings | {"max_new_tokens": 8})
    assert torch.equal(models["plain"].generate(ids, num_beams=4, **settings | {"max_new_tokens": 8}), without)


def test_the_pipeline_continues_text(runs, exports):
    prompts = ["1 Äpfel, ", "24 Äpfel, 12"]
    write = pipeline("text-generation", model=str(exports["plain"]), trust_remote_code=True)
    found = write(prompts, max_new_tokens=6, do_sample=False, return_full_text=False, batch_size=2)
    with load_run(runs["plain"]) as run:
        wanted = generate(run, prompts, max_new_tokens=6)
    assert [texts[0]["generated_text"] for texts in found] == wanted


def test_hidden_states_and_the_body_alone(exports, models):
    ids = tokens()
    with torch.no_grad():
        outputs = models["plain"](ids, output_hidden_states=True)
        states = outputs.hidden_states
        body = AutoModel.from_pretrained(exports["plain"], trust_remote_code=True).eval()(ids)
    assert len(states) == 8
    assert torch.equal(models["plain"].model.embed_tokens(ids), states[0])
    assert torch.equal(models["plain"].lm_head(states[-1]), outputs.logits)
    assert_same(body.last_hidden_state, states[-1])
    assert models["plain"](ids).hidden_states is None


@pytest.mark.parametrize("places", ["auto", "disk"])
def test_a_device_map(exports, models, tmp_path, places):
    """Blocks stay whole; accelerate brings weights from the disk, and moves what a block needs."""
    pytest.importorskip("accelerate", reason="needs pip install accelerate")
    ids = tokens(1, 9)
    if places == "disk":
        names = ["model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.{index}" for index in range(7))]
        places = {name: "disk" if name in ("model.layers.1", "model.layers.4") else "cpu" for name in names}
    model = load(exports["plain"], device_map=places, offload_folder=tmp_path)
    assert set(model._no_split_modules) == {"AttentionBlock", "MLPBlock"}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **settings), models["plain"].generate(ids, **settings))


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
