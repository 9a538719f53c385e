"""The load on a server."""

import pytest
from benchmark_runs import run

for_serving = [pytest.importorskip(name) for name in ("starlette", "uvicorn", "python_multipart", "prometheus_client")]


@pytest.mark.slow
def test_all_requests_are_answered():
    at_once, at_a_rate, goal = run("serving").splitlines()[-3:]
    assert at_once.split()[-5:-4] == at_a_rate.split()[-5:-4] == ["100"]  # requests
    assert at_once.split()[-1] == at_a_rate.split()[-1] == "0"  # failed
    assert goal.startswith("goal: 200 requests a second")
