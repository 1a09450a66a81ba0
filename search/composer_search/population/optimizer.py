"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) with a learning rate and a weight decay of its own for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from composer_search.population.layout import Layout
from composer_search.population.operations import BETAS, Operations, Plain
from composer_search.trainer import TrainSettings


class AdamW:
    """The state of AdamW for stacked weights; all rows have taken the same number of steps.

    Args:
        layout: Tells whose a weight is.
        weights: The stacked weights, changed in place.
        recipes: For each row, the column of `coefficients` that it follows.
        state: First and second moments from before; zeros where there are none.
        operations: Computes the step; PyTorch's own without it.
    """

    def __init__(
        self,
        layout: Layout,
        weights: Mapping[str, Tensor],
        recipes: Sequence[int],
        state: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None,
        operations: Operations | None = None,
    ) -> None:
        self._operations = operations or Plain()
        zeros = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
        self.first, self.second = state or tuple(zeros)
        self._weights = list(weights.values())
        self._kinds = [name.partition(".")[0] for name in weights]
        device = self._weights[0].device
        self._recipes = {
            kind: torch.tensor([recipes[row] for row in layout.owners(kind)], device=device)
            for kind in dict.fromkeys(self._kinds)
        }

    @torch.no_grad()
    def step(self, gradients: list[Tensor], coefficients: Tensor) -> None:
        """Take a step with the step's `coefficients` [3, recipes]; nothing is read back from the device."""
        of_kind = {kind: coefficients.index_select(1, recipe) for kind, recipe in self._recipes.items()}
        moments = list(self.first.values()), list(self.second.values())
        self._operations.update(self._weights, gradients, moments, [of_kind[kind] for kind in self._kinds])


def coefficients(settings: TrainSettings, recipes: Sequence[tuple[float, float]], first: int, last: int) -> Tensor:
    """What `AdamW.step` multiplies by at the steps from `first` to before `last`.

    Args:
        settings: The schedule.
        recipes: (peak learning rate, weight decay) of each recipe.
        first: Steps are counted from 0.
        last: One past the last step.

    Returns:
        [steps, 3, recipes]: ``1 - rate · decay``, ``rate / (1 - β₁^t)`` and ``sqrt(1 - β₂^t)``, computed in float64.
    """
    table = []
    for step in range(first, last):
        rates = [settings.learning_rate(peak, step) for peak, _ in recipes]
        corrections = [1 - beta ** (step + 1) for beta in BETAS]
        decay = [1 - rate * decay for rate, (_, decay) in zip(rates, recipes, strict=True)]
        table.append([decay, [rate / corrections[0] for rate in rates], [corrections[1] ** 0.5] * len(recipes)])
    return torch.tensor(table, dtype=torch.float64).to(settings.weight_dtype)
