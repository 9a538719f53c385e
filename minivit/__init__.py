"""minivit: train and run small vision transformers and mixers with NumPy and Numba alone.

The public names are imported when they are first used, so that `import minivit` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {  # public name -> the module that defines it
    "Tensor": "tensor",
    "no_grad": "tensor",
    "Module": "module",
    "Parameter": "module",
    "create_model": "models",
    "list_models": "models",
    "load_weights": "weights",
    "save_weights": "weights",
    "gradcheck": "checking",
    "GradientError": "checking",
    "Trainer": "training",
    "TrainingError": "training",
    "train": "training",
    "Run": "training",
    "Predictor": "predict",
    "load": "predict",
    "calibrate": "calibrating",
    "Calibration": "calibration",
    "profile": "profiling",
    "Profile": "profiling",
    "load_data": "data",
    "Dataset": "data",
    "UserError": "errors",
}
_MODULES = {"data", "functional", "layers", "models", "plots"}

__all__ = ["__version__", *_HOME, *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'minivit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
