"""``composer-megatron search``: options that change what a candidate is and what it is worth, from the front door."""

import json
from pathlib import Path

import pytest

from composer_megatron.cli import main
from composer_megatron.planner.profile import Profile
from composer_megatron.roofline import Passes
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape
from composer_search.candidate import Widths
from composer_search.evaluators.settings import fitting_widths

SMOKE = Widths(hidden_size=16, num_heads=2, ffn_hidden_size=48)
"""The widths of the preset ``smoke``."""


def run(folder: Path, *options: str, length: int = 2) -> list[dict]:
    """A whole small search in this process; the lines of its log."""
    command = ["search", str(folder), "--length", str(length), "--budget", "4", "--preset", "smoke", "--workers", "0"]
    main([*command, *options])
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def evaluator(folder: Path) -> dict:
    return json.loads((folder / "study.json").read_text())["evaluator"]


def test_width_scaling_keeps_the_targets_width_to_depth(tmp_path, capsys):
    """A candidate of half the blocks of the demo shape's baseline has half of the preset's widths."""
    shape = load_shape("demo")
    depth = 2 * shape.baseline_pairs
    lines = run(tmp_path / "s", "--width-scaling", "--target-shape", "demo", "--proposer", "random", length=depth // 2)
    found = evaluator(tmp_path / "s")
    assert (found["hidden_size"], found["num_heads"], found["ffn_hidden_size"]) == (8, 1, 24)
    assert len(lines) == 4 and all(line["status"] == "completed" for line in lines)
    with pytest.raises(SystemExit) as stop:
        main(["search", str(tmp_path / "s"), "--length", str(depth // 2), "--budget", "4", "--preset", "smoke"])
    assert stop.value.code == 2 and "other settings: strategy.width_scaling" in capsys.readouterr().err


def test_width_scaling_by_steps_widens_with_the_depth(tmp_path):
    options = ("--width-scaling", "--target-shape", "demo", "--strategy", "end", "--step", "2")
    run(tmp_path / "s", *options, length=4)
    inner = [evaluator(tmp_path / "s" / step)["ffn_hidden_size"] for step in ("step-01", "step-02")]
    depth = 2 * load_shape("demo").baseline_pairs
    assert inner == [round(48 * 2 / depth), round(48 * 4 / depth)]


def test_equal_weights_give_each_candidate_its_widths(tmp_path):
    for line in run(tmp_path / "s", "--weights", "0"):
        expected = vars(fitting_widths(CompositeSequence.parse(line["sequence"]), SMOKE, 0))
        assert line["details"]["widths"] == expected
    assert evaluator(tmp_path / "s")["weights"] == 0


def test_settings_of_the_preset_can_be_changed(tmp_path):
    overrides = ("epochs=1", "learning_rates=1e-3,2e-3", "tasks=memorization", "cosine=true")
    run(tmp_path / "s", *(word for each in overrides for word in ("--override", each)))
    found = evaluator(tmp_path / "s")
    assert [(task["task"], task["steps"]) for task in found["tasks"]] == [("memorization", 16)]
    assert (found["learning_rates"], found["cosine"]) == ([1e-3, 2e-3], True)


def test_known_designs_are_scored_in_place_of_a_search(tmp_path, capsys):
    """From text and from an aggregate's file, with the scores that a search gives them."""
    searched = {line["sequence"]: line["score"] for line in run(tmp_path / "s")}
    (tmp_path / "aggregate.json").write_text(json.dumps({"sequence": "2M"}))
    only = ("--only", "1M1A", "--only", str(tmp_path / "aggregate.json"), "--only", "1M1A")
    lines = run(tmp_path / "t", *only)
    assert [line["sequence"] for line in lines] == ["1M1A", "2M"]
    assert all(line["score"] == searched[line["sequence"]] for line in lines)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "t", "--only", "1M1A")
    assert stop.value.code == 2 and "other settings" in capsys.readouterr().err


def test_a_measured_profile_makes_the_throughput(tmp_path):
    blocks = {letter: Passes(seconds, 2 * seconds) for letter, seconds in (("A", 4.0), ("M", 1.0))}
    ends = Passes(0.5, 1.0), Passes(0.5, 1.0)
    shape = load_shape("demo")
    Profile("some GPU", "bfloat16", shape, 128, 1, blocks, *ends, environment={}).save(tmp_path / "profile.json")
    options = ("--objective", "accuracy + 0.2 throughput", "--target-shape", "demo", "--seq-len", "128")
    lines = run(tmp_path / "s", *options, "--profile", str(tmp_path / "profile.json"))
    baseline = shape.baseline_pairs
    for line in lines:
        assert set(line["objective"]) >= {"throughput", "prefill", "latency", "value"}
        own = line["objective"]["throughput"] * 3 * (baseline * 5 + 1) / 128  # as a share of the baseline's
        assert line["objective"]["value"] == pytest.approx(line["score"] + 0.2 * own)
    assert json.loads((tmp_path / "s/study.json").read_text())["target"]["profile"]["source"] == "measured on some GPU"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--weights", "-1"), 2, "weights=-1"),
        (("--override", "epochs"), 2, "expected NAME=VALUE"),
        (("--override", "epoch=3"), 2, "no setting 'epoch'; did you mean 'epochs'"),
        (("--profile", "none.json"), 1, "none.json"),
        (("--objective", "accuracy - latenzy"), 2, "latenzy"),
        (("--only", "2A4M"), 2, "2A4M is not of 2 blocks"),
        (("--only", "2A", "--strategy", "end", "--step", "1"), 2, "a list of sequences has no steps"),
        (("--at-once", "0"), 2, "--at-once 0; expected at least 1 training"),
        (("--trainings", "."), 2, "--trainings . is a folder; name a file in it: trainings.jsonl"),
        (("--trainings", f"{__file__}/t.jsonl"), 2, "test_search_command.py is no folder"),
    ],
)
def test_mistakes_are_named(options, status, message, tmp_path, capsys):
    command = ["search", str(tmp_path / "s"), "--length", "2", "--budget", "4", "--preset", "smoke", "--workers", "0"]
    with pytest.raises(SystemExit) as stop:
        main([*command, *options])
    assert stop.value.code == status and message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_several_goals_end_with_their_front(tmp_path, capsys):
    """Of the four sequences of two blocks 2M has the smallest cache, so that it is on every front."""
    lines = run(tmp_path / "s", "--objective", "accuracy, -kv_bytes", "--override", "steps=2")
    *shown, best, front = capsys.readouterr().out.splitlines()
    assert len(shown) == 4 and all("  goals " in line for line in shown)
    assert "best of 4" in best and "Pareto front of all goals" in front and "2M" in front.split(": ")[1].split(", ")
    top = max(lines, key=lambda line: line["score"])
    assert top["sequence"] in front
    run(tmp_path / "plain", "--override", "steps=2")
    assert "Pareto" not in capsys.readouterr().out
