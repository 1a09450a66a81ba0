"""Bayesian optimisation of accuracy together with exact costs, under constraints, by BoTorch.

Only accuracy is modelled, by the Gaussian process that Ax would build. The other parts of the objective are functions
of the sequence, known for every candidate: they enter the acquisition as they are, and constraints are a filter.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.constraints import ENUMERABLE
from composer_search.objectives import ACCURACY, Scalarisation
from composer_search.proposers import Proposal, quiet_single_thread, tried_sequences
from composer_search.region import Region
from composer_search.study import Trial

if TYPE_CHECKING:
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.models import SingleTaskGP
    from torch import Tensor

_FINALISTS = 256
"""Candidates that the acquisition which knows of noise and pending trials is computed for."""

_QUANTILES = 64
_SAMPLES = 256


class BotorchProposer:
    """A Gaussian process on accuracy, and the expected improvement of the objective over all untried candidates.

    First every candidate is ranked by its expected improvement over the best posterior mean, an average over normal
    quantiles; then the best 256 by log noisy expected improvement (qLogNEI; Ament et al., arXiv 2310.20708) with the
    running trials pending. For several goals, each trial draws the weights of an augmented Chebyshev function (ParEGO).
    Spaces of more than 2^16 sequences are represented by a random sample and the neighbours of the best trials.

    Args:
        region: Where candidates may lie, and what is wanted of them.
        seed: Of all choices, with the trial's number.
        initial: Random trials before the process takes over.

    Raises:
        UsageError: If `initial` is below 1.
    """

    def __init__(self, region: Region, seed: int, initial: int) -> None:
        if initial < 1:
            raise UsageError(f"initial={initial}; expected at least 1 trial before the Bayesian ones")
        self.region, self.seed, self.initial = region, seed, initial
        self._fitted: tuple[tuple[tuple[int, CompositeSequence, float], ...], SingleTaskGP] | None = None
        self._believed: tuple[SingleTaskGP, Tensor] | None = None

    def propose(self, trials: Sequence[Trial], running: Sequence[Proposal], number: int) -> Proposal | None:
        """The candidate of the highest acquisition, and a random one before there is a model, or where it fails."""
        rng = random.Random(f"{self.seed}/{number}")
        tried = tried_sequences(trials, running)
        fallback = self.region.draw(tried, rng)
        if fallback is None:
            return None
        scored = sorted((trial for trial in trials if trial.completed), key=lambda trial: trial.trial)
        if len(trials) + len(running) < self.initial or len(scored) < 2:
            return Proposal(number, fallback, "random")
        with quiet_single_thread():
            try:
                sequence = self._best_candidate(scored, running, tried, rng)
            except Exception as error:  # BoTorch and GPyTorch raise many kinds; a search of hours must go on
                return Proposal(number, fallback, "random", f"BoTorch: {type(error).__name__}: {error}")
        return Proposal(number, sequence, "bayesian")

    def snapshot(self, trials: Sequence[Trial]) -> None:
        """There is no state."""

    def _best_candidate(
        self,
        scored: Sequence[Trial],
        running: Sequence[Proposal],
        tried: set[CompositeSequence],
        rng: random.Random,
    ) -> CompositeSequence:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.randrange(2**31))
            goals = [self.region.criteria.goals(trial.sequence, trial.score or 0.0) for trial in scored]
            utility = _Utility(self._weights, Scalarisation.draw(goals, rng))
            seen = self._encode([trial.sequence for trial in scored])
            model = self._model(scored, seen)
            with torch.no_grad():
                sequences, candidates, beliefs = self._candidates(model, scored, tried, rng)
                values = _expected_improvement(model, utility, seen, candidates, beliefs)
                best = values.topk(min(_FINALISTS, len(sequences)))
                pending = self._encode([each.sequence for each in running]) if running else None
                values = _acquisition(model, utility, seen, pending)(candidates[best.indices].unsqueeze(1))
        return sequences[int(best.indices[int(values.argmax())])]

    def _model(self, scored: Sequence[Trial], seen: Tensor) -> SingleTaskGP:
        """The process fitted to the trials, a function of them alone: once for all proposals of a batch."""
        import torch

        key = tuple((trial.trial, trial.sequence, trial.score or 0.0) for trial in scored)
        if self._fitted is None or self._fitted[0] != key:
            with torch.random.fork_rng(devices=[]):  # a fit that fails is tried again from random parameters
                torch.manual_seed(self.seed)
                self._fitted = key, _fit(seen, [score for *_, score in key], len(self._weights))
        return self._fitted[1]

    @property
    def _weights(self) -> list[float]:
        return [goal.get(ACCURACY, 0.0) for goal in self.region.criteria.objective.goals]

    def _candidates(
        self, model: SingleTaskGP, scored: Sequence[Trial], tried: set[CompositeSequence], rng: random.Random
    ) -> tuple[list[CompositeSequence], Tensor, Tensor]:
        """Untried sequences, their encoding and what the process believes of them (`_beliefs`).

        What it believes of a space that is enumerated is computed once for all proposals of a batch.
        """
        import torch

        if self.region.ranks is None:
            sequences = [each for each in self._sample(scored, rng) if each not in tried]
            encoded = self._encode(sequences)
            return sequences, encoded, _beliefs(model, encoded)
        everything, encoded = self._everything
        if self._believed is None or self._believed[0] is not model:
            self._believed = model, _beliefs(model, encoded)
        kept = [place for place, sequence in enumerate(everything) if sequence not in tried]
        places = torch.tensor(kept)
        return [everything[place] for place in kept], encoded[places], self._believed[1][places]

    @cached_property
    def _everything(self) -> tuple[list[CompositeSequence], Tensor]:
        sequences = [self.region.space.at(rank) for rank in self.region.ranks or ()]
        return sequences, self._encode(sequences)

    def _sample(self, scored: Sequence[Trial], rng: random.Random) -> list[CompositeSequence]:
        """Part of a large space: neighbours of the best trials at one and two letters' distance, and random ones."""
        goals = {trial.sequence: self.region.criteria.goals(trial.sequence, trial.score or 0.0) for trial in scored}
        best = sorted(goals, key=lambda sequence: goals[sequence], reverse=True)[:10]
        near = [self.region.mutate(parent, rng) for parent in best for _ in range(ENUMERABLE // 80)]
        near += [self.region.mutate(parent, rng) for parent in near]
        space = self.region.space
        far = [space.at(rng.randrange(space.size)) for _ in range(ENUMERABLE // 4)]
        return [sequence for sequence in dict.fromkeys(near + far) if self.region.allows(sequence)]

    def _encode(self, sequences: Sequence[CompositeSequence]) -> Tensor:
        """Rows of free letters as numbers, 0 and 1 for two primitives and else one-hot, then each goal's exact part."""
        import torch

        space, criteria = self.region.space, self.region.criteria
        letters = space.primitives[1:] if len(space.primitives) == 2 else space.primitives
        rows = [
            [float(letter == each) for letter in space.free_letters(sequence) for each in letters]
            + list(criteria.costs(sequence))
            for sequence in sequences
        ]
        return torch.tensor(rows, dtype=torch.float64)


class _Utility:
    """What is maximised, of samples of accuracy at encoded candidates."""

    def __init__(self, weights: Sequence[float], scalarisation: Scalarisation) -> None:
        self.weights, self.scalarisation = weights, scalarisation

    def __call__(self, samples: Tensor, X: Tensor) -> Tensor:
        """Utilities [..., q] of samples [..., q, 1] at X [..., q, letters + goals]."""
        import torch

        accuracy, costs = samples[..., 0], X[..., -len(self.weights) :].unbind(-1)
        goals = [weight * accuracy + cost for weight, cost in zip(self.weights, costs, strict=True)]
        return self.scalarisation.of(goals, lambda parts: torch.stack(parts).amin(0))


def _fit(seen: Tensor, scores: Sequence[float], goals: int) -> SingleTaskGP:
    """BoTorch's default process of the letters alone: RBF with a length scale a letter, standardised scores."""
    import torch
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms.input import FilterFeatures
    from gpytorch.mlls import ExactMarginalLogLikelihood

    letters = FilterFeatures(feature_indices=torch.arange(seen.shape[1] - goals))
    targets = torch.tensor(scores, dtype=torch.float64).unsqueeze(1)
    model = SingleTaskGP(seen, targets, input_transform=letters)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def _beliefs(model: SingleTaskGP, candidates: Tensor) -> Tensor:
    """Posterior mean and standard deviation of each candidate's accuracy, [candidates, 2]."""
    import torch

    rows = []
    for part in candidates.split(256):  # the covariances within a part cost its square; alone, rows cost far more
        posterior = model.posterior(part)
        rows.append(torch.cat([posterior.mean, posterior.variance.sqrt()], dim=-1))
    return torch.cat(rows)


def _expected_improvement(
    model: SingleTaskGP, utility: _Utility, seen: Tensor, candidates: Tensor, beliefs: Tensor
) -> Tensor:
    """Mean improvement over the best posterior mean, over equally likely quantiles; where it is 0, the mean decides."""
    import torch

    levels = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    quantiles = torch.special.ndtri(levels).view(-1, 1, 1)
    best = utility(model.posterior(seen).mean, seen).max()
    values = []
    for rows, believed in zip(candidates.split(256), beliefs.split(256), strict=True):
        mean, deviation = believed.split(1, dim=-1)
        utilities = utility(mean + deviation * quantiles, rows)
        improvement = (utilities - best).clamp_min(0).mean(0)
        values.append(improvement + 1e-9 * utilities.mean(0))
    return torch.cat(values)


def _acquisition(
    model: SingleTaskGP, utility: _Utility, seen: Tensor, pending: Tensor | None
) -> qLogNoisyExpectedImprovement:
    import torch
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.acquisition.objective import GenericMCObjective
    from botorch.sampling.normal import SobolQMCNormalSampler

    def objective(samples: Tensor, X: Tensor | None = None) -> Tensor:
        if X is None:
            raise ValueError("the exact part of an objective is a function of the candidates")
        return utility(samples, X)

    return qLogNoisyExpectedImprovement(
        model=model,
        X_baseline=seen,
        sampler=SobolQMCNormalSampler(torch.Size([_SAMPLES]), seed=int(torch.randint(2**31, ()))),
        objective=GenericMCObjective(objective),
        X_pending=pending,
        prune_baseline=True,
    )
