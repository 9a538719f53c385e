"""Optimizers on one flat buffer of parameters, registered by name, and learning-rate schedules.

Values that change between steps, such as learning rate and step number, are stored in arrays, so that a recorded step can be replayed.
"""

from .adamw import AdamW
from .flat import FlatParameters
from .muon import Muon
from .optimizer import OPTIMIZERS, Optimizer
from .schedules import SCHEDULES
from .sgd import SGD

__all__ = ["OPTIMIZERS", "SCHEDULES", "SGD", "AdamW", "FlatParameters", "Muon", "Optimizer"]
