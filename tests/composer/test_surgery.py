"""Surgery: a grafted model computes what the same blocks of transformers' Llama compute in the new order."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason='needs pip install "composer-megatron[hf]"')

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from composer_megatron import cli  # noqa: E402
from composer_megatron.architecture import Architecture  # noqa: E402
from composer_megatron.checkpoint import load_run  # noqa: E402
from composer_megatron.commands import convert  # noqa: E402
from composer_megatron.errors import UsageError  # noqa: E402
from composer_megatron.export_hf import export  # noqa: E402
from composer_megatron.importing.run import import_run  # noqa: E402
from composer_megatron.importing.surgery import BlockMap, read_map  # noqa: E402
from composer_megatron.sequence import CompositeSequence  # noqa: E402

torch.set_num_threads(1)

LAYERS = 5
CONFIG = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,  # large: each block must matter to the logits
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
LLAMA = CompositeSequence("AM" * LAYERS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[LlamaForCausalLM, Path]:
    folder = tmp_path_factory.mktemp("llama") / "hf"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    model.save_pretrained(folder)
    return model, folder


def ids() -> torch.Tensor:
    return torch.randint(0, 83, (2, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference(model: LlamaForCausalLM, blocks: list[str], window: int | None = None) -> torch.Tensor:
    """The logits of Llama's own modules, called block by block in the order of `blocks`, such as ``A3``.

    ``W3`` is A3 with a window.
    """
    tokens, body = ids(), model.model
    x, positions = body.embed_tokens(tokens), torch.arange(tokens.shape[1])[None]
    rotation = body.rotary_emb(x, positions)
    distance = positions[0][:, None] - positions[0][None, :]
    for block in blocks:
        layer = body.layers[int(block[1:])]
        if block[0] == "M":
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            continue
        seen = distance >= 0 if block[0] == "A" else (distance >= 0) & (distance < window)
        mask = torch.zeros(distance.shape).masked_fill(~seen, float("-inf"))[None, None]
        x = x + layer.self_attn(layer.input_layernorm(x), rotation, attention_mask=mask)[0]
    return model.lm_head(body.norm(x))


def logits(run_dir: Path) -> torch.Tensor:
    with load_run(run_dir) as run, torch.no_grad():
        return run.model(ids(), torch.arange(16).expand(2, -1), None)


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest: both are fp32, and sum in different orders (separate or joined matrices)."""
    assert wanted.std() > 0.5  # not a comparison of nothing
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("text", [None, "even", "depth", "A:0-4 M:0-4"])
def test_every_name_of_the_identity_is_the_llama_itself(llama, tmp_path, text):
    model, folder = llama
    found = import_run(folder, tmp_path / "run", sequence=LLAMA, blocks=text).architecture
    assert found.origin["map"] == "A:0-4 M:0-4"
    with torch.no_grad():
        assert_same(logits(tmp_path / "run"), model(ids()).logits)


GRAFTS = {
    "reordered layers": ("(AM)x5", "A:3,1,4,0,2 M:3,1,4,0,2", "A3 M3 A1 M1 A4 M4 A0 M0 A2 M2"),
    "a Composite, evenly": ("2A4M", "even", "A0 A4 M0 M1 M3 M4"),
    "in order of depth": ("1M2A2M", "depth", "M0 A0 A1 M1 M2"),
    "a block twice and backwards": ("2A6M", "A:2,2 M:4-0,4", "A2 A2 M4 M3 M2 M1 M0 M4"),
    "one kind alone": ("3M", "M:1-3", "M1 M2 M3"),
    "one kind said": ("1A2M", "A:4", "A4 M0 M4"),
}


@pytest.mark.parametrize(("sequence", "text", "blocks"), GRAFTS.values(), ids=GRAFTS)
def test_logits_are_those_of_the_same_blocks_called_in_that_order(llama, tmp_path, sequence, text, blocks):
    model, folder = llama
    parsed = CompositeSequence.parse(sequence)
    source = import_run(folder, tmp_path / "run", sequence=parsed, blocks=text)
    assert source.architecture.origin["blocks"] == blocks.split()
    kept = Architecture.load(tmp_path / "run/architecture.json")
    assert (kept.sequence, kept.origin) == (parsed, source.architecture.origin)
    assert_same(logits(tmp_path / "run"), reference(model, blocks.split()))


def test_reordered_layers_are_the_llama_whose_layers_were_reordered(llama, tmp_path):
    """The reference above is not ours alone: transformers' own forward pass says the same."""
    model, folder = llama
    order = [3, 1, 4, 0, 2]
    numbers = ",".join(map(str, order))
    import_run(folder, tmp_path / "run", blocks=f"A:{numbers} M:{numbers}")
    changed = LlamaForCausalLM.from_pretrained(folder).eval()
    changed.model.layers = torch.nn.ModuleList(changed.model.layers[layer] for layer in order)
    with torch.no_grad():
        wanted = changed(ids(), use_cache=False).logits
        assert not torch.allclose(wanted, model(ids()).logits, atol=0.1)
    assert_same(logits(tmp_path / "run"), wanted)


def test_attention_becomes_attention_over_a_window(llama, tmp_path):
    model, folder = llama
    sequence = CompositeSequence.parse("AMWMAMWMAM")
    source = import_run(folder, tmp_path / "run", sequence=sequence, window=5)
    assert source.architecture.shape.window == 5
    blocks = [f"{letter}{index // 2}" for index, letter in enumerate(sequence)]
    assert source.architecture.origin["blocks"] == [block.replace("W", "A") for block in blocks]
    wanted = reference(model, blocks, window=5)
    assert not torch.allclose(wanted, reference(model, blocks, window=16), atol=0.1)
    assert_same(logits(tmp_path / "run"), wanted)


def test_a_grafted_model_is_exported_and_its_export_grafted(llama, tmp_path):
    model, folder = llama
    import_run(folder, tmp_path / "run", sequence=CompositeSequence.parse("2A4M"), blocks="A:1,3 M:0-3")
    export(tmp_path / "run", tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "again", sequence=CompositeSequence.parse("1M1A1M"), blocks="A:1 M:2,0")
    assert_same(logits(tmp_path / "again"), reference(model, ["M2", "A3", "M0"]))


MISTAKES = {
    "A:0-5 M:even": "the source has no A5; its blocks of that kind are A0 to A4",
    "A:0,1 M:0-9999999": "the source has no M9999999",
    "A:0": "it gives 1 blocks of A, the new sequence has 2",
    "M:0-2": "it gives 3 blocks of M, the new sequence has 6",
    "depth": "depth gives M0 to M4, the new sequence has 6; use even or a list",
    "A:0,x": "'x' is no number and no range such as 0-3",
    "A:0,,1": "'' is no number and no range",
    "A:-1,0": "'-1' is no number and no range",
    "A:0,1 A:1,0": "A is given twice",
    "W:0,1": "'W:0,1' is no entry; expected even or depth, or entries such as A:0-3",
    "linear": "'linear' is no entry",
    "A: 0,1": "'A:' is no entry",
    "": "it says nothing",
}


@pytest.mark.parametrize(("text", "problem"), MISTAKES.items(), ids=MISTAKES)
def test_wrong_maps_give_one_message(text, problem):
    with pytest.raises(UsageError) as refused:
        read_map(text, CompositeSequence.parse("2A6M"), LLAMA)
    assert str(refused.value).startswith(f"map {text!r}: ")
    assert problem in str(refused.value)


def test_blocks_that_nothing_can_be_copied_to():
    with pytest.raises(UsageError, match=r"2M2E: E \(mixture of experts\) has weights that no block of a Llama has"):
        read_map("even", CompositeSequence.parse("2M2E"), LLAMA)
    with pytest.raises(UsageError, match="3M has no blocks of A; leave A out"):
        read_map("A:0 M:0-2", CompositeSequence.parse("3M"), LLAMA)
    with pytest.raises(UsageError, match="the source has no blocks of A, the new sequence has 1"):
        read_map("even", CompositeSequence.parse("1A3M"), CompositeSequence.parse("3M"))


letters = st.text("AMW", min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(sequence=letters, layers=st.integers(1, 9), data=st.data())
def test_a_map_reads_back_and_keeps_kinds(sequence, layers, data):
    parsed, source = CompositeSequence(sequence), CompositeSequence("AM" * layers)
    donors = tuple(data.draw(st.lists(st.integers(0, layers - 1), min_size=len(sequence), max_size=len(sequence))))
    blocks = BlockMap(parsed, source, donors)
    assert read_map(str(blocks), parsed, source) == blocks
    for letter, place in zip(sequence, blocks.places, strict=True):
        assert source[place] == {"W": "A"}.get(letter, letter)
    used = set(blocks.names)
    assert used | set(blocks.dropped) == {f"{kind}{layer}" for kind in "AM" for layer in range(layers)}
    assert not used & set(blocks.dropped)
    assert sum(blocks.repeated.values()) + len(used - blocks.repeated.keys()) == len(sequence)


@given(wanted=st.integers(1, 40), layers=st.integers(1, 40))
def test_even_goes_from_the_first_to_the_last_in_equal_steps(wanted, layers):
    donors = read_map("even", CompositeSequence("A" * wanted), CompositeSequence("AM" * layers)).donors
    assert donors[0] == 0
    assert wanted == 1 or donors[-1] == layers - 1
    for index, donor in enumerate(donors):
        assert abs(donor - index * (layers - 1) / max(1, wanted - 1)) <= 0.5
    assert wanted != layers or donors == tuple(range(layers))


def test_the_command_prints_the_map_and_saves_it(llama, tmp_path, capsys):
    command = ["import", str(llama[1]), str(tmp_path / "run"), "--sequence", "2A4M"]
    cli.main([*command, "--map", "A:0,2 M:1,1,1,4"])
    said = " ".join(capsys.readouterr().out.split())
    for part in ("map: A:0,2 M:1,1,1,4", "2A", "A0 A2", "M1 M1 M1 M4", "used more than once: M1 x3"):
        assert part in said
    assert "dropped: A1, A3, A4, M0, M2, M3" in said
    assert Architecture.load(tmp_path / "run/architecture.json").origin["map"] == "A:0,2 M:1,1,1,4"
    cli.main([*command[:2], str(tmp_path / "other"), *command[3:], "--json"])
    assert json.loads(capsys.readouterr().out)["origin"]["blocks"] == ["A0", "A4", "M0", "M1", "M3", "M4"]


def test_the_command_refuses_with_one_message(llama, tmp_path, capsys):
    for options, problem in (
        (["--map", "A:0-9"], "the source has no A9"),
        (["--sequence", "2A4"], "bad sequence"),
        (["--sequence", "2A4M", "--window", "8"], "2A4M has no W block"),
        (["--sequence", "2W4M", "--window", "0"], "window=0"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["import", str(llama[1]), str(tmp_path / "run"), *options])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert problem in said
        assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_progress_in_a_log_is_a_line_each_tenth(capsys):
    with convert._transfer("export") as tell:
        for done in range(0, 101):
            tell(done * 10**8, 10**10)
        tell(1, 10)  # a small one says nothing
    said = capsys.readouterr().out.splitlines()
    assert said == [f"export: {tenth}.0 of 10.0 GB" for tenth in range(1, 11)]
