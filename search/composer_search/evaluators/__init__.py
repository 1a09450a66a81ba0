"""Evaluators: what a sequence is worth. `make_evaluator` makes any of them by name.

- `MadEvaluator`: accuracy of tiny models on synthetic tasks; `preset` makes its settings.
- `composer_search.text_evaluator.TextEvaluator`: loss of small or wide models on text.
- `composer_search.fidelity.HalvingEvaluator`: any of them, with less training for what starts badly.
"""

from composer_search.evaluators.factory import EVALUATORS, GPU_PRESETS, make_evaluator
from composer_search.evaluators.mad import MadEvaluator, training_seed
from composer_search.evaluators.presets import PRESETS, preset
from composer_search.evaluators.settings import MadSettings, TaskPlan

__all__ = [
    "EVALUATORS",
    "GPU_PRESETS",
    "PRESETS",
    "MadEvaluator",
    "MadSettings",
    "TaskPlan",
    "make_evaluator",
    "preset",
    "training_seed",
]
