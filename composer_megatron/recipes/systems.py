"""The systems that a Composite is compared with, at 1b, trained as the models of `paper.py` are."""

from __future__ import annotations

from composer_megatron.recipes.paper import SIZES, paper_recipe
from composer_megatron.recipes.recipe import Recipe
from composer_megatron.shape import PRESETS
from composer_megatron.systems import SYSTEMS, System


def _recipe(system: System) -> Recipe:
    size = SIZES["1b"]
    sequence = str(system.sequence(PRESETS[size.shape]))
    return paper_recipe(size, f"{size.shape}-{system.name}", system.title, sequence, system.source)


SYSTEMS_AT_1B = tuple(_recipe(system) for system in SYSTEMS.values() if system.name != "llama")
"""One recipe for each system but Llama, which is among the paper's."""
