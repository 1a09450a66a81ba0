"""The text evaluator: what a sequence is worth is how well models of it predict held-out text.

Composer's two text proxies (arXiv 2510.00379): ``small-text`` shrinks the model and the data, ``large-text`` the data
alone, its candidates are as wide as a target shape. The text may be anything: a folder of stories such as BabiStories,
books, code. The models are the proxy's own (`composer_search.candidate`): as many key/value heads as query heads, the
output layer untied, a rotary base of 10,000, and as many tokens as the tokenizer finds in the text.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape
from composer_search.candidate import Widths
from composer_search.evaluation import Evaluation, Evaluator
from composer_search.evaluators.mad import training_seed
from composer_search.evaluators.presets import like, nearest
from composer_search.evaluators.settings import fitting_widths, scaled_widths, width_details
from composer_search.population import Row
from composer_search.text_data import TextSample, TextSource, sample_text
from composer_search.text_training import LossResult, train_for_loss
from composer_search.trainer import TrainSettings


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """A whole evaluation; `text_preset` makes the usual ones.

    Attributes:
        name: The preset it started from.
        source: The text and how much of it.
        train: Widths, schedule, learning rates and batch. Every training runs all its steps.
        seeds: Trainings, from different weights and batches.
        seed: Of the choice of text, which every training shares, and of the trainings' seeds.
        weights: Train every sequence at widths that give its blocks so many weights, as in `MadSettings`.
    """

    name: str
    source: TextSource
    train: TrainSettings = field(default_factory=TrainSettings)
    seeds: int = 1
    seed: int = 0
    weights: int | None = None

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the setting."""
        for name, least in (("seeds", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)}; expected at least {least}")


class TextEvaluator(Evaluator):
    """Share of the unigram model's held-out loss that models of the sequence do away with.

    The score is 1 - nats / unigram nats, both per token of the same held-out text, the unigram model being the
    frequencies of the training tokens: 0 knows no context, 1 knows the next token; below 0 is worse than frequencies.
    So a higher score is a lower loss, and scores on one text compare as losses do.

    The learning rate is chosen with the first seed, on validation text; further seeds are trained at that rate. Where a
    loss is no number at every rate the score is NaN, and the details give the reason.

    Args:
        settings: Text, widths, budget and seeds. The text is read and encoded here, once; worker processes are sent
            the encoded sample.

    Raises:
        UsageError: If there is less text than the settings ask for.
        FileError: If the text cannot be read.
        ComposerError: If plain text is given and the package tokenizers is not installed.
    """

    def __init__(self, settings: TextSettings) -> None:
        self.settings = settings
        self.sample: TextSample = sample_text(settings.source, settings.seed)

    @property
    def device(self) -> str:
        """Where candidates are trained."""
        return self.settings.train.device

    def describe(self) -> dict[str, Any]:
        """All settings as JSON values, and a hash of the text instead of where it lies."""
        settings = self.settings
        trainer = settings.train.describe("patience", "solved", "metric", "device")
        source = {key: getattr(settings.source, key) for key in ("seq_len", "n_train", "n_valid", "n_test")}
        text = {"text": self.sample.fingerprint, "vocab_size": self.sample.data.vocab_size}
        matched = {} if settings.weights is None else {"weights": settings.weights}
        trainings = {**trainer, **matched, "seeds": settings.seeds, "seed": settings.seed}
        return {"name": settings.name, **text, **source, **trainings}

    def evaluate(self, sequence: CompositeSequence) -> Evaluation:
        """Train the sequence's models and score them."""
        return self.evaluate_many([sequence])[0]

    def evaluate_many(self, sequences: Sequence[CompositeSequence]) -> list[Evaluation]:
        """Train the models of all sequences at once; an evaluation for each, in their order.

        Raises:
            UsageError: If a sequence holds a primitive unknown to the proxy.
        """
        settings, rates = self.settings, self.settings.train.learning_rates
        first, *others = (training_seed(settings.seed, number) for number in range(settings.seeds))
        left = iter(self._train([(sequence, rate, first) for sequence in sequences for rate in rates]))
        grids = [[next(left) for _ in rates] for _ in sequences]
        chosen = [min(grid, key=lambda result: result.validation) for grid in grids]
        picks = zip(sequences, chosen, strict=True)
        again = iter(self._train([(sequence, best.learning_rate, seed) for sequence, best in picks for seed in others]))
        return [
            self._evaluation(sequence, [best, *(next(again) for _ in others)], grid)
            for sequence, best, grid in zip(sequences, chosen, grids, strict=True)
        ]

    def at_fidelity(self, share: float) -> TextEvaluator:
        """The evaluator with that share of the steps, on the same text."""
        train = self.settings.train
        steps = max(1, round(share * train.steps))
        warmup = min(steps, round(share * train.warmup_steps))
        return self._with(train=dataclasses.replace(train, steps=steps, warmup_steps=warmup))

    def scaled(self, share: Fraction) -> TextEvaluator:
        """The evaluator with every width of the candidates times `share`, on the same text."""
        train = self.settings.train
        return self._with(train=dataclasses.replace(train, widths=scaled_widths(train.widths, share)))

    def with_weights(self, weights: int) -> TextEvaluator:
        """The evaluator with every candidate at widths that give its blocks so many weights, on the same text."""
        return self._with(weights=weights)

    def _with(self, **changes: Any) -> TextEvaluator:
        """The evaluator with other settings; the text need not be read again."""
        other = object.__new__(TextEvaluator)
        other.settings, other.sample = dataclasses.replace(self.settings, **changes), self.sample
        return other

    def _train(self, trainings: Sequence[tuple[CompositeSequence, float, int]]) -> list[LossResult]:
        """A result for each training, in their order; those of the same widths together."""
        train, weights = self.settings.train, self.settings.weights
        places: dict[Widths, list[int]] = {}
        for place, (sequence, _, _) in enumerate(trainings):
            places.setdefault(fitting_widths(sequence, train.widths, weights), []).append(place)
        results: dict[int, LossResult] = {}
        for widths, here in places.items():
            rows = [self._row(*trainings[place]) for place in here]
            results |= zip(here, train_for_loss(rows, dataclasses.replace(train, widths=widths)), strict=True)
        return [results[place] for place in range(len(trainings))]

    def _row(self, sequence: CompositeSequence, rate: float, seed: int) -> Row:
        return Row(sequence, self.sample.data, rate, self.settings.train.weight_decay, seed)

    def _evaluation(
        self, sequence: CompositeSequence, seeds: Sequence[LossResult], grid: Sequence[LossResult]
    ) -> Evaluation:
        best, unigram = seeds[0], self.sample.unigram_nats
        scores = tuple(1 - result.validation / unigram for result in seeds)
        details = {
            "nats": [_finite(result.validation) for result in seeds],
            "test_nats": [_finite(result.test) for result in seeds],
            "unigram_nats": unigram,
            "learning_rate": best.learning_rate,
            "by_rate": [[result.learning_rate, _finite(result.validation)] for result in grid],
            "curve": [[step, _finite(nats)] for step, nats in best.curve],
        } | width_details(sequence, self.settings.train.widths, self.settings.weights)
        if not all(map(math.isfinite, scores)):
            rates = ", ".join(f"{result.learning_rate:g}" for result in grid)
            reason = f"the loss was no number in a training; learning rates tried: {rates}"
            return Evaluation(score=math.nan, details={**details, "reason": reason})
        return Evaluation(
            score=statistics.fmean(scores),
            spread=statistics.stdev(scores) if len(scores) > 1 else 0.0,
            seed_scores=scores,
            tasks={"text": statistics.fmean(scores)},
            test_score=statistics.fmean(1 - result.test / self.sample.unigram_nats_of_test for result in seeds),
            details=details,
        )


def _finite(nats: float) -> float | None:
    """A loss as a JSON value."""
    return nats if math.isfinite(nats) else None


def text_preset(name: str, *, text: Sequence[Path | str], shape: str | None = None, **overrides: Any) -> TextSettings:
    """A preset of the text evaluator with some settings changed.

    - ``small-text``: models 64 wide on 262,144 tokens of a vocabulary of 512; some 18 CPU seconds a candidate of
      six blocks. On Python's library MAMAMM scored .30, 6M .28, 2A4M .21: such short trainings favour early MLPs.
    - ``large-text``: models as wide as `shape` on 8,388,608 tokens; meant for a GPU.

    Args:
        name: The preset.
        text: Text files and folders; or one folder that ``tools/preprocess_text.py`` made, whose tokens are taken.
        shape: The widths of the target, a preset or a JSON file (`composer_megatron.shape.load_shape`); needed by
            ``large-text``, which takes hidden_size, ffn_hidden_size, the heads, and the vocabulary as an upper bound.
        **overrides: Fields of `TextSettings`, `TextSource`, `TrainSettings` and `Widths`.

    Raises:
        UsageError: If there is no such preset or setting, a value is impossible, or text or shape is missing.
        ShapeError: If there is no such shape.
    """
    if name not in ("small-text", "large-text"):
        raise UsageError(f"unknown text evaluator {name!r}{nearest(name, ('small-text', 'large-text'))}")
    paths = (text,) if isinstance(text, str | Path) else tuple(text)
    if not paths:
        raise UsageError(f"{name} needs text: files, folders, or a folder made by tools/preprocess_text.py")
    settings = _small(paths) if name == "small-text" else _large(paths, shape)
    places: dict[str, Any] = {"whole": settings, "source": settings.source, "train": settings.train}
    places["widths"] = settings.train.widths
    fields = {field.name: place for place, part in places.items() for field in dataclasses.fields(part)}
    for fixed in ("name", "source", "train", "widths", "text", "metric", "patience", "solved", "weights"):
        del fields[fixed]
    changes: dict[str, dict[str, Any]] = {place: {} for place in places}
    for key, value in overrides.items():
        if key not in fields:
            raise UsageError(f"the text evaluator has no setting {key!r}{nearest(key, sorted(fields))}")
        place = fields[key]
        changes[place][key] = like(key, value, getattr(places[place], key))
    widths = dataclasses.replace(settings.train.widths, **changes["widths"])
    train = dataclasses.replace(settings.train, widths=widths, **changes["train"])
    source = dataclasses.replace(settings.source, **changes["source"])
    return dataclasses.replace(settings, source=source, train=train, **changes["whole"])


def _small(text: Sequence[Path | str]) -> TextSettings:
    return TextSettings(
        name="small-text",
        source=TextSource(
            text=tuple(map(str, text)), vocab_size=512, seq_len=64, n_train=4096, n_valid=256, n_test=256
        ),
        train=TrainSettings(
            widths=Widths(hidden_size=64, num_heads=4, ffn_hidden_size=256),
            steps=256,
            batch_size=16,
            learning_rates=(3e-3,),
            warmup_steps=16,
            evaluate_every=64,
            patience=0,
            device="cpu",
        ),
        seeds=2,
    )


def _large(text: Sequence[Path | str], shape: str | None) -> TextSettings:
    if shape is None:
        raise UsageError("large-text needs a shape, such as 1b or a JSON file: its widths are the candidates'")
    target = load_shape(shape)
    heads, hidden = target.num_attention_heads, target.hidden_size
    if heads * target.head_dim != hidden:
        given = f"{heads} heads of {target.head_dim} and hidden_size={hidden}"
        raise UsageError(f"shape {target.name}: {given}; the proxy's heads fill hidden_size, choose such a shape")
    source = TextSource(
        text=tuple(map(str, text)), vocab_size=target.vocab_size, seq_len=512, n_train=16_384, n_valid=512, n_test=512
    )
    return TextSettings(
        name="large-text",
        source=source,
        train=TrainSettings(
            widths=Widths(hidden_size=hidden, num_heads=heads, ffn_hidden_size=target.ffn_hidden_size),
            steps=512,
            batch_size=32,
            learning_rates=(3e-4, 1e-3),
            warmup_steps=64,
            evaluate_every=128,
            weight_decay=0.1,
            patience=0,
            precision="bfloat16",
        ),
    )
