"""Pretraining runs as Python values: which model, on how much of what, by which schedule.

Read `recipe.py`, then `paper.py`. `catalogue.py` finds one by name, `changes.py` reads ``field=value``, `layouts.py`
puts it on GPUs. A recipe of your own is a `Recipe` in any Python file: ``composer-megatron recipe show FILE.py:NAME``.
"""

from composer_megatron.recipes.recipe import Recipe

__all__ = ["Recipe"]
