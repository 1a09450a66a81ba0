"""Sliding-window blocks in an export: the same logits, and a decoding cache that is never longer than the window."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason='needs pip install "composer-megatron[hf]"')

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, dynamic_module_utils  # noqa: E402

from composer_megatron.checkpoint import load_run  # noqa: E402
from composer_megatron.export_hf import export  # noqa: E402
from composer_megatron.importing.run import import_run  # noqa: E402
from composer_megatron.sequence import CompositeSequence  # noqa: E402

torch.set_num_threads(1)

WINDOW = 5
SEQUENCES = {"mixed": "1M1W1A1M2W1M", "windows alone": "2W2M", "window first": "1W1M1A"}
CONFIG = {
    "vocab_size": 89,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large: attention must matter to the logits
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}


@pytest.fixture(scope="module", autouse=True)
def modules_folder(tmp_path_factory):
    """Where transformers copies the modelling code to; by default the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Runs made by surgery from one Llama, and their exports."""
    folder = tmp_path_factory.mktemp("window")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder / "llama")
    made = {}
    for name, sequence in SEQUENCES.items():
        import_run(folder / "llama", folder / name, sequence=CompositeSequence.parse(sequence), window=WINDOW)
        made[name] = (folder / name, export(folder / name, folder / f"{name}-hf"))
    return made


@pytest.fixture(scope="module")
def models(folders):
    return {name: load(folder) for name, (_, folder) in folders.items()}


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def tokens(rows: int = 2, count: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 89, (rows, count), generator=torch.Generator().manual_seed(seed))


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest: both are fp32, and sum in different orders."""
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@torch.no_grad()
def greedy(model, prompt: torch.Tensor, count: int) -> list[int]:
    """Without any cache: the whole sequence again for each token."""
    ids = prompt[None]
    for _ in range(count):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", SEQUENCES)
def test_logits_are_ours_and_the_window_matters(folders, models, name):
    ids = tokens()
    with load_run(folders[name][0]) as run, torch.no_grad():
        wanted = run.model(ids, torch.arange(20).expand_as(ids), None)
    model = models[name]
    with torch.no_grad():
        assert_same(model(ids).logits, wanted)
        blocks = [layer.self_attn for layer in model.model.layers if hasattr(layer, "self_attn")]
        assert {block.window for block in blocks} == {WINDOW, *({None} if "A" in SEQUENCES[name] else ())}
        changed = ids.clone()
        changed[:, 0] = (ids[:, 0] + 1) % 89
        seen_through = WINDOW - 1 if name != "windows alone" else 2 * (WINDOW - 1)  # a window on a window sees further
        same = (model(changed).logits == model(ids).logits).all(-1).all(0)
    if "A" not in SEQUENCES[name]:
        assert same[seen_through + 1 :].all()
    assert not same[: seen_through + 1].any()


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("length", [2, WINDOW, 13])
def test_generation_with_a_cache_is_generation_without(models, name, cache, length):
    prompt = tokens(1, length, seed=length)[0]
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = models[name].generate(prompt[None], **settings, **cache)
    assert found[0, length:].tolist() == greedy(models[name], prompt, 9)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_prompts_padded_on_the_left(models, cache):
    prompts = [tokens(1, length, seed=length)[0] for length in (3, 8, 11)]
    padded = torch.stack([torch.nn.functional.pad(prompt, (11 - len(prompt), 0)) for prompt in prompts])
    mask = torch.tensor([[0] * (11 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = models["mixed"].generate(padded, attention_mask=mask, **settings, **cache)
    for prompt, row in zip(prompts, together, strict=True):
        assert row[11:].tolist() == greedy(models["mixed"], prompt, 8)


@pytest.mark.parametrize("pieces", [(7, 13), (3, 1, 9, 7), (1,) * 20])
def test_a_prompt_may_be_read_in_pieces(models, pieces):
    ids = tokens()
    with torch.no_grad():
        whole, cache, found = models["mixed"](ids).logits, None, []
        for piece in ids.split(pieces, dim=1):
            outputs = models["mixed"](piece, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            found.append(outputs.logits)
    assert_same(torch.cat(found, dim=1), whole)


def test_the_cache_is_bounded_by_the_window(models):
    """Places in the order of the attention blocks: W, A, W, W; the last tokens of a window need no more than these."""
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    outputs = models["mixed"].generate(tokens(1, 13), return_dict_in_generate=True, **settings)
    direct = models["mixed"](tokens(1, 22), use_cache=True)
    for cache in (outputs.past_key_values, direct.past_key_values):
        kept = [layer.keys.shape[2] if layer.is_initialized else 0 for layer in cache.layers]
        assert kept == [WINDOW - 1, 22, WINDOW - 1, WINDOW - 1, 0, 0, 0]


def test_back_again_with_its_window(folders, models, tmp_path):
    models["mixed"].save_pretrained(tmp_path / "saved")
    for source in (folders["mixed"][1], tmp_path / "saved"):
        found = import_run(source, tmp_path / f"{source.name}-run").architecture
        assert (found.sequence.format(), found.shape.window) == ("1M1W1A1M2W1M", WINDOW)
        with load_run(tmp_path / f"{source.name}-run") as run, torch.no_grad():
            logits = run.model(tokens(), torch.arange(20).expand(2, -1), None)
            assert_same(logits, models["mixed"](tokens()).logits)
