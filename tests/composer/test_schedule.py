"""The simulated schedules: the order against Megatron's own tables, the times against another way to compute them."""

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.errors import UsageError
from composer_megatron.planner.schedule import Operation, Schedule, held_up, in_flight, rank_order, simulate


@st.composite
def schedules(draw):
    ranks, chunks = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    if chunks == 1 or ranks == 1:
        return Schedule(ranks, 1, draw(st.integers(1, 9)))
    return Schedule(ranks, chunks, ranks * draw(st.integers(1, 3)))


def slowest_wait(schedule: Schedule, durations: list[int], transfer: int) -> int:
    """The step time by relaxation: every pass as early as what it waits for allows, until nothing moves any more."""
    passes = [
        (each.backward, each.chunk * schedule.ranks + rank, each.micro_batch)
        for rank in range(schedule.ranks)
        for each in rank_order(schedule, rank)
    ]
    waits: dict[tuple[bool, int, int], list[tuple[tuple[bool, int, int], int]]] = {each: [] for each in passes}
    for rank in range(schedule.ranks):
        order = rank_order(schedule, rank)
        names = [(each.backward, each.chunk * schedule.ranks + rank, each.micro_batch) for each in order]
        for (before, after), pair in zip(itertools.pairwise(names), itertools.pairwise(order), strict=True):
            waits[after].append((before, transfer * held_up(schedule, rank, *pair)))
    for backward, stage, index in passes:
        source = (backward, stage + (1 if backward else -1), index)
        if source in waits:
            waits[backward, stage, index].append((source, transfer))
    ends = dict.fromkeys(passes, 0)
    while True:
        new = {
            each: max((ends[source] + delay for source, delay in waits[each]), default=0)
            + durations[2 * each[1] + each[0]]
            for each in passes
        }
        if new == ends:
            return max(ends.values())
        ends = new


@settings(max_examples=40, deadline=None)
@given(schedules(), st.data())
def test_step_time(schedule, data) -> None:
    durations = data.draw(st.lists(st.integers(0, 30), min_size=2 * schedule.stages, max_size=2 * schedule.stages))
    transfer = data.draw(st.integers(0, 9))
    result = simulate(schedule, durations, transfer)
    assert result.time == slowest_wait(schedule, durations, transfer)
    computing = sum(count * duration for count, duration in zip(result.visits, durations, strict=True))
    assert computing + result.transfers == result.time


def test_what_holds_up_a_rank() -> None:
    """Between two passes one exchange with each neighbour that is sent to or received from; none if it overlaps."""
    forward, backward = Operation(False, 0, 0), Operation(True, 0, 0)
    pairs = ((forward, forward), (forward, backward), (backward, forward), (backward, backward))
    found = [[held_up(Schedule(3, 1, 4), rank, *pair) for pair in pairs] for rank in range(3)]
    assert found == [[1, 1, 0, 1], [2, 1, 1, 2], [1, 0, 1, 1]]
    assert not any(held_up(Schedule(3, 2, 6), 1, *pair) for pair in pairs)


@settings(max_examples=40, deadline=None)
@given(schedules(), st.data())
def test_a_longest_path_bounds_every_other_step(schedule, data) -> None:
    """What the searches rest on."""
    lists = st.lists(st.integers(0, 30), min_size=2 * schedule.stages, max_size=2 * schedule.stages)
    one, other = data.draw(lists), data.draw(lists)
    path = simulate(schedule, one, 3)
    length = sum(count * duration for count, duration in zip(path.visits, other, strict=True)) + path.transfers
    assert length <= simulate(schedule, other, 3).time


@pytest.mark.parametrize(("ranks", "chunks", "count"), [(1, 1, 3), (4, 1, 9), (4, 2, 8), (8, 4, 32), (3, 3, 3)])
def test_equal_stages_have_the_known_bubble(ranks: int, chunks: int, count: int) -> None:
    """(n + p - 1) turns without interleaving (Narayanan et al. 2021, 2.2), and p - 1 turns of one chunk with it."""
    schedule = Schedule(ranks, chunks, count)
    assert simulate(schedule, [2, 5] * schedule.stages).time == 7 * (chunks * count + ranks - 1)


@pytest.mark.parametrize(("ranks", "chunks", "count"), [(4, 1, 3), (4, 1, 9), (2, 2, 6), (4, 3, 12), (4, 2, 4)])
def test_order_is_megatrons(ranks: int, chunks: int, count: int) -> None:
    megatron = pytest.importorskip("megatron.core.pipeline_parallel.schedules", reason="needs the extra [train]")
    table = megatron.get_schedule_table(count, chunks, ranks if chunks > 1 else count)
    for rank in range(ranks):
        group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        virtual = chunks if chunks > 1 else None
        communicator = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
        _, _, warmup, remaining = megatron.get_pp_rank_microbatches(count, chunks, ranks, p2p_communicator=communicator)
        order = rank_order(Schedule(ranks, chunks, count), rank)
        forward = [(each.micro_batch, each.chunk) for each in order if not each.backward]
        backward = [(each.micro_batch, chunks - 1 - each.chunk) for each in order if each.backward]
        assert forward == backward == [tuple(each) for each in table]
        kinds = [each.backward for each in order]
        assert kinds == [False] * warmup + [False, True] * remaining + [True] * warmup


@settings(max_examples=40, deadline=None)
@given(schedules(), st.data())
def test_fullest_moments(schedule, data) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=schedule.chunks, max_size=schedule.chunks))
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    held, peak = 0, 0
    for backward, chunk, _ in rank_order(schedule, rank):
        held += -sizes[chunk] if backward else sizes[chunk]
        peak = max(peak, held)
    assert held == 0
    assert peak == max(
        sum(count * size for count, size in zip(moment, sizes, strict=True)) for moment in in_flight(schedule, rank)
    )


def test_one_stage_a_rank_holds_one_micro_batch_for_each_rank_after_it() -> None:
    assert [in_flight(Schedule(4, 1, 8), rank) for rank in range(4)] == [((4,),), ((3,),), ((2,),), ((1,),)]
    assert in_flight(Schedule(4, 1, 2), 0) == ((2,),)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), "ranks=0"),
        ((1, 2, 4), "2 virtual stages on one pipeline rank"),
        ((4, 2, 6), "needs a multiple of 4"),
        ((2, 1, 0), "micro_batches=0"),
    ],
)
def test_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Schedule(*sizes)
