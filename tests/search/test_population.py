"""The population against the one-at-a-time trainer, and who leaves it when."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.candidate import Widths
from composer_search.mad import IGNORE
from composer_search.population import Row, train_on_devices, train_population
from composer_search.population import train as train_module
from composer_search.population.population import Population
from composer_search.trainer import TaskData, TrainSettings, best_rate, train

CPU = torch.device("cpu")
VOCABULARY, LENGTH = 6, 8
SETTINGS = TrainSettings(
    widths=Widths(hidden_size=16, num_heads=2, ffn_hidden_size=24),
    steps=20,
    batch_size=4,
    evaluate_every=10,
    warmup_steps=3,
    patience=0,
    precision="float64",
    device="cpu",
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def previous_token(seed, n):
    """The target at each position is the token before it: easy for attention, impossible without."""
    inputs = np.random.default_rng(seed).integers(VOCABULARY, size=(n, LENGTH))
    targets = np.full_like(inputs, IGNORE)
    targets[:, 1:] = inputs[:, :-1]
    return inputs, targets


def task(seed=0, n_train=24, **changes):
    parts = {
        "train": previous_token(seed, n_train),
        "validation": previous_token(seed + 1, 70),
        "test": previous_token(seed + 2, 16),
    }
    return TaskData(VOCABULARY, **(parts | changes))


def autoencoder():
    inputs = [previous_token(seed, n)[0] for seed, n in enumerate((24, 70, 16))]
    return TaskData(VOCABULARY, *((each, each.copy()) for each in inputs), autoencoder=True)


def last_tokens():
    """The last two positions alone are scored: they ask for the two tokens before the middle."""
    splits = []
    for seed, n in enumerate((24, 70, 16)):
        inputs, targets = previous_token(seed, n)
        targets = np.full_like(inputs, IGNORE)
        targets[:, -2:] = inputs[:, 2:4]
        splits.append((inputs, targets))
    return TaskData(VOCABULARY, *splits)


TASKS = (task(), task(seed=10, n_train=13), autoencoder(), last_tokens())
"""The first two may share a population; the last has no kind of its own but few positions that are scored."""


def row(text, rate=1e-2, decay=0.0, seed=0, data=TASKS[0]):
    return Row(CompositeSequence(text), data, rate, decay, seed)


def with_(**changes):
    return dataclasses.replace(SETTINGS, **changes)


def alone(one, chosen):
    own = dataclasses.replace(chosen, learning_rates=(one.learning_rate,), weight_decay=one.weight_decay)
    return train(one.sequence, one.data, own, one.seed)


ROWS = st.lists(
    st.builds(
        row,
        text=st.text("AM", min_size=1, max_size=4),
        rate=st.sampled_from([1e-3, 1e-2]),
        decay=st.sampled_from([0.0, 0.1]),
        seed=st.integers(0, 1),
        data=st.sampled_from(TASKS),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=15, deadline=None)
@given(rows=ROWS, metric=st.sampled_from(["accuracy", "macro_accuracy"]))
def test_every_row_gets_what_it_gets_alone(rows, metric):
    """In float64, where rounding over 20 steps does not reach an argmax: the whole result, curve and test included."""
    chosen = with_(metric=metric)
    assert train_population(rows, chosen) == [alone(one, chosen) for one in rows]


@settings(max_examples=10, deadline=None)
@given(
    rows=st.builds(
        lambda rows, data: [dataclasses.replace(one, data=data) for one in rows], ROWS, st.sampled_from(TASKS[::3])
    )
)
def test_weights_after_ten_steps_are_those_of_a_row_alone(rows):
    """Float32 weights within 1e-5, whichever rows share the batch."""
    chosen = with_(precision="float32", steps=30)
    together = Population(rows, chosen, CPU)
    together.advance(10)
    for place, one in enumerate(rows):
        single = Population([one], chosen, CPU)
        single.advance(10)
        state, expected = together.state(place), single.state(0)
        assert state.keys() == expected.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_weights_after_ten_steps_are_those_of_a_plain_loop(precision, tolerance):
    """The same against `torch.optim.AdamW` on the `Candidate` itself."""
    chosen = with_(steps=30, precision=precision)
    rows = [row("AMA", 1e-2, 0.1, 1), row("MM", 1e-3, 0.0, 0), row("MAMA", 3e-3, 0.1, 0, TASKS[1])]
    together = Population(rows, chosen, CPU)
    together.advance(10)
    for place, one in enumerate(rows):
        weights = plain_loop(one, chosen, 10)
        for name, value in together.state(place).items():
            expected = weights[name]
            if name.endswith("query_key_value.bias"):
                # a key's bias adds the same to all scores of a query: its gradient is rounding alone, and AdamW's first
                # steps are of the size of the rate whatever the size of the gradient
                keys = slice(16, 32)
                torch.testing.assert_close(value[keys], expected[keys], atol=1e-3, rtol=0)
                value[keys] = expected[keys]
            torch.testing.assert_close(value, expected, atol=tolerance, rtol=0)


def plain_loop(one, chosen, steps):
    from composer_search.trainer import batches, build

    model = build(one.sequence, one.data, chosen, one.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=one.weight_decay)
    inputs, targets = map(torch.from_numpy, one.data.train)
    for step, places in enumerate(batches(len(inputs), chosen.batch_size, steps, one.seed)):
        optimizer.param_groups[0]["lr"] = chosen.learning_rate(one.learning_rate, step)
        loss = torch.nn.functional.cross_entropy(model(inputs[places]).flatten(0, 1), targets[places].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def test_a_row_that_diverges_touches_no_other():
    rows = [row("AM"), row("AM", seed=1), row("MMA"), row("A")]
    chosen = with_(steps=20)
    healthy, sick = Population(rows, chosen, CPU), Population(rows, chosen, CPU)
    for name, value in sick._weights.items():
        owners = sick._layout.owners(name.partition(".")[0])
        value[[place for place, owner in enumerate(owners) if owner == 1]] = float("nan")
    for each in (healthy, sick):
        each.advance(10)
        each.look()
        each.regroup()
        each.advance(20)
        each.look()
    assert sick.results[1].ended == "diverged"
    assert sick.results[1].steps == 10
    for other in (0, 2, 3):
        # the other groups' sizes changed when the row left, so that only rounding may differ
        assert sick.results[other] == healthy.results[other]
        for name, value in sick.state(other).items():
            torch.testing.assert_close(value, healthy.state(other)[name], atol=1e-12, rtol=0)


def test_rows_leave_when_they_are_solved_or_stuck_and_the_others_go_on():
    noise = np.where(TASKS[0].validation[1] == IGNORE, IGNORE, np.random.default_rng(9).integers(6, size=(70, LENGTH)))
    hopeless = task(validation=(TASKS[0].validation[0], noise))
    rows = [row("AM", 2e-2), row("MM"), row("AA", 5e-3), row("AM", 1e-2, data=hopeless)]
    chosen = with_(steps=300, patience=3, solved=0.9, cosine=False, batch_size=8)
    results = train_population(rows, chosen)
    assert results == [alone(one, chosen) for one in rows]
    assert [result.ended for result in results] == ["solved", "stuck", "solved", "stuck"]
    assert len({result.steps for result in results}) > 2


def test_where_steps_are_recorded_rows_that_are_over_ride_along_unchanged(monkeypatch):
    """Under what stands for CUDA graphs, and with half of the rows over before the others are recorded anew."""
    captured = []

    def capture(function):
        captured.append(function)
        return function

    monkeypatch.setattr(train_module, "recorder", lambda device: capture)
    monkeypatch.setattr(train_module, "REGROUP_SHARE", 0.5)
    rows = [row("AM", 2e-2), *(row("AA", 5e-3 / (1 + i)) for i in range(4)), *(row("MM", seed=i) for i in range(4))]
    chosen = with_(steps=120, patience=5, solved=0.9, cosine=False, batch_size=8)
    results = train_population(rows, chosen)
    assert results == [alone(one, chosen) for one in rows]
    ends = sorted({result.steps for result in results})
    assert 1 < len(captured) < len(ends)  # recorded anew for some departures, but not for each


def test_the_same_call_gives_the_same_bits_and_leaves_the_global_state_alone():
    rows = [row("AMA", seed=seed, data=data) for seed in (0, 1) for data in TASKS]
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.get_float32_matmul_precision()
    weights = []
    for _ in range(2):
        one = Population(rows[:2], with_(precision="float32"), CPU)
        one.advance(20)
        weights.append(one.state(1))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert train_population(rows, SETTINGS) == train_population(rows, SETTINGS)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_float32_matmul_precision() == before[1]


def test_the_order_of_the_rows_does_not_matter():
    rows = [row("AM"), row("MA", 1e-3), row("A", seed=1), row("MMA", data=TASKS[1]), row("M", data=TASKS[2])]
    assert train_population(rows[::-1], SETTINGS)[::-1] == train_population(rows, SETTINGS)


def test_a_grid_at_once_is_a_grid_in_turn():
    rates = (1e-3, 2e-2, 3e-2)
    chosen = with_(learning_rates=rates, steps=200, solved=0.9, cosine=False, batch_size=8)
    runs = train_population([row("AM", rate) for rate in rates], chosen)
    assert best_rate(runs, chosen.solved) == train(CompositeSequence("AM"), TASKS[0], chosen, 0)
    assert runs[1].validation >= 0.9  # so that the third rate must not count


@pytest.mark.parametrize("at_once", [1, 2, 6])
def test_the_caller_drops_rows_whether_or_not_all_fit_at_once(at_once, monkeypatch):
    monkeypatch.setattr(train_module, "rows_at_once", lambda *_: at_once)
    rows = [row(text) for text in ("AM", "MM", "AA", "MA", "M")]
    asked = []

    def worst_half(step, accuracies):
        asked.append((step, sorted(accuracies)))
        return sorted(accuracies, key=accuracies.get)[: len(accuracies) // 2]

    results = train_population(rows, with_(steps=30), prune=worst_half)
    assert [len(left) for _, left in asked] == [5, 3]  # those that end with the budget are not asked about
    expected = [alone(one, with_(steps=30)) for one in rows]
    for result, whole in zip(results, expected, strict=True):
        assert result.curve == whole.curve[: len(result.curve)]
        assert (result.ended, result.steps == 30) in {("dropped", False), ("budget", True)}
    assert sorted(result.steps for result in results) == [10, 10, 20, 30, 30]


def test_out_of_memory_halves_what_is_trained_at_once(monkeypatch, caplog):
    sizes = []

    class Small(Population):
        def __init__(self, rows, *args):
            sizes.append(len(rows))
            super().__init__(rows, *args)

        def advance(self, step):
            if len(self.rows) > 2 or (len(self.rows) == 2 and step > 10):
                try:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
                finally:
                    if len(self.rows) == 2:  # what leaving a capture makes of it
                        raise RuntimeError("operation failed due to a previous error during capture")
            super().advance(step)

    monkeypatch.setattr(train_module, "Population", Small)
    rows = [row(text) for text in ("AM", "MM", "AA", "MA")]
    with caplog.at_level(logging.WARNING):
        results = train_population(rows, SETTINGS)
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert [record.args[1] for record in caplog.records] == [2, 1]
    assert results == [alone(one, SETTINGS) for one in rows]


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def fail(*_):
        raise RuntimeError("expected scalar type Float")

    monkeypatch.setattr(train_module.Population, "advance", fail)
    with pytest.raises(RuntimeError, match="scalar type"):
        train_population([row("AM")], SETTINGS)


def test_no_memory_for_a_single_row_is_an_error_for_people(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_module.Population, "advance", fail)
    with pytest.raises(ComposerError, match=r"cpu has no memory for a single row of 1A1M: .* lower batch_size=4"):
        train_population([row("AM")], SETTINGS)


def test_two_processes_give_what_one_gives():
    rows = [row(text, seed=seed) for text in ("AM", "MM") for seed in (0, 1)]
    assert train_on_devices(rows, SETTINGS, ["cpu", "cpu"]) == train_population(rows, SETTINGS)


def test_devices_that_are_not_there_are_named():
    with pytest.raises(UsageError, match="devices="):
        train_on_devices([row("A")], SETTINGS, [])
    with pytest.raises(UsageError, match="device 'abacus'"):
        train_on_devices([row("A")], SETTINGS, ["cpu", "abacus"])


def test_lower_precisions_follow_the_reference():
    """Bfloat16 has 8 bits: after 20 steps a few of 490 answers may differ; the weights must not."""
    chosen = with_(precision="bfloat16", batch_size=8)
    rows = [row("AMA"), row("MM", 3e-3, 0.1), row("AM", data=TASKS[2])]
    for result, one in zip(train_population(rows, chosen), rows, strict=True):
        assert result.validation == pytest.approx(alone(one, chosen).validation, abs=0.03)
    exact, rounded = (
        train_population([row("AMA")], with_(steps=1, evaluate_every=1, precision=p)) for p in ("float32", "tf32")
    )
    assert exact[0].validation == pytest.approx(rounded[0].validation, abs=0.02)


def test_no_rows_no_results():
    assert train_population([], SETTINGS) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rate": 0.0}, "learning_rate=0"),
        ({"rate": float("nan")}, "learning_rate=nan"),
        ({"decay": -1.0}, "weight_decay=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"data": task(n_train=0)}, "empty"),
    ],
)
def test_impossible_rows_are_named(changes, named):
    with pytest.raises(UsageError, match=named):
        row("AM", **changes)


@pytest.mark.gpu
@pytest.mark.parametrize("fuse", [False, True])
def test_a_gpu_with_its_graphs_trains_as_a_cpu_does(fuse):
    """Rows leave in between, so that steps are recorded more than once; single precision on another machine."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    rows = [row(text, rate) for text in ("AM", "MMA", "MM", "AAM") for rate in (1e-2, 1e30)]
    chosen = with_(precision="float32", steps=40)
    on = {
        device: train_population(rows, dataclasses.replace(chosen, device=device), fuse=fuse and device == "cuda")
        for device in ("cpu", "cuda")
    }
    for cpu, gpu in zip(on["cpu"][::2], on["cuda"][::2], strict=True):
        assert gpu.validation == pytest.approx(cpu.validation, abs=0.03)
    assert {result.ended for result in on["cuda"][1::2]} == {"diverged"}
