"""``field=value`` on the command line: changes to a recipe, and sizes of its layout."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from composer_megatron.errors import UsageError
from composer_megatron.recipes.recipe import CHANGED, Recipe
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape

LAYOUT_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "tp": "tensor_parallel",
        "pp": "pipeline_parallel",
        "vpp": "virtual_stages",
        "cp": "context_parallel",
        "micro_batch_size": "micro_batch_size",
        "recompute": "recompute",
    }
)
"""How a field of `composer_megatron.layout.Layout` is called on the command line."""

_NOT_CHANGED = ("name", "about", "sources")


@dataclass(frozen=True)
class Request:
    """A recipe as it was asked for.

    Attributes:
        recipe: With the user's changes.
        layout: Fields of the layout that the user fixes; empty where it is to be chosen.
    """

    recipe: Recipe
    layout: Mapping[str, Any]


def apply(recipe: Recipe, assignments: Sequence[str]) -> Request:
    """Change a recipe by texts such as ``tokens=1e9``, ``shape=tiny``, ``tp=2``; ``steps`` stands for their tokens.

    Raises:
        UsageError: For a text that is no assignment, an unknown field (with the nearest one), or a bad value.
    """
    types = {each.name: str(each.type) for each in dataclasses.fields(Recipe) if each.name not in _NOT_CHANGED}
    changed: dict[str, Any] = {}
    layout: dict[str, Any] = {}
    steps = None
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{text!r} is no change to recipe {recipe.name}: expected field=value, such as tokens=1e9")
        if name in types:
            changed[name] = _convert(name, value, types[name])
        elif name in LAYOUT_FIELDS:
            layout[LAYOUT_FIELDS[name]] = _convert(name, value, "str" if name == "recompute" else "int")
        elif name == "steps":
            steps = _convert(name, value, "int")
        else:
            near = _nearest(name, [*types, *LAYOUT_FIELDS, "steps"])
            everything = f"composer-megatron recipe show {recipe.name} lists its fields"
            raise UsageError(f"recipe {recipe.name} has no field {name!r}: did you mean {near!r}? ({everything})")
    if steps is not None:
        if "tokens" in changed:
            raise UsageError(f"tokens={changed['tokens']} and steps={steps}: give one of them")
        changed["tokens"] = steps * dataclasses.replace(recipe, **changed).step_tokens
    sources = dict(recipe.sources) | dict.fromkeys(changed, CHANGED)
    return Request(dataclasses.replace(recipe, **changed, sources=sources), MappingProxyType(layout))


def _nearest(name: str, known: Sequence[str]) -> str:
    """The name that comes closest, abbreviations by initials included: ``lr`` is ``learning_rate``."""
    initials = {"".join(word[0] for word in each.split("_")): each for each in known if "_" in each}
    if name in initials:
        return initials[name]
    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]


def _convert(name: str, text: str, kind: str) -> Any:
    convert, expected = _READ.get(kind, (str, "text"))
    try:
        return convert(text)
    except UsageError as error:
        raise UsageError(f"{name}={text}: {error}") from None
    except ValueError:
        raise UsageError(f"{name}={text}: expected {expected}") from None


def _whole(text: str) -> int:
    """``8192``, ``37_500_000_000`` or ``37.5e9``."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise ValueError(text) from None
        return int(value)


_READ: Mapping[str, tuple[Callable[[str], Any], str]] = MappingProxyType(
    {
        "int": (_whole, "a whole number, such as 8192 or 37.5e9"),
        "float": (float, "a number"),
        "CompositeSequence": (CompositeSequence.parse, "a sequence"),
        "Shape": (load_shape, "a shape"),
    }
)
"""How a value is read, by the type of its field, and what was expected where that fails."""
