"""Datasets, the formats they are read from, and the batches that training takes from them."""

from .augmentation import POLICIES
from .batches import Batches
from .dataset import Dataset
from .decode import prepare
from .load import load_data

__all__ = ["POLICIES", "Batches", "Dataset", "load_data", "prepare"]
