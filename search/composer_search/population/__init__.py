"""Hundreds of candidates trained at once: the rows of a population step together on one device.

`train_population` trains `Row`s, each a sequence on a task at a learning rate, a weight decay and a seed; it gives what
`composer_search.trainer.train` gives for one row at a time.
"""

from composer_search.population.devices import train_on_devices
from composer_search.population.feed import Row
from composer_search.population.train import Prune, train_population

__all__ = ["Prune", "Row", "train_on_devices", "train_population"]
