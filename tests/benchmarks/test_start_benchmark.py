"""Imports and first steps."""

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import start


def test_import_is_timed_and_light(tmp_path):
    assert 0 < start.time_import(str(tmp_path)).seconds < 5


def test_a_heavy_import_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "IMPORT", start.IMPORT.replace("import minivit", "import minivit, numba"))
    with pytest.raises(RuntimeError, match="numba"):
        start.time_import(str(tmp_path))


@pytest.mark.slow
def test_the_first_step_runs():
    cache = os.environ.get(start.CACHE_VARIABLE, str(Path.home() / ".cache"))
    found = start.run(start.FIRST_STEP, cache, "float32")
    assert found.seconds > 0 and found.cpu_seconds > 0 and 0 < float(found.words[0]) < 10


def test_a_program_that_fails_is_told(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        start.run("raise SystemExit(3)", str(tmp_path))
