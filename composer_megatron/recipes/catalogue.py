"""All recipes by name, and a user's own from a Python file."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from composer_megatron.errors import FileError, UsageError
from composer_megatron.recipes.paper import PAPER
from composer_megatron.recipes.recipe import Recipe
from composer_megatron.recipes.systems import SYSTEMS_AT_1B

RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in (*PAPER, *SYSTEMS_AT_1B)})
"""Every recipe that comes with the package."""


def find_recipe(name: str) -> Recipe:
    """A recipe by its name, or ``FILE.py:NAME``: a `Recipe` in a file of the user's, or a function that returns one.

    Raises:
        UsageError: If there is none, with the nearest name.
        FileError: If the file is missing, or fails when it is run.
    """
    if name in RECIPES:
        return RECIPES[name]
    file, colon, attribute = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_file(Path(file), attribute)
    near = difflib.get_close_matches(name.lower(), RECIPES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "give one of these, or FILE.py:NAME"
    raise UsageError(f"unknown recipe {name!r}: {hint}; recipes: {', '.join(RECIPES)}")


def _from_file(path: Path, attribute: str) -> Recipe:
    values = _run(path)
    if attribute not in values:
        own = [name for name, value in values.items() if isinstance(value, Recipe)]
        near = difflib.get_close_matches(attribute, values, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"recipes in it: {', '.join(own) or 'none'}"
        raise UsageError(f"{path} has no {attribute!r}: {hint}")
    found = values[attribute]
    if callable(found):
        try:
            found = found()
        except Exception as error:
            raise FileError(f"{path}: {attribute}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, Recipe):
        raise UsageError(f"{path}: {attribute} is a {type(found).__name__}; expected a Recipe, or a function of none")
    return found


def _run(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileError(f"{path} is no file: expected Python with a Recipe in it")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileError(f"{path} cannot be run as Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise FileError(f"{path} fails when it is run: {type(error).__name__}: {error}") from error
    return vars(module)
