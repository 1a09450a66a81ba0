"""Llama 3's scaling of rotary embeddings: transformers' numbers, wherever a model is built, run, trained or moved."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from composer_megatron import cpu

cpu.skip_compilation()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason='needs pip install "composer-megatron[hf]"')

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, dynamic_module_utils  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from composer_megatron.architecture import Architecture  # noqa: E402
from composer_megatron.arguments import given_flags  # noqa: E402
from composer_megatron.checkpoint import load_run  # noqa: E402
from composer_megatron.errors import FileError, UsageError  # noqa: E402
from composer_megatron.export_hf import export  # noqa: E402
from composer_megatron.generate import generate_tokens  # noqa: E402
from composer_megatron.importing.run import import_run  # noqa: E402
from composer_megatron.model import build_model  # noqa: E402
from composer_megatron.rotary import inverse_frequencies  # noqa: E402
from composer_megatron.script_flags import as_arguments, script_flags  # noqa: E402
from composer_megatron.sequence import CompositeSequence  # noqa: E402
from composer_megatron.shape import PRESETS  # noqa: E402

torch.set_num_threads(1)

SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,  # Llama 3.2 1B's: pairs of all speeds
    "max_position_embeddings": 131_072,
    "initializer_range": 0.3,  # large: attention must matter to the logits
    "rope_parameters": SCALING,
}
LENGTH = 400
"""Long enough for pairs that the rule slows down to turn by a radian: those of less than 4 turns in 8,192 positions."""


def config(theta: float, head_dim: int, factor: float) -> LlamaConfig:
    return LlamaConfig(
        **TINY | {"head_dim": head_dim, "rope_parameters": SCALING | {"rope_theta": theta, "factor": factor}}
    )


@pytest.mark.parametrize(("theta", "head_dim", "factor"), [(500_000, 64, 32.0), (500_000, 128, 8.0), (100, 12, 8.0)])
def test_frequencies_are_those_of_transformers_to_the_bit(theta, head_dim, factor):
    wanted, scale = ROPE_INIT_FUNCTIONS["llama3"](config(theta, head_dim, factor), "cpu")
    found = inverse_frequencies(head_dim, theta, factor)
    assert torch.equal(found, wanted)
    assert scale == 1
    plain = inverse_frequencies(head_dim, theta)
    assert torch.equal(plain, RotaryEmbedding(head_dim, 1.0, rotary_base=theta, use_cpu_initialization=True).inv_freq)
    turns = 8192 * plain / (2 * torch.pi)
    assert torch.equal(found[turns >= 4], plain[turns >= 4])
    assert torch.equal(found[turns <= 1], plain[turns <= 1] / factor)
    between = (turns > 1) & (turns < 4)
    assert (found[between] < plain[between]).all()
    assert (found[between] > plain[between] / factor).all()
    assert not between.any() if theta == 100 else between.any()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[LlamaForCausalLM, Path, Path]:
    """A random Llama 3.2 in miniature, its folder, and the run that it was imported to."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    model.save_pretrained(folder / "hf")
    import_run(folder / "hf", folder / "run")
    return model, folder / "hf", folder / "run"


def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def logits(run_dir: Path) -> torch.Tensor:
    with load_run(run_dir) as run, torch.no_grad():
        return run.model(tokens(), torch.arange(LENGTH)[None], None)


def theirs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest value: both are fp32, and sum in different orders."""
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


def test_an_imported_llama_has_the_logits_of_transformers(llama, tmp_path):
    model, hf, run = llama
    architecture = Architecture.load(run / "architecture.json")
    assert architecture.shape.rope_scaling_factor == 32
    assert architecture.origin == {"method": "import", "source": "hf"}
    wanted = theirs(model)
    assert_same(logits(run), wanted)
    import_run(hf, tmp_path / "plain", drop_rope_scaling=True)
    assert (logits(tmp_path / "plain") - wanted).abs().max() > 0.1 * wanted.abs().max()  # the scaling matters here


def test_a_configuration_in_the_words_of_transformers_4(llama, tmp_path):
    _, hf, _ = llama
    values = json.loads((hf / "config.json").read_text())
    del values["rope_parameters"]
    old = {name: value for name, value in SCALING.items() if name != "rope_theta"}
    (tmp_path / "hf").mkdir()
    for file in hf.iterdir():
        (tmp_path / "hf" / file.name).symlink_to(file)
    (tmp_path / "hf/config.json").unlink()
    (tmp_path / "hf/config.json").write_text(json.dumps(values | {"rope_theta": 500_000.0, "rope_scaling": old}))
    found = import_run(tmp_path / "hf", tmp_path / "run").architecture
    assert (found.shape.rope_scaling_factor, found.shape.rope_theta) == (32, 500_000)


def test_an_export_has_them_and_comes_back(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model, _, run = llama
    folder = export(run, tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert_same(theirs(exported), theirs(model))
    exported.save_pretrained(tmp_path / "tuned")
    known = Architecture.load(run / "architecture.json")
    for name in ("hf", "tuned"):
        again = import_run(tmp_path / name, tmp_path / f"{name}-run").architecture
        assert dataclasses.replace(again.shape, name=known.shape.name) == known.shape
    assert torch.equal(logits(tmp_path / "tuned-run"), logits(run))
    with pytest.raises(ValueError, match="rope_type='yarn'; expected llama3"):
        type(exported.config)(rope_scaling={"rope_type": "yarn"})
    values = json.loads((folder / "config.json").read_text())
    values["rope_scaling"]["low_freq_factor"] = 2.0
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(FileError, match=r"low_freq_factor=2\.0 \(rope_scaling\); only 1\.0 can be imported exactly"):
        import_run(folder, tmp_path / "other")


def test_generation_equals_the_full_pass(llama):
    prompt = tokens()[0].tolist()
    with load_run(llama[2]) as run, torch.no_grad():
        continuation = generate_tokens(run.model, prompt, max_new_tokens=8)
        whole = torch.tensor([prompt + continuation])
        wanted = run.model(whole, torch.arange(whole.shape[1])[None], None)[0, LENGTH - 1 : -1].argmax(-1).tolist()
    assert continuation == wanted
    assert len(set(continuation)) > 3


# Weights so large that attention matters to the loss; attention on both stages of a pipeline.
SCALED = dataclasses.replace(
    PRESETS["tiny"],
    hidden_size=32,
    ffn_hidden_size=64,
    num_query_groups=2,
    head_dim=32,
    vocab_size=256,
    init_std=0.3,
    rope_scaling_factor=32.0,
)
ARCHITECTURE = Architecture(CompositeSequence.parse("2A3M1A"), SCALED)
PLAIN = dataclasses.replace(ARCHITECTURE, shape=dataclasses.replace(SCALED, rope_scaling_factor=1.0))


def test_every_rotary_embedding_of_a_model_is_scaled():
    """That of latent attention is in its layers."""
    for letters, width in (("AM", 32), ("LM", SCALED.latent_widths.rope_dim)):
        model = build_model(Architecture(CompositeSequence(letters), SCALED), max_sequence_length=8, meta=True)
        found = [module.inv_freq for module in model.modules() if isinstance(module, RotaryEmbedding)]
        assert len(found) == 1
        assert torch.equal(found[0], inverse_frequencies(width, SCALED.rope_theta, 32.0))


def test_training_in_a_pipeline_keeps_it(place):
    """Two processes have the losses of one, which are not those without the scaling; the checkpoint loads with it."""
    flags = {"--seq-length": 256, "--train-iters": 2, "--micro-batch-size": 1, "--global-batch-size": 2}
    flags |= {"--eval-iters": 0}
    losses = {}
    for name, architecture, processes in (("plain", PLAIN, 1), ("one", ARCHITECTURE, 1), ("two", ARCHITECTURE, 2)):
        architecture.save(place.path / f"rotary-{name}.json")
        flags |= {"--pipeline-model-parallel-size": processes, "--architecture": place.path / f"rotary-{name}.json"}
        words = (str(word) for pair in flags.items() for word in pair)
        run = place.run(f"rotary-{name}", *words, processes=processes)
        assert run.status == 0, run.output
        losses[name] = list(run.scalars("lm loss").values())
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5, abs=0)
    assert abs(losses["plain"][0] / losses["one"][0] - 1) > 1e-4  # ten times what rounding may
    (place.path / "rotary-two/tokenizer.json").unlink()  # which is none
    with load_run(place.path / "rotary-two") as run:
        assert torch.equal(run.model.rotary_pos_emb.inv_freq, inverse_frequencies(32, 500_000, 32.0))
    saved = place.path / "rotary-two/architecture.json"
    PLAIN.save(saved)
    with pytest.raises(FileError, match=r"use_rope_scaling=True \(here False\)"), load_run(saved.parent):
        pass


def test_flags_of_megatrons_scripts():
    with pytest.raises(UsageError, match=r"scaled by 32: Megatron's HybridModel cannot; use composer_megatron\.train"):
        script_flags(ARCHITECTURE, "hybrid")
    latent = dataclasses.replace(ARCHITECTURE, sequence=CompositeSequence("LM"))
    with pytest.raises(UsageError, match=r"scaled by 32: Megatron's latent attention \(L\) cannot"):
        script_flags(latent, "gpt")
    given = given_flags(as_arguments(script_flags(ARCHITECTURE, "gpt")))
    assert (given["use_rope_scaling"], given["rope_scaling_factor"]) == (True, 32.0)
    assert "use_rope_scaling" not in given_flags(as_arguments(script_flags(PLAIN, "hybrid")))
