"""The benchmark of two processes that train side by side works at its tiny size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minivit.kernels.cpu import run


@pytest.mark.slow
def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.two_processes", "--tiny", "--json", str(tmp_path / "result.json")]
    finished = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert [result["threads"] for result in results] == sorted({1, run.most_threads()})
    assert all(result["times_as_slow"] > 0 for result in results)
