"""The data types of arrays: NumPy's floating-point types and bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def is_floating(dtype: np.dtype) -> bool:
    """Whether arrays of this dtype can have gradients."""
    return dtype.kind == "f" or dtype == BFLOAT16


def result_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The dtype of an op's result, given those of its floating-point inputs: bfloat16 if any of them is, otherwise the first."""
    return BFLOAT16 if BFLOAT16 in dtypes else dtypes[0]


def accumulator_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype in which values of this dtype are summed."""
    return np.dtype(np.float32) if dtype == BFLOAT16 else dtype
