"""Accuracy of predictions over the scored positions: plain, and the macro average that MAD reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from composer_megatron.errors import UsageError
from composer_search.mad.base import IGNORE


@dataclass(frozen=True)
class Counts:
    """Scored positions by class; counts of batches add up, so that a trainer need not keep its predictions.

    Attributes:
        correct: Positions of the class that were predicted right [classes].
        target: Positions of the class [classes].
        predicted: Positions where the class was predicted [classes].
    """

    correct: NDArray[np.int64]
    target: NDArray[np.int64]
    predicted: NDArray[np.int64]

    @classmethod
    def of(cls, predictions: ArrayLike, targets: ArrayLike, num_classes: int) -> Counts:
        """Count the positions whose target is not -100.

        Args:
            predictions: Predicted tokens [n, length] or any shape; those at unscored positions do not matter.
            targets: Right tokens, of the same shape.
            num_classes: Tokens of the vocabulary.

        Raises:
            UsageError: If the shapes differ, or a scored token is outside [0, num_classes).
        """
        scored_predictions, scored_targets = _scored(predictions, targets)
        for name, tokens in (("predictions", scored_predictions), ("targets", scored_targets)):
            if tokens.size and not (tokens.min() >= 0 and tokens.max() < num_classes):
                raise UsageError(
                    f"{name} go from {tokens.min()} to {tokens.max()}; expected tokens below {num_classes}"
                )
        right = scored_targets[scored_predictions == scored_targets]
        return cls(*(np.bincount(each, minlength=num_classes) for each in (right, scored_targets, scored_predictions)))

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.correct + other.correct, self.target + other.target, self.predicted + other.predicted)

    @property
    def accuracy(self) -> float:
        """The fraction of scored positions that were right."""
        self._require_scored()
        return float(self.correct.sum() / self.target.sum())

    @property
    def macro_accuracy(self) -> float:
        """The mean over classes of the fraction of the class's positions that were right.

        As torchmetrics' ``MulticlassAccuracy(average="macro")``, MAD's metric: a class that is neither target nor
        predicted does not count; one that is predicted but never the target counts as 0. So one wrong token of a class
        that never occurs costs as much as a whole class: 7 of 8 right may be .583.
        """
        self._require_scored()
        occurs = (self.target + self.predicted) > 0
        return float((self.correct[occurs] / np.maximum(self.target[occurs], 1)).mean())

    def _require_scored(self) -> None:
        if not self.target.any():
            raise UsageError(f"nothing to score: every target is {IGNORE}")


def accuracy(predictions: ArrayLike, targets: ArrayLike) -> float:
    """The fraction of scored positions (target not -100) that are right.

    Raises:
        UsageError: If the shapes differ or nothing is scored.
    """
    return _counts(predictions, targets).accuracy


def macro_accuracy(predictions: ArrayLike, targets: ArrayLike, batch_size: int | None = None) -> float:
    """The mean over classes of the accuracy on each; see `Counts.macro_accuracy` for which classes count.

    Args:
        predictions: Predicted tokens [n, length].
        targets: Right tokens [n, length], -100 where not scored.
        batch_size: None counts all sequences together. The reference averages the macro accuracies of batches of 128
            sequences instead; a batch weighs as much as it has sequences. The two differ, since in a small batch more
            classes are rare or absent.

    Raises:
        UsageError: If the shapes differ, or nothing is scored, be it in a single batch.
    """
    predictions, targets = np.asarray(predictions), np.asarray(targets)
    n = len(targets)
    if batch_size is None or n == 0:
        return _counts(predictions, targets).macro_accuracy
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}; expected at least 1")
    starts = range(0, n, batch_size)
    batches = [(predictions[start : start + batch_size], targets[start : start + batch_size]) for start in starts]
    return sum(len(batch[1]) * _counts(*batch).macro_accuracy for batch in batches) / n


def _counts(predictions: ArrayLike, targets: ArrayLike) -> Counts:
    """Counts with as many classes as occur: classes that do not occur never matter."""
    scored = _scored(predictions, targets)
    return Counts.of(*scored, num_classes=1 + max((int(tokens.max()) for tokens in scored if tokens.size), default=0))


def _scored(predictions: ArrayLike, targets: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    predictions, targets = np.asarray(predictions), np.asarray(targets)
    if predictions.shape != targets.shape:
        raise UsageError(f"predictions have shape {predictions.shape}, targets {targets.shape}; expected the same")
    if predictions.dtype.kind not in "iu" or targets.dtype.kind not in "iu":
        raise UsageError(f"predictions are {predictions.dtype}, targets {targets.dtype}; expected whole-number tokens")
    scored = targets != IGNORE
    return predictions[scored].astype(np.int64), targets[scored].astype(np.int64)
