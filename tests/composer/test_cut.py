"""Cuts against every other cut: what one takes, the exact search under 1F1B, and the bounded one."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.errors import UsageError
from composer_megatron.planner.cut import CutProblem, Unit, borders_of, equal_counts
from composer_megatron.planner.cut_exact import ExactCut
from composer_megatron.planner.cut_interleaved import _Search, interleaved_cut
from composer_megatron.planner.schedule import Schedule, rank_order, simulate


@st.composite
def problems(draw, *, ranks, chunks, blocks=9):
    """Two kinds of blocks, an embedding, a loss head that may outweigh a stage, transfers."""
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    kinds = [
        Unit(each, each * draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))) for each in size
    ]
    p, v = draw(ranks), draw(chunks)
    count = draw(st.integers(1, 8)) if v == 1 else p * draw(st.integers(1, 3))
    letters = draw(st.lists(st.sampled_from(kinds), min_size=p * v, max_size=max(blocks, p * v)))
    head = draw(st.integers(0, 120))
    return CutProblem(
        Schedule(p, v, count),
        tuple(letters),
        first=Unit(draw(st.integers(0, 5)), draw(st.integers(0, 5)), 20, 0),
        last=Unit(head, 2 * head, 20, 10),
        transfer=draw(st.integers(0, 4)),
        input_bytes=1,
    )


def all_cuts(problem: CutProblem) -> np.ndarray:
    """The borders of every cut in which no rank is without anything."""
    blocks, stages = len(problem.blocks), problem.schedule.stages
    inner = itertools.combinations_with_replacement(range(blocks + 1), stages - 1)
    cuts = np.array([(0, *borders, blocks) for borders in inner], dtype=np.intp)
    return cuts[problem.busy(cuts)]


@settings(max_examples=25, deadline=None)
@given(
    problems(ranks=st.integers(1, 3), chunks=st.just(1)) | problems(ranks=st.integers(2, 3), chunks=st.integers(2, 2)),
    st.data(),
)
def test_time_and_memory(problem: CutProblem, data) -> None:
    cuts = all_cuts(problem)
    borders = cuts[data.draw(st.integers(0, len(cuts) - 1))]
    stages = [list(problem.blocks[a:b]) for a, b in itertools.pairwise(borders)]
    kept = [sum(unit.kept for unit in stage) or (0 if stage else problem.input_bytes) for stage in stages]
    stages[0].append(problem.first)
    stages[-1].append(problem.last)
    kept[0] += problem.first.kept
    kept[-1] += problem.last.kept
    durations = [sum(unit[field] for unit in stage) for stage in stages for field in (0, 1)]
    assert problem.time(borders) == simulate(problem.schedule, durations, problem.transfer).time
    ranks = problem.schedule.ranks
    for rank in range(ranks):
        held = peak = 0
        for backward, chunk, _ in rank_order(problem.schedule, rank):
            held += (-1 if backward else 1) * kept[chunk * ranks + rank]
            peak = max(peak, held)
        state = sum(unit.state for stage in stages[rank::ranks] for unit in stage)
        assert problem.memory(borders)[rank] == state + peak
        assert problem.memory(cuts).shape == (len(cuts), ranks)


def test_counts() -> None:
    assert equal_counts(27, 4) == [7, 7, 7, 6]
    assert borders_of([2, 0, 1]).tolist() == [0, 2, 2, 3]


def test_a_rank_must_have_something() -> None:
    problem = CutProblem(Schedule(3, 2, 3), (Unit(1, 1),) * 6)
    cuts = np.array([[0, 3, 3, 3, 6, 6, 6], [0, 3, 3, 3, 5, 6, 6]])
    assert problem.busy(cuts).tolist() == [False, True]


def test_more_stages_than_blocks() -> None:
    with pytest.raises(UsageError, match="4 pipeline stages for 3 blocks"):
        CutProblem(Schedule(2, 2, 2), (Unit(1, 1),) * 3)


@settings(max_examples=60, deadline=None)
@given(problems(ranks=st.integers(1, 4), chunks=st.just(1)))
def test_no_cut_is_faster(problem) -> None:
    cut = ExactCut(problem).solve()
    assert cut.time == problem.time(borders_of(cut.counts))
    assert cut.time == min(problem.time(borders) for borders in all_cuts(problem))
    assert cut.bound == cut.time


@settings(max_examples=40, deadline=None)
@given(problems(ranks=st.integers(2, 4), chunks=st.just(1)), st.floats(0.8, 1.3))
def test_exact_memory_limits(problem, share) -> None:
    cuts = all_cuts(problem)
    peaks = problem.memory(cuts).max(axis=-1)
    limit = int(share * peaks.min())
    limited = dataclasses.replace(problem, memory_limit=limit)
    if peaks.min() > limit:
        least = cuts[peaks == peaks.min()]
        ranks = {int(problem.memory(borders).argmax()) for borders in least}
        with pytest.raises(UsageError, match=f"the least possible is {peaks.min() / 1e9:.2f} GB") as refused:
            ExactCut(limited).solve()
        assert any(f"on pipeline rank {rank};" in str(refused.value) for rank in ranks)
        return
    cut = ExactCut(limited).solve()
    assert problem.memory(borders_of(cut.counts)).max() <= limit
    assert cut.time == min(problem.time(borders) for borders in cuts[peaks <= limit])


@settings(max_examples=30, deadline=None)
@given(problems(ranks=st.integers(2, 4), chunks=st.just(1)))
def test_the_programmes_costs_are_paths(problem) -> None:
    """The bound of each cut is at most its simulated time."""
    search = ExactCut(problem)
    for borders in all_cuts(problem):
        costs = [search.costs[stage][borders[stage], borders[stage + 1]] for stage in range(len(borders) - 1)]
        assert search.worst[0][0] <= max(costs) <= problem.time(borders)


def test_a_limit_on_work_leaves_a_true_bound(monkeypatch) -> None:
    monkeypatch.setattr("composer_megatron.planner.cut_exact._SIMULATED_PASSES", 0)
    problem = problems_with_a_loose_bound()
    cut = ExactCut(problem).solve()
    best = min(problem.time(borders) for borders in all_cuts(problem))
    assert cut.bound <= best <= cut.time


def problems_with_a_loose_bound():
    units = tuple(Unit(1 + 7 * (index % 3 == 0), 3 + index % 2 * 11, 1, 1) for index in range(9))
    return CutProblem(Schedule(4, 1, 3), units, last=Unit(9, 2, 0, 0))


SMALL = problems(ranks=st.integers(2, 3), chunks=st.just(2), blocks=9)


@settings(max_examples=10, deadline=None)
@given(SMALL)
def test_between_its_bound_and_a_tenth_above_the_best(problem) -> None:
    best = min(problem.time(borders) for borders in all_cuts(problem))
    cut = interleaved_cut(problem)
    assert cut.time == problem.time(borders_of(cut.counts))
    assert cut.bound <= best <= cut.time <= 1.1 * best  # the tenth is what we hold it to; seldom is it above at all


@settings(max_examples=10, deadline=None)
@given(SMALL)
def test_mixtures_of_paths_bound_every_cut(problem) -> None:
    """The bound as it is found, before it is held below the time of the cut that was found."""
    cuts = all_cuts(problem)
    bound, _ = _Search(problem)._bound(problem.durations(cuts[0]))
    best = min(problem.time(borders) for borders in cuts)
    work = problem.sums[:2, -1].sum() + sum(problem.first[:2]) + sum(problem.last[:2])
    even = problem.schedule.micro_batches * work / problem.schedule.ranks
    assert (1 - 1e-9) * even <= bound <= (1 + 1e-9) * best  # mixtures are of doubles


def test_most_small_problems_are_solved_exactly() -> None:
    """Twenty problems drawn with fixed seeds: nine in ten exactly, none by more than three in a hundred above."""
    ratios = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        kinds = [Unit(*(int(x) for x in rng.integers(5, 40, 2)), 1, 1) for _ in range(2)]
        blocks = tuple(kinds[each] for each in rng.integers(0, 2, 10))
        head = int(rng.integers(0, 120))
        schedule = Schedule(2, 3, 6) if seed % 2 else Schedule(3, 2, 6)
        problem = CutProblem(schedule, blocks, last=Unit(head, 2 * head), transfer=1)
        ratios.append(interleaved_cut(problem).time / min(problem.time(borders) for borders in all_cuts(problem)))
    assert np.mean(np.array(ratios) == 1) >= 0.9
    assert max(ratios) <= 1.03


@settings(max_examples=15, deadline=None)
@given(SMALL, st.floats(0.9, 1.3))
def test_interleaved_memory_limits(problem, share) -> None:
    least = problem.memory(all_cuts(problem)).max(axis=-1).min()
    limited = dataclasses.replace(problem, memory_limit=int(share * least))
    try:
        cut = interleaved_cut(limited)
    except UsageError as error:
        assert "the least found is" in str(error)
        return
    assert least <= problem.memory(borders_of(cut.counts)).max() <= limited.memory_limit


def big(micro_batches: int = 32) -> CutProblem:
    units = {"A": Unit(430, 1060, 1, 1), "M": Unit(970, 2060, 5, 1)}
    blocks = tuple(units[letter] for letter in ("AAMMMM" * 11)[:64])
    return CutProblem(Schedule(8, 4, micro_batches), blocks, last=Unit(5130, 10510), transfer=50)


def test_64_blocks_on_8_ranks_with_4_stages_each() -> None:
    problem = big()
    start = time.process_time()
    cut = interleaved_cut(problem)
    assert time.process_time() - start < 2.0  # measured 0.3 to 0.6 s on a core of its own; others may share it here
    equal = problem.time(borders_of(equal_counts(64, 32)))
    assert cut.time < 0.85 * equal
    assert cut.time < 1.2 * cut.bound
    assert interleaved_cut(problem) == cut  # every rank of a training run makes its own


def test_long_steps_are_searched_with_fewer_micro_batches_first() -> None:
    problem = big(micro_batches=256)
    cut = interleaved_cut(problem, quick=True)
    assert cut.time == problem.time(borders_of(cut.counts))
    assert cut.bound == 0
    whole = interleaved_cut(problem)
    assert whole.bound <= whole.time == problem.time(borders_of(whole.counts)) <= cut.time


def test_no_room() -> None:
    with pytest.raises(UsageError, match=r"no cut keeps every rank within 0\.00 GB: the least found is"):
        interleaved_cut(dataclasses.replace(big(), memory_limit=3))
