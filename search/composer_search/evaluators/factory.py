"""Any evaluator by name: the one door for programs that let people choose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from composer_megatron.errors import UsageError
from composer_search.evaluation import Evaluator
from composer_search.evaluators.ledger import Ledger
from composer_search.evaluators.mad import MadEvaluator
from composer_search.evaluators.presets import PRESETS, nearest, preset

TEXT_PRESETS = ("small-text", "large-text")

GPU_PRESETS = ("baseline", "full", "proxies", "large-text")
"""Evaluators that train on a GPU where there is one."""

EVALUATORS = MappingProxyType(
    {
        "smoke": "two MAD tasks, for trying things out",
        "demo": "three small MAD tasks, for a CPU",
        "baseline": "the six MAD tasks at their baseline",
        "full": "MAD's whole protocol: 66 settings at 6 recipes",
        "proxies": "recall of many keys, state tracking, variable tracking",
        "small-text": "small models on a little text",
        "large-text": "models as wide as a shape on a little text",
    }
)
"""What `make_evaluator` knows, with a word on each."""


def make_evaluator(
    name: str,
    *,
    text: Sequence[Path | str] = (),
    shape: str | None = None,
    cache_dir: Path | None = None,
    halving: int = 0,
    log: Path | None = None,
    ledger: Path | None = None,
    at_once: int | None = None,
    **overrides: Any,
) -> Evaluator:
    """The evaluator of that name with some settings changed.

    Args:
        name: A name of `EVALUATORS`.
        text: Text files and folders, or one folder of ``tools/preprocess_text.py``; for the text evaluators alone.
        shape: The target's widths, a preset or a JSON file; for ``large-text`` alone.
        cache_dir: Folder for generated MAD data.
        halving: Rungs of successive halving (`composer_search.fidelity`); 0 or 1 for none.
        log: File where halving keeps what it has measured; without it an interrupted rung is lost.
        ledger: File of finished trainings on MAD tasks (`composer_search.evaluators.ledger`).
        at_once: Trainings on MAD tasks after which those go to the ledger; None for as many as train together.
        **overrides: Settings of the evaluator, as `preset` and `text_preset` take them.

    Raises:
        UsageError: If there is no such evaluator or setting, a value is impossible or one is missing.
    """
    if name not in EVALUATORS:
        raise UsageError(f"unknown evaluator {name!r}{nearest(name, EVALUATORS)}")
    owned = (("text", text, TEXT_PRESETS), ("shape", shape, ("large-text",)))
    for option, value, owners in (*owned, ("trainings", ledger, PRESETS), ("at_once", at_once, PRESETS)):
        if value and name not in owners:
            raise UsageError(f"{option}={value!r} belongs to the evaluator {' or '.join(owners)}, not to {name}")
    evaluator: MadEvaluator | Any
    if name in PRESETS:
        evaluator = MadEvaluator(
            preset(name, **overrides), cache_dir, None if ledger is None else Ledger(ledger), at_once
        )
    else:
        from composer_search.text_evaluator import TextEvaluator, text_preset

        evaluator = TextEvaluator(text_preset(name, text=text, shape=shape, **overrides))
    if halving in (0, 1):
        return evaluator
    from composer_search.fidelity import Halving, HalvingEvaluator

    return HalvingEvaluator(evaluator, Halving(rungs=halving), log=log)
