"""The result of a check, as it grows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class CheckResult:
    """How much a check has tried so far, and the first failure."""

    directions: int = 0
    elements: int = 0
    worst: float = 0.0
    failure: str = ""  # the first

    def note(self, error: float, passed: bool, failure: str) -> None:
        self.worst = max(self.worst, float(error)) if np.isfinite(error) else np.inf
        if not passed and not self.failure:
            self.failure = failure
