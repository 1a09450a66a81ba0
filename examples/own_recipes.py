"""Recipes of your own: `Recipe` values in any Python file, or functions that return one.

composer-megatron recipe show examples/own_recipes.py:MATCHED
composer-megatron recipe train examples/own_recipes.py:SMALL_BUDGET tokens=2e9 --text TEXT --run-dir RUN
"""

import dataclasses

from composer_megatron.recipes.catalogue import find_recipe
from composer_megatron.recipes.recipe import Recipe
from composer_megatron.sequence import CompositeSequence

STRETCHED = find_recipe("1b-stretched")

# The paper's rule makes the stretched model 9 % bigger than the Llama. This one has 1.7 % more weights than it:
# `composer-megatron extrapolate 2A5M2A3M1A3M --method stretch --match parameters --shape 1b`.
MATCHED = dataclasses.replace(
    STRETCHED,
    name="1b-stretched-matched",
    about="stretched to as many parameters as the Llama has",
    sequence=CompositeSequence.parse("3A8M 3A5M 2A5M"),
    sources={**STRETCHED.sources, "sequence": "extrapolate --match parameters"},
)


def at_budget(recipe: Recipe, flops: float) -> Recipe:
    """The recipe with as many tokens as so many training FLOPs allow: a point of an isoFLOP curve."""
    tokens = int(flops / recipe.architecture.flops_per_token(recipe.seq_len))
    sources = {**recipe.sources, "tokens": f"{flops:.0e} training FLOPs"}
    return dataclasses.replace(recipe, name=f"{recipe.name}-{flops:.0e}", tokens=tokens, sources=sources)


SMALL_BUDGET = at_budget(STRETCHED, 2e19)
