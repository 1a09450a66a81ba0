"""Where sequences stand in a study: ranks and distances against counting, intervals against the normal distribution."""

import itertools
import json
import math

import numpy as np
import pytest

from composer_megatron.cli import main
from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.evidence.standing import standing
from composer_search.study import Space, Study, StudySettings, Trial

SPACE = Space("AM", 4)
EVERY = tuple(SPACE.at(rank) for rank in range(SPACE.size))
NOISE, SEEDS = 0.02, 40


def write(folder, sequences, seeds=SEEDS, **evaluator):
    """A study whose scores grow with the share of attention, with noise between seeds."""
    only = {"proposer": "listed", "only": tuple(sequences), "budget": len(sequences), "initial": 5, "seed": 0}
    settings = StudySettings(space=SPACE, evaluator={"name": "x", "seeds": seeds, **evaluator}, **only)
    scores = {}
    with Study.open(folder, settings) as study:
        for number, sequence in enumerate(sequences):
            rng = np.random.default_rng(int(SPACE.rank(sequence)))
            by_seed = sequence.count("A") / 4 + SPACE.rank(sequence) / 1000 + rng.normal(0, NOISE, seeds)
            scores[sequence] = float(by_seed.mean())
            study.record(
                Trial(
                    trial=number,
                    sequence=sequence,
                    proposer="listed",
                    seconds=1.0,
                    finished="",
                    score=scores[sequence],
                    seed_scores=tuple(by_seed),
                    tasks={"one": scores[sequence] + 0.1, "two": scores[sequence] - 0.1},
                )
            )
    return scores


def test_ranks_and_distances_are_those_of_counting(tmp_path):
    scores = write(tmp_path / "s", EVERY[::2])
    known = write(tmp_path / "t", EVERY[1::4])
    found = standing(tmp_path / "s", [("mine", EVERY[2])], others=tmp_path / "t")
    best = max(scores, key=scores.get)
    assert {place.sequence for place in found.places} == {best, EVERY[2], *EVERY[1::4]}
    assert (found.candidates, found.seeds) == (8, SEEDS)
    assert [place.score for place in found.places] == sorted((place.score for place in found.places), reverse=True)
    for place in found.places:
        score = (scores | known)[place.sequence]
        assert place.rank == 1 + sum(other > score for other in scores.values())
        assert place.behind.value == pytest.approx(scores[best] - score)
        assert place.tasks == pytest.approx({"one": score + 0.1, "two": score - 0.1})
        assert place.ranks[0] <= place.rank <= place.ranks[1]
    assert next(place.name for place in found.places if place.sequence == EVERY[2]) == "mine"


def test_intervals_are_as_wide_as_the_noise_makes_them(tmp_path):
    """95 % of a difference of two means of S seeds: 1.96 √(2/S) times their deviation."""
    write(tmp_path / "s", EVERY)
    found = standing(tmp_path / "s", [("", EVERY[3])])
    behind = next(place.behind for place in found.places if place.sequence == EVERY[3])
    expected = 2 * 1.96 * NOISE * math.sqrt(2 / SEEDS)
    assert behind.high - behind.low == pytest.approx(expected, rel=0.25)  # NOISE is estimated from 40 seeds, to 11 %
    best = found.places[0]
    assert (best.behind.low, best.behind.value, best.behind.high) == (0, 0, 0) and best.name == "best of the study"


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    write(tmp_path / "s", EVERY, seeds=1)
    found = standing(tmp_path / "s", [("", EVERY[3])])
    assert all(place.ranks is None and place.behind.low is None for place in found.places)
    assert "One seed" in found.exhibit().findings[0]


def test_what_was_not_scored_or_otherwise_is_refused(tmp_path):
    write(tmp_path / "s", EVERY[:8])
    write(tmp_path / "t", EVERY[8:], steps=7)
    with pytest.raises(UsageError, match=rf"{EVERY[9]} has no score in .*--only {EVERY[9]}"):
        standing(tmp_path / "s", [("", EVERY[9])])
    with pytest.raises(UsageError, match="they differ in steps"):
        standing(tmp_path / "s", others=tmp_path / "t")


def test_the_command_takes_sequences_and_files(tmp_path, capsys):
    scores = write(tmp_path / "s", EVERY)
    (tmp_path / "s" / "aggregate.json").write_text(json.dumps({"sequence": "2A2M"}))
    main(["evidence", "standing", str(tmp_path / "s"), "4M", str(tmp_path / "s" / "aggregate.json"), "--json"])
    found = json.loads(capsys.readouterr().out)
    names = {place["sequence"]: place["name"] for place in found["places"]}
    best = max(scores, key=scores.get)
    assert names == {str(best): "best of the study", "4M": "", "2A2M": "aggregate"}
    page = (tmp_path / "s" / "evidence" / "standing.html").read_text()
    assert page.count("<figure") == 1
    for text in itertools.chain(names, ["Score behind the best"]):
        assert CompositeSequence.parse(text).notation in page if text in names else text in page
