"""The benchmarks, which are not installed, for their tests: importing this file makes `benchmarks` importable."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def run(name, *options):
    """What `python -m benchmarks.NAME --tiny` prints."""
    finished = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--tiny", *map(str, options)], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
