"""The Gaussian process by which a Bayesian search models scores, fitted to a study: BoTorch's `SingleTaskGP`."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence
from composer_search.evidence.ranks import Floats

LEAST = 4
"""Fewer scores than these say nothing about length scales and noise."""


@dataclass(frozen=True)
class Posterior:
    """What the process believes of some sequences: mean [n] and standard deviation [n] of the noise-free score."""

    mean: Floats
    deviation: Floats


def available() -> bool:
    """Whether BoTorch is installed."""
    return importlib.util.find_spec("botorch") is not None


def fit_posterior(
    sequences: Sequence[CompositeSequence], scores: Floats, queries: Sequence[CompositeSequence]
) -> Posterior:
    """Fit the process to scores and ask it about other sequences of the same length.

    Inputs are one 0/1 column for each block, or one-hot columns where there are more than two primitives, as Ax makes
    them. The kernel and the priors are `SingleTaskGP`'s own; the noise is inferred.

    Args:
        sequences: What was tried.
        scores: Their scores, [n].
        queries: What is asked about.

    Raises:
        UsageError: If there are too few scores, they are all equal, or lengths differ.
        ComposerError: If BoTorch is not installed, or the fit fails.
    """
    if len(sequences) < LEAST or np.ptp(scores) == 0:
        raise UsageError(f"{len(sequences)} scores; a Gaussian process needs at least {LEAST}, not all equal")
    if len({len(sequence) for sequence in (*sequences, *queries)}) > 1:
        raise UsageError("sequences of several lengths; a Gaussian process needs one length")
    if not available():
        raise ComposerError('the Gaussian process needs BoTorch: pip install "composer-megatron[search]"')
    import torch
    from botorch.exceptions import ModelFittingError
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from gpytorch.mlls import ExactMarginalLogLikelihood

    letters = [symbol for symbol in PRIMITIVES if any(symbol in each.letters for each in (*sequences, *queries))]
    points, asked = (torch.from_numpy(_encode(each, letters)) for each in (sequences, queries))
    targets = torch.from_numpy(np.asarray(scores, dtype=np.float64)).unsqueeze(-1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small matrices: threads only wait for each other
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = SingleTaskGP(points, targets, outcome_transform=Standardize(m=1))
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            with torch.no_grad():
                belief = model.posterior(asked)
    except ModelFittingError as error:
        raise ComposerError(f"the Gaussian process could not be fitted: {error}") from None
    finally:
        torch.set_num_threads(threads)
    return Posterior(belief.mean.squeeze(-1).numpy(), belief.variance.clamp_min(0).sqrt().squeeze(-1).numpy())


def _encode(sequences: Sequence[CompositeSequence], letters: Sequence[str]) -> Floats:
    """[n, blocks] of 0 and 1 for up to two letters, else [n, blocks · letters]."""
    columns = letters[1:] or letters if len(letters) <= 2 else letters
    return np.array(
        [[float(block == letter) for block in each for letter in columns] for each in sequences], dtype=np.float64
    )
