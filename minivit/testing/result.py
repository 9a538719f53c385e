"""The accumulated result of a check."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class CheckResult:
    """The number of checked directions and elements, the largest error, and the first failure."""

    directions: int = 0
    elements: int = 0
    worst: float = 0.0
    failure: str = ""  # the message of the first failure

    def note(self, error: float, passed: bool, failure: str) -> None:
        """Record one comparison: its relative error, whether it passed, and the message if it did not."""
        self.worst = max(self.worst, float(error)) if np.isfinite(error) else np.inf
        if not passed and not self.failure:
            self.failure = failure
