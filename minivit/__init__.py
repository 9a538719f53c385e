"""minivit: train and run small vision transformers and mixers with NumPy and Numba alone.

Public names are imported on first access, so that `import minivit` is instant.
"""

from __future__ import annotations

from importlib import import_module

from .version import __version__

TYPE_CHECKING = False  # as in `typing`, whose import takes longer than all others here
if TYPE_CHECKING:
    from typing import Any

_DEFINED_IN = {  # public name -> the module that defines it
    "Tensor": "tensor",
    "from_dlpack": "tensor",
    "no_grad": "grad_mode",
    "Module": "nn.module",
    "Parameter": "nn.module",
    "create_model": "models",
    "list_models": "models",
    "load_weights": "io.weights",
    "save_weights": "io.weights",
    "gradcheck": "testing.gradcheck",
    "GradientError": "testing.gradcheck",
    "Trainer": "training.trainer",
    "TrainingError": "training.trainer",
    "train": "training.train",
    "Run": "training.train",
    "Predictor": "inference.predictor",
    "load": "inference.classifier",
    "calibrate": "inference.calibrate",
    "export": "inference.export",
    "Calibration": "models.cascade.calibration",
    "report": "reports.report",
    "compare": "reports.compare",
    "Comparison": "reports.compare",
    "serve": "serving.serve",
    "profile": "training.profiling",
    "Profile": "training.profiling",
    "load_data": "data",
    "Dataset": "data",
    "UserError": "errors",
}
_NEED_EXTRAS = {"VisionClassifier": "training.estimator"}  # the same, of names that need more packages: no part of `import *`
_SUBMODULES = {"data", "functional", "layers", "models", "plots"}

__all__ = ["__version__", *_DEFINED_IN, *sorted(_SUBMODULES)]


def __getattr__(name: str) -> Any:
    if module := _DEFINED_IN.get(name) or _NEED_EXTRAS.get(name):
        return getattr(import_module(f".{module}", __name__), name)
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'minivit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
