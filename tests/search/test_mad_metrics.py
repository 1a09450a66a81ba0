"""Accuracy and macro accuracy against definitions written out class by class."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_megatron.errors import UsageError
from composer_search.mad import IGNORE, Counts, accuracy, macro_accuracy


def slow_macro(predictions, targets):
    pairs = [(p, t) for p, t in zip(np.ravel(predictions), np.ravel(targets), strict=True) if t != IGNORE]
    recalls = []
    for label in {p for p, _ in pairs} | {t for _, t in pairs}:
        of_class = [p == t for p, t in pairs if t == label]
        recalls.append(Fraction(sum(of_class), len(of_class)) if of_class else Fraction(0))
    return sum(recalls) / len(recalls)


@st.composite
def scored_batches(draw):
    n, length, classes = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    targets = rng.integers(classes, size=(n, length))
    targets[:, 1:][rng.random((n, length - 1)) < 0.4] = IGNORE  # the first place of each sequence is scored
    predictions = np.where(
        rng.random((n, length)) < 0.5, np.abs(targets) % classes, rng.integers(classes, size=(n, length))
    )
    return predictions, targets, classes


@given(scored_batches())
def test_both_accuracies_are_their_definitions(batch):
    predictions, targets, _ = batch
    scored = targets != IGNORE
    assert accuracy(predictions, targets) == pytest.approx((predictions == targets)[scored].mean())
    assert macro_accuracy(predictions, targets) == pytest.approx(float(slow_macro(predictions, targets)))
    # Unscored predictions, even impossible ones, do not matter.
    assert macro_accuracy(np.where(scored, predictions, 99), targets) == macro_accuracy(predictions, targets)
    assert macro_accuracy(np.where(scored, targets, -1), targets) == 1.0


@given(scored_batches(), st.integers(1, 10))
def test_counts_of_batches_add_up_and_batch_averages_weigh_by_sequences(batch, size):
    predictions, targets, classes = batch
    starts = range(0, len(targets), size)
    batches = [(predictions[start : start + size], targets[start : start + size]) for start in starts]
    empty = np.zeros(classes, np.int64)
    total = sum((Counts.of(*each, num_classes=classes) for each in batches), start=Counts(empty, empty, empty))
    assert total.accuracy == pytest.approx(accuracy(predictions, targets))
    assert total.macro_accuracy == pytest.approx(macro_accuracy(predictions, targets))
    expected = sum(len(each[1]) * slow_macro(*each) for each in batches) / len(targets)
    assert macro_accuracy(predictions, targets, batch_size=size) == pytest.approx(float(expected))


def test_one_false_positive_costs_a_whole_class():
    """7 of 8 right: classes 0 (4 of 4), 1 (3 of 4) and 2 (never the target: 0)."""
    targets, predictions = np.array([[0, 0, 0, 0, 1, 1, 1, 1]]), np.array([[0, 0, 0, 0, 1, 1, 1, 2]])
    assert accuracy(predictions, targets) == 7 / 8
    assert macro_accuracy(predictions, targets) == pytest.approx((1 + 0.75 + 0) / 3)
    assert round(macro_accuracy(predictions, targets), 3) == 0.583


def test_absent_classes_do_not_count():
    assert Counts.of([[5, 5]], [[5, 5]], num_classes=1000).macro_accuracy == 1.0


def test_batches_of_128_differ_from_all_at_once():
    """Class 1 occurs in the second batch alone and is always wrong there: (1 + 0.5) / 2 against (1 + 0) / 2."""
    targets = np.zeros((256, 2), int)
    targets[128:, 1] = 1
    predictions = np.zeros((256, 2), int)
    assert macro_accuracy(predictions, targets) == 0.5
    assert macro_accuracy(predictions, targets, batch_size=128) == 0.75


def test_torch_tensors_will_do():
    targets = torch.tensor([[1, IGNORE], [0, 1]])
    assert accuracy(torch.tensor([[1, 0], [1, 1]]), targets) == pytest.approx(2 / 3)
    assert macro_accuracy(torch.tensor([[1, 0], [1, 1]]), targets, batch_size=1) == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize("score", [accuracy, macro_accuracy])
@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([[1, 1]], [[IGNORE, IGNORE]], "nothing to score: every target is -100"),
        ([], [], "expected whole-number tokens|nothing to score"),
        ([[1]], [[1, 1]], r"predictions have shape \(1, 1\), targets \(1, 2\)"),
        ([[0.5]], [[1]], "predictions are float64"),
        ([[-1]], [[1]], "predictions go from -1 to -1"),
        ([[1]], [[-5]], "targets go from -5 to -5"),
    ],
)
def test_what_cannot_be_scored_is_refused(score, predictions, targets, message):
    with pytest.raises(UsageError, match=message):
        score(predictions, targets)


def test_classes_and_batches_out_of_range_are_refused():
    with pytest.raises(UsageError, match="predictions go from 0 to 7; expected tokens below 4"):
        Counts.of([[0, 7]], [[0, 1]], num_classes=4)
    with pytest.raises(UsageError, match="batch_size=0"):
        macro_accuracy([[1]], [[1]], batch_size=0)
