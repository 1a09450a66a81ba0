"""The trainer against a plain loop, and what it chooses by, when it stops, and what it depends on."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search import trainer
from composer_search.candidate import Candidate, Widths
from composer_search.mad import IGNORE
from composer_search.trainer import TaskData, TrainSettings, batches, evaluate, train

SEQUENCE = CompositeSequence.parse("AM")
SETTINGS = TrainSettings(
    widths=Widths(hidden_size=16, num_heads=2, ffn_hidden_size=24),
    steps=30,
    batch_size=8,
    learning_rates=(1e-2,),
    min_learning_rate=1e-5,
    evaluate_every=10,
    patience=0,
    device="cpu",
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def previous_token(seed, n, vocab_size=6, length=8):
    """The target at each position is the token before it: easy for attention, impossible without."""
    inputs = np.random.default_rng(seed).integers(vocab_size, size=(n, length))
    targets = np.full_like(inputs, IGNORE)
    targets[:, 1:] = inputs[:, :-1]
    return inputs, targets


def data(**changes):
    parts = {"train": previous_token(0, 64), "validation": previous_token(1, 32), "test": previous_token(2, 32)}
    return TaskData(vocab_size=6, **(parts | changes))


def with_(**changes):
    return dataclasses.replace(SETTINGS, **changes)


def test_it_does_what_a_plain_loop_does():
    """Same weights, same batches; AdamW unfused, the schedule by torch, the accuracy by NumPy."""
    chosen = with_(steps=20, weight_decay=0.1, evaluate_every=20)
    task = data()
    torch.manual_seed(3)
    model = Candidate(SEQUENCE, 6, chosen.widths)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=1e-5)
    rng = np.random.default_rng(3)
    rows = np.concatenate([rng.permutation(64) for _ in range(3)]).reshape(-1, 8)
    for batch in rows[:20]:
        logits = model(torch.from_numpy(task.train[0][batch]))
        loss = F.cross_entropy(logits[:, 1:].reshape(-1, 6), torch.from_numpy(task.train[1][batch][:, 1:]).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    inputs, targets = task.validation
    right = model(torch.from_numpy(inputs)).argmax(-1).numpy() == targets
    assert train(SEQUENCE, task, chosen, seed=3).validation == pytest.approx(right[:, 1:].mean(), abs=1e-12)
    assert 0.2 < right[:, 1:].mean() < 0.999  # neither chance nor solved, so that a slip would show


def test_the_same_seed_gives_the_same_result_and_leaves_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (train(SEQUENCE, data(), SETTINGS, seed) for seed in (0, 0, 1))
    assert first == second
    assert first != other
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_learns_what_an_mlp_cannot():
    long = with_(steps=300, evaluate_every=50)
    assert train(SEQUENCE, data(), long, 0).test > 0.95
    # chance is 1/6; 32 · 7 scored tokens have a standard error of .025
    assert train(CompositeSequence.parse("MM"), data(), long, 0).test < 0.3


@pytest.mark.parametrize(
    "changes", [{}, {"cosine": False}, {"warmup_steps": 7}, {"cosine": False, "warmup_steps": 7}], ids=str
)
def test_the_schedule_reaches_the_optimizer(changes, monkeypatch):
    used = []

    class Spy(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            used.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    chosen = with_(**changes)
    train(SEQUENCE, data(), chosen, 0)
    warmup = chosen.warmup_steps
    for step in range(30):
        if step < warmup:
            expected = 1e-2 * (step + 1) / warmup
        elif chosen.cosine:
            expected = 1e-5 + (1e-2 - 1e-5) * np.cos(np.pi / 2 * (step - warmup) / (30 - warmup)) ** 2
        else:
            expected = 1e-2
        assert used[step] == pytest.approx(expected, rel=1e-9)


def test_the_rate_is_chosen_on_the_validation_data():
    """Where the validation data reward not learning, the useless rate is right, whatever the test data say."""
    rates = {"learning_rates": (1e-7, 1e-2), "steps": 100}
    normal = train(SEQUENCE, data(), with_(**rates), 0)
    assert normal.learning_rate == 1e-2
    inputs, targets = previous_token(1, 32)
    wrong = np.where(targets == IGNORE, IGNORE, (targets + 3) % 6)
    perverse = train(SEQUENCE, data(validation=(inputs, wrong)), with_(**rates), 0)
    assert perverse.learning_rate == 1e-7
    assert perverse.test < normal.test
    for result in (normal, perverse):
        assert result.validation == max(accuracy for _, accuracy in result.by_rate)
        assert [rate for rate, _ in result.by_rate] == [1e-7, 1e-2]


def test_each_rate_is_trained_as_if_it_were_alone():
    both = train(SEQUENCE, data(), with_(learning_rates=(3e-3, 1e-2)), 0)
    alone = [train(SEQUENCE, data(), with_(learning_rates=(rate,)), 0) for rate in (3e-3, 1e-2)]
    assert both.by_rate == tuple(result.by_rate[0] for result in alone)
    best = max(alone, key=lambda result: result.validation)
    assert dataclasses.replace(both, by_rate=()) == dataclasses.replace(best, by_rate=())


def test_the_test_accuracy_is_that_of_the_best_weights_on_the_validation_data():
    """With the test data equal to the validation data, both accuracies must agree at the best look, not at the last."""
    same = data(test=previous_token(1, 32))
    result = train(SEQUENCE, same, with_(learning_rates=(0.2,), cosine=False, steps=60, evaluate_every=5), 0)
    assert result.test == result.validation == max(accuracy for _, accuracy in result.curve)
    assert result.curve[-1][1] < result.validation  # so high a rate swings


def test_it_stops_when_the_task_is_solved_and_tries_no_further_rate():
    chosen = with_(steps=1000, solved=0.9, learning_rates=(1e-2, 2e-2), cosine=False)
    result = train(SEQUENCE, data(), chosen, 0)
    assert result.steps < 1000
    assert result.curve[-1] == (result.steps, result.validation)
    assert result.validation >= 0.9 > result.curve[-2][1]
    assert len(result.by_rate) == 1


def test_it_stops_when_nothing_gets_better():
    inputs, targets = previous_token(1, 32)
    noise = np.where(targets == IGNORE, IGNORE, np.random.default_rng(9).integers(6, size=targets.shape))
    hopeless = data(validation=(inputs, noise))
    settings = with_(steps=2000, patience=4, cosine=False)
    result = train(SEQUENCE, hopeless, settings, 0)
    assert result.steps < 600
    assert train(SEQUENCE, hopeless, with_(steps=600, patience=0, cosine=False), 0).steps == 600


def test_a_rate_that_diverges_loses_and_ends_early():
    result = train(SEQUENCE, data(), with_(learning_rates=(1e30, 1e-2), steps=100, cosine=False), 0)
    assert result.learning_rate == 1e-2
    alone = train(SEQUENCE, data(), with_(learning_rates=(1e30,), steps=100, cosine=False), 0)
    assert alone.steps == 10
    assert 0 <= alone.validation < 0.5


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 40), size=st.integers(1, 50), steps=st.integers(1, 30), seed=st.integers(0, 5))
def test_an_epoch_has_every_row_at_most_once(rows, size, steps, seed):
    found = list(batches(rows, size, steps, seed))
    assert len(found) == steps
    per_epoch = rows // min(rows, size)
    for start in range(0, steps, per_epoch):
        epoch = np.concatenate(found[start : start + per_epoch])
        assert len(np.unique(epoch)) == len(epoch)
        assert set(epoch) <= set(range(rows))
    assert all(len(batch) == min(rows, size) for batch in found)


def test_accuracy_and_loss_count_the_scored_positions_alone():
    torch.manual_seed(0)
    model = Candidate(SEQUENCE, 6, SETTINGS.widths)
    inputs, targets = previous_token(4, 21)
    targets[::2, 3:] = IGNORE
    counts, loss = evaluate(model, (torch.from_numpy(inputs), torch.from_numpy(targets)), chunk=4)
    logits = model(torch.from_numpy(inputs)).detach().double().numpy()
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, columns = np.nonzero(targets != IGNORE)
    wanted = targets[rows, columns]
    assert counts.accuracy == pytest.approx((logits.argmax(-1)[rows, columns] == wanted).mean(), abs=1e-12)
    assert loss == pytest.approx(-logs[rows, columns, wanted].mean(), rel=1e-5)  # float32 logits


def test_the_metric_can_be_the_mean_over_classes():
    plain = train(SEQUENCE, data(), SETTINGS, 0)
    macro = train(SEQUENCE, data(), with_(metric="macro_accuracy"), 0)
    assert macro.curve != plain.curve


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rates": ()}, "learning_rates="),
        ({"learning_rates": (1e-3, -1.0)}, "learning_rates="),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"metric": "recall"}, "metric='recall'"),
        ({"patience": -1}, "patience=-1"),
        ({"precision": "int8"}, "precision='int8'; expected float32"),
    ],
)
def test_impossible_settings_are_named(changes, named):
    with pytest.raises(UsageError, match=named):
        with_(**changes)


@pytest.mark.parametrize("precision", ["float64", "tf32", "bfloat16"])
def test_other_precisions_learn_the_same(precision):
    """Bfloat16 has 8 bits of mantissa: after 60 steps a few of 224 answers may differ, no more."""
    chosen = with_(steps=60, evaluate_every=60)
    before = torch.get_float32_matmul_precision()
    usual, other = (
        train(SEQUENCE, data(), dataclasses.replace(chosen, precision=p), 0) for p in ("float32", precision)
    )
    assert 0.7 < usual.test < 0.999
    assert other.test == pytest.approx(usual.test, abs=0.03)
    assert torch.get_float32_matmul_precision() == before


def test_a_result_says_why_it_ended():
    inputs, targets = previous_token(1, 32)
    noise = np.where(targets == IGNORE, IGNORE, np.random.default_rng(9).integers(6, size=targets.shape))
    ends = {
        "solved": train(SEQUENCE, data(), with_(steps=1000, solved=0.9, cosine=False), 0),
        "stuck": train(SEQUENCE, data(validation=(inputs, noise)), with_(steps=2000, patience=2, cosine=False), 0),
        "diverged": train(SEQUENCE, data(), with_(learning_rates=(1e30,), steps=100, cosine=False), 0),
        "budget": train(SEQUENCE, data(), with_(weight_decay=0.1), 0),
    }
    assert {name: result.ended for name, result in ends.items()} == {name: name for name in ends}
    assert [result.weight_decay for result in ends.values()] == [0.0, 0.0, 0.0, 0.1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=6))
def test_the_best_rate_is_the_first_of_the_best_up_to_the_first_that_solves(tenths):
    runs = [trainer.TrainResult(n / 10, 0.0, 10.0**-i, 1, (), ()) for i, n in enumerate(tenths)]
    tried = tenths[: next((i for i, n in enumerate(tenths) if n >= 9), len(tenths) - 1) + 1]
    best = trainer.best_rate(runs, solved=0.9)
    assert best.learning_rate == 10.0 ** -tried.index(max(tried))
    assert best.by_rate == tuple((10.0**-i, n / 10) for i, n in enumerate(tried))


def test_a_device_that_is_not_there_is_an_error_for_people():
    with pytest.raises(UsageError, match="device 'abacus'"):
        trainer.choose_device("abacus")


@pytest.mark.gpu
def test_a_gpu_learns_as_a_cpu_does():
    """Over 10 steps single precision on another machine moves an accuracy by no more than a few of 224 tokens."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    cpu, gpu = (train(SEQUENCE, data(), with_(steps=10, device=device), 0) for device in ("cpu", "cuda"))
    assert gpu.validation == pytest.approx(cpu.validation, abs=0.02)


def test_a_task_without_data_is_an_error_for_people():
    with pytest.raises(UsageError, match="empty"):
        train(SEQUENCE, data(test=previous_token(0, 0)), SETTINGS, 0)
