"""Optimizers over one flat buffer of parameters, found by name, and learning-rate schedules.

What changes from step to step, learning rate and step number, lies in arrays, so that a recorded step can be replayed.
"""

from .adamw import AdamW
from .flat import FlatParameters
from .optimizer import OPTIMIZERS, Optimizer
from .schedules import SCHEDULES
from .sgd import SGD

__all__ = ["OPTIMIZERS", "SCHEDULES", "SGD", "AdamW", "FlatParameters", "Optimizer"]
