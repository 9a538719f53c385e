"""Datasets, their file formats, and batches for training."""

from .augmentation import POLICIES
from .batches import Batches
from .dataset import Dataset
from .decode import prepare
from .load import load_data

__all__ = ["POLICIES", "Batches", "Dataset", "load_data", "prepare"]
