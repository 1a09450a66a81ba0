"""The six synthetic tasks of MAD (arXiv 2403.17844) and some beside them: data sets, metrics, settings.

`dataset` makes a data set of a task of `TASKS` (MAD's) or `PROXIES`, `cached_dataset` keeps it on disk,
`macro_accuracy` and `accuracy` score predictions, `baseline` and `difficulty_sweep` list the settings that MAD's
benchmark scores. NumPy alone.
"""

from composer_search.mad.base import IGNORE, Sampler
from composer_search.mad.cache import cached_dataset
from composer_search.mad.data import GENERATOR_VERSION, dataset
from composer_search.mad.metrics import Counts, accuracy, macro_accuracy
from composer_search.mad.sweep import CHANGES, Setting, baseline, difficulty_sweep
from composer_search.mad.tasks import PROXIES, TASKS, Task

__all__ = [
    "CHANGES",
    "GENERATOR_VERSION",
    "IGNORE",
    "PROXIES",
    "TASKS",
    "Counts",
    "Sampler",
    "Setting",
    "Task",
    "accuracy",
    "baseline",
    "cached_dataset",
    "dataset",
    "difficulty_sweep",
    "macro_accuracy",
]
