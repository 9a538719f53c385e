"""What the tests of the benchmarks share."""

import subprocess
import sys
from pathlib import Path


def run(name, *options):
    """What `python -m benchmarks.NAME --tiny` prints."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--tiny", *map(str, options)]
    finished = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
