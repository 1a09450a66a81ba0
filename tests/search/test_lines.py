"""A trial's line for people: its worth, and what its score is not."""

import dataclasses

import pytest

from composer_megatron.sequence import CompositeSequence
from composer_search.lines import trial_line
from composer_search.study import Trial

TRIAL = Trial(
    trial=7,
    sequence=CompositeSequence("AAMM"),
    proposer="random",
    seconds=1.25,
    finished="2026-01-01T00:00:00+00:00",
    score=0.61234,
    spread=0.05,
)
PLAIN = "trial   7  2A2M          0.612 ± 0.050  random        1.2 s"


def task(*ended: str) -> dict:
    return {"ended": list(ended)}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, PLAIN),
        ({"objective": {"kv_bytes": 14_336}}, PLAIN),  # exact metrics alone, as under a constraint
        (
            {"objective": {"kv_bytes": 1.0, "value": 0.41234}},
            PLAIN.replace("0.050", "0.050  value 0.412"),
        ),
        (
            {"objective": {"kv_bytes": 1.0, "goal_1": 0.61234, "goal_2": -0.4375}},
            PLAIN.replace("0.050", "0.050  goals 0.612, -0.438"),
        ),
        ({"details": {"fidelity": {"share": 1.0}}}, PLAIN),
        ({"details": {"fidelity": {"share": 1 / 9}}}, f"{PLAIN}  after 11 % of the steps"),
        (
            {"details": {"tasks": {"a": task("solved"), "b": task("budget", "diverged"), "c": task("diverged")}}},
            f"{PLAIN}  diverged: b, c",
        ),
        ({"score": None, "error": "out of luck"}, "trial   7  2A2M          failed: out of luck"),
    ],
)
def test_a_line_says_what_the_score_is_and_what_it_is_not(changes, line):
    assert trial_line(dataclasses.replace(TRIAL, **changes)) == line
