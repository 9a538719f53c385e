"""Runs functions of the tests in a process whose allocator checks itself, so that writing beside an array ends it."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def run_checked(module: str, function: str) -> None:
    """Run a function without arguments of a module in tests/; raises AssertionError with the end of its output if it does not return."""
    code = f"import sys; sys.path[:0] = sys.argv[1:]; import conftest, {module}; {module}.{function}(); print('returned')"
    # With glibc 2.34 and later the checks of malloc are in a library of their own; earlier ones say that there is none, and have them.
    checks = {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165", "LD_PRELOAD": "libc_malloc_debug.so.0"}
    done = subprocess.run([sys.executable, "-c", code, TESTS, TESTS.parent], env=os.environ | checks, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "returned\n"), (done.stdout + done.stderr)[-4000:]
