"""``tools/search_text.py``: losses that survive a kill, and what they say about other scores, at a tiny size."""

import gzip
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from composer_megatron.sequence import CompositeSequence
from composer_search.evidence.agreement import at_equal_counts
from composer_search.evidence.scores import Scores, parameters
from composer_search.text_evaluator import TextEvaluator, text_preset

TOOLS = Path(__file__).parents[2] / "tools"
TINY = {"vocab_size": 300, "seq_len": 16, "n_train": 64, "n_valid": 8, "n_test": 8, "steps": 6, "batch_size": 4}
TINY |= {"hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24, "warmup_steps": 2, "evaluate_every": 3}
TINY |= {"learning_rates": 1e-2, "precision": "float32", "device": "cpu"}
OPTIONS = ["--seeds", "2"]
OPTIONS += [part for name, value in TINY.items() for part in ("--override", f"{name}={value}")]
SPACE = ["".join(letters) for letters in itertools.product("AM", repeat=4)]


@pytest.fixture
def tool(monkeypatch):
    """The script with few resamples; its files are below the folder given first."""
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("search_text", TOOLS / "search_text.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "search_text", module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VOTES", 20)

    def run(folder, *arguments):
        places = ("--folder", str(folder), "--work", str(folder / "work"))
        monkeypatch.setattr(sys, "argv", ["search_text.py", *arguments, *places])
        module.main()

    yield run
    sys.modules.pop("search_studies", None)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    rng = np.random.default_rng(0)
    for number in range(40):
        words = rng.choice(["the cat", "a dog", "sat on", "ran to", "the mat", "and then"], 60)
        (folder / f"{number:02}.txt").write_text(" ".join(words) + f" {number}\n")
    return folder


def lines(folder):
    return (folder / "work/text.jsonl").read_text().splitlines(keepends=True)


def test_a_run_goes_on_where_a_kill_ended_it(tool, tmp_path, stories, capsys):
    run = ("run", "--text", str(stories), "--only", "MA", "--only", "AAM", *OPTIONS)
    tool(tmp_path, *run)
    whole = lines(tmp_path)
    evaluator = TextEvaluator(text_preset("small-text", text=[stories], **TINY, seeds=2))
    for letters in ("MA", "AAM"):
        details = evaluator.evaluate(CompositeSequence(letters)).details
        for part, step in (("nats", "validation"), ("test_nats", "test")):
            ends = [
                each[step][letters]
                for each in map(json.loads, whole)
                if each["step"] == 6 and letters in each.get(step, ())
            ]
            assert ends == pytest.approx(details[part], abs=2e-6)  # six decimals are kept
    cut = next(place for place, line in enumerate(whole) if '"seed": 1' in line) + 1
    (tmp_path / "work/text.jsonl").write_text("".join(whole[:cut]) + whole[cut][:30])
    tool(tmp_path, *run, "--seconds", "1e-9")
    assert lines(tmp_path) == whole[:cut] and "1 of 2 seeds are whole" in capsys.readouterr().out
    tool(tmp_path, *run)
    assert set(lines(tmp_path)) == set(whole) and len(lines(tmp_path)) == len(whole) + 1
    assert "seed 0 is there" in capsys.readouterr().out
    before = lines(tmp_path)
    tool(tmp_path, *run)
    assert lines(tmp_path) == before


def test_time_ends_a_training_at_an_evaluation(tool, tmp_path, stories, monkeypatch):
    monkeypatch.setattr(sys.modules["search_text"].time, "monotonic", iter([0.0, 0.0, *[2.0] * 9]).__next__)
    tool(tmp_path, "run", "--text", str(stories), "--only", "MA", *OPTIONS, "--seconds", "1")
    assert [(each["seed"], each["step"]) for each in map(json.loads, lines(tmp_path))] == [(0, 3)]


def write_scores(folder, losses_of):
    """Scores on two tasks, and losses of three seeds at two evaluations, which `losses_of` makes of the scores."""
    rng = np.random.default_rng(3)
    scores = {letters: rng.uniform(0.2, 0.8, 3) for letters in SPACE}
    rows = {
        str(CompositeSequence(key)): {"seeds": [*each], "one": each.mean(), "two": rng.random()}
        for key, each in scores.items()
    }
    (folder / "results.json").write_text(json.dumps({"six": {"scores": rows}}))
    means = {letters: float(each.mean()) for letters, each in scores.items()}
    found = []
    for seed in range(3):
        head = {"settings": {"steps": 2}, "device": "CPU", "seed": seed}
        nats = {letters: losses_of(letters, mean, seed) for letters, mean in means.items()}
        early = {letters: -loss if loss is not None else None for letters, loss in nats.items()}
        found += [{**head, "step": 1, "validation": early}, {**head, "step": 2, "validation": nats}]
        harder = {letters: loss and loss + 0.1 for letters, loss in nats.items()}
        found.append({**head, "step": 2, "test": harder})
    (folder / "work").mkdir()
    (folder / "work/text.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    return means


def test_losses_that_fall_with_the_scores_agree_with_them(tool, tmp_path):
    means = write_scores(tmp_path, lambda letters, mean, seed: 4 - mean if letters != "AAAA" or seed else None)
    tool(tmp_path, "compare")
    result = json.loads((tmp_path / "text.json").read_text())
    rows = {row["Proxy"]: row for row in result["agreement"]["rows"]}
    assert rows["MAD"]["Candidates"] == 15 and rows["MAD"]["Spearman [95 %]"] == "1.00 [1.00, 1.00]"
    assert (
        rows["MAD, equal sizes"]["Spearman [95 %]"].startswith("1.00")
        and rows["two"]["Spearman [95 %]"] != rows["one"]["Spearman [95 %]"]
    )
    del means["AAAA"]
    sizes = [letters.count("M") for letters in means]
    assert rows["parameter count"]["Spearman [95 %]"].startswith(f"{spearmanr(sizes, [*means.values()])[0]:.2f}")
    assert any("Left out, since a loss was no number: AAAA" in each for each in result["agreement"]["findings"])
    best = str(CompositeSequence(max(means, key=means.get)))
    first = result["places"]["rows"][0]
    assert (first["Sequence"], first["Rank on text"], first["Rank on MAD"]) == (best, 1, 1)
    assert [row["MAD: with the mean here"] for row in result["fidelity"]["rows"]] == [-1, 1]  # losses rose at first
    assert result["scores"][best] == pytest.approx([4.05 - max(means.values())] * 3, abs=1e-4)  # of both halves
    assert all((tmp_path / f"work/{name}.html").exists() for name in ("text", "text-votes", "text-oracle"))
    kept = (tmp_path / "text.json").read_bytes()
    (tmp_path / "work/text.jsonl").unlink()  # the packed losses are enough
    tool(tmp_path, "compare")
    assert kept == (tmp_path / "text.json").read_bytes()


def test_one_seed_is_compared_and_a_seed_cut_short_is_not(tool, tmp_path):
    write_scores(tmp_path, lambda letters, mean, seed: 4 - mean + seed)
    file = tmp_path / "work/text.jsonl"
    other = json.dumps({**json.loads(lines(tmp_path)[0]), "settings": {"steps": 3}}) + "\n"  # fewer lines have these
    file.write_text(other + "".join(lines(tmp_path)[:4]) + other)  # the first seed, and a part of the second
    tool(tmp_path, "compare")
    result = json.loads((tmp_path / "text.json").read_text())
    assert all(len(each) == 1 for each in result["scores"].values()) and "votes" not in result


def test_equal_sizes_leave_what_order_is_worth():
    rng = np.random.default_rng(0)
    sequences = tuple(map(CompositeSequence, SPACE))
    tasks = {"t": rng.random(16), "solved": np.full(16, 0.1)}
    found = at_equal_counts(Scores("s", sequences, rng.random(16), rng.random((16, 2)), tasks))
    assert len(found) == 14 and CompositeSequence("AAAA") not in found.sequences
    sizes = parameters(found.sequences)
    for values in (found.values, *found.seeds.T, found.tasks["t, equal sizes"]):
        assert [values[sizes == size].mean() for size in np.unique(sizes)] == pytest.approx([0] * 3)
        assert np.unique(values).size == 14
    assert not found.tasks["solved, equal sizes"].any()  # rounding ranks nothing


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("run",), 2, "run needs --text"),
        (("run", "--text", "nowhere"), 1, "no such file"),
        (("run", "--text", "{stories}", "--override", "stepz=1"), 2, "no setting 'stepz'"),
        (("run", "--text", "{stories}", *OPTIONS, "--override", "seeds=2"), 2, "seeds=2; expected one of each"),
        (("run", "--text", "{stories}", "--only", "AXM"), 2, "AXM"),
        (("run", "--seconds", "0"), 2, "expected a number above 0"),
        (("compare",), 1, "there are no losses on text"),
        (("compare", "--losses", "nowhere.jsonl"), 1, "nowhere.jsonl is no file"),
    ],
)
def test_mistakes_are_named(arguments, status, message, tool, tmp_path, stories, capsys):
    with pytest.raises(SystemExit) as stop:
        tool(tmp_path, *(each.format(stories=stories) for each in arguments))
    assert stop.value.code == status
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_named(tool, tmp_path, capsys):
    write_scores(tmp_path, lambda letters, mean, seed: 4 - mean)
    for damage, message in (
        (lambda: (tmp_path / "results.json").write_text("{}"), "results.json has no scores of six blocks"),
        (lambda: (tmp_path / "work/text.jsonl").write_text('{"seed": 1}\n{"settings": {}}\n'), "line 1: no losses"),
        (
            lambda: (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 99)[:-9]),
            "text.jsonl.gz is damaged",
        ),
    ):
        damage()
        with pytest.raises(SystemExit) as stop:
            tool(tmp_path, "compare")
        assert stop.value.code == 1 and message in capsys.readouterr().err
