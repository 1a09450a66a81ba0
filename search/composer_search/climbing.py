"""Ax's acquisition with climbs that go up together.

BoTorch's `optimize_acqf_discrete_local_search`, which Ax takes for discrete spaces too large to enumerate, climbs from
one start after the other and asks for sixteen values at a time, where what a call costs hardly depends on their number.
Of one-hot vectors Ax rounds points of a continuum, and comes upon those again that it should pass by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from ax.adapter.transforms.one_hot import OH_PARAM_INFIX
from ax.core.search_space import SearchSpaceDigest
from ax.generators.torch.botorch_modular.acquisition import Acquisition, determine_optimizer
from ax.generators.torch.botorch_modular.optimizer_defaults import NUM_RESTARTS, RAW_SAMPLES
from ax.generators.utils import mk_discrete_choices
from torch import Tensor
from torch.nn import functional as F


class ClimbingAcquisition(Acquisition):
    """Ax's acquisition; only large discrete spaces and one-hot vectors are searched here, one candidate at a time."""

    def optimize(
        self, n: int, search_space_digest: SearchSpaceDigest, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates [n, features], the value of their acquisition, and a weight of 1 each; see Ax's own."""
        names = search_space_digest.feature_names
        choices = mk_discrete_choices(search_space_digest, options.get("fixed_features"))
        method = determine_optimizer(search_space_digest, self.acqf, choices)
        one_hot = all(OH_PARAM_INFIX in name for name in names)
        here = one_hot or method == "optimize_acqf_discrete_local_search"
        if not here or n != 1 or options.get("inequality_constraints"):
            return super().optimize(n, search_space_digest, *args, **options)
        known = [each for each in (self.X_observed, self.X_pending) if each is not None]
        avoid = torch.cat(known) if known else torch.zeros(0, len(names), dtype=self.dtype)
        with torch.no_grad():
            if one_hot:
                sizes = list(Counter(name.rpartition(OH_PARAM_INFIX)[0] for name in names).values())
                best, value = _climb_one_hot(self.acqf, sizes, avoid)
            else:
                letters = [torch.tensor(choices[place], dtype=self.dtype) for place in range(len(choices))]
                best, value = climb(self.acqf, letters, avoid, NUM_RESTARTS, RAW_SAMPLES)
        return best.unsqueeze(0), value, torch.ones(1, dtype=self.dtype)


def _climb_one_hot(acquisition: Callable[[Tensor], Tensor], sizes: list[int], avoid: Tensor) -> tuple[Tensor, Tensor]:
    """`climb` where each place is a one-hot vector, of `sizes` letters: over the letters' numbers."""

    def encoded(points: Tensor) -> Tensor:
        parts = zip(points.long().unbind(-1), sizes, strict=True)
        return torch.cat([F.one_hot(part, size) for part, size in parts], dim=-1).to(avoid)

    letters = [torch.arange(size).to(avoid) for size in sizes]
    numbers = torch.stack([part.argmax(dim=1) for part in avoid.split(sizes, dim=1)], dim=1).to(avoid)
    best, value = climb(lambda points: acquisition(encoded(points)), letters, numbers, NUM_RESTARTS, RAW_SAMPLES)
    return encoded(best), value


def climb(
    acquisition: Callable[[Tensor], Tensor], letters: list[Tensor], avoid: Tensor, climbs: int, samples: int
) -> tuple[Tensor, Tensor]:
    """The best end, [places], of steepest ascents of one letter at a time from the best random points, and its value.

    Args:
        acquisition: Of points [points, 1, places].
        letters: The values that each place may take.
        avoid: Points [points, places] that are passed by.
        climbs: Ascents at most.
        samples: Random points, of which the best are where the ascents start.

    Raises:
        RuntimeError: If no point is left among the random ones.
    """
    points = torch.stack([each[torch.randint(len(each), (samples,))] for each in letters], dim=1)
    points = torch.unique(points, dim=0)
    points = points[~_contained(points, avoid)]
    if len(points) == 0:
        raise RuntimeError(f"none of {samples} random points is untried")
    values, order = acquisition(points.unsqueeze(1)).topk(min(climbs, len(points)))
    points = points[order]
    while True:
        near = _neighbours(points, letters)
        rows, places = torch.unique(near.flatten(0, 1), dim=0, return_inverse=True)
        allowed = ~_contained(rows, avoid)
        heights = torch.full((len(rows),), -torch.inf, dtype=values.dtype)
        if allowed.any():
            heights[allowed] = acquisition(rows[allowed].unsqueeze(1))
        higher, which = heights[places].view(near.shape[:2]).max(dim=1)
        going = higher > values
        if not going.any():
            top = values.argmax()
            return points[top], values[top]
        points = torch.where(going.unsqueeze(1), near[torch.arange(len(near)), which], points)
        values = torch.where(going, higher, values)


def _neighbours(points: Tensor, letters: list[Tensor]) -> Tensor:
    """Each point with one place set to each of its letters, itself among them: [points, all letters, places]."""
    near = []
    for place, values in enumerate(letters):
        for value in values:
            changed = points.clone()
            changed[:, place] = value
            near.append(changed)
    return torch.stack(near, dim=1)


def _contained(points: Tensor, others: Tensor) -> Tensor:
    """Which of the points are among the others."""
    return (points.unsqueeze(1) == others).all(dim=-1).any(dim=-1)
