"""What the benchmarks share."""

import pytest

from benchmarks.measure import Summary, milliseconds, table
from minivit.training.profiling import repeat


def test_summary():
    found = Summary.of([2.0, 1.0, 4.0, 3.0, 5.0])
    assert found.median == 3 and found.spread == pytest.approx(2 / 3)


def test_repeat_counts_all_but_the_first_call():
    calls = []
    assert len(repeat(lambda: calls.append(0), seconds=0, least=4)) == 4 and len(calls) == 5


@pytest.mark.parametrize("seconds, text", [(1.2345e-6, "0.00123"), (0.0123456, "12.3"), (0.2, "200"), (12.3456, "12346")])
def test_milliseconds(seconds, text):
    assert milliseconds(seconds) == text


def test_table():
    assert table({"name": "<", "ms": ">"}, [["a", "1.0"], ["bcdef", "10.0"]]) == "name     ms\na       1.0\nbcdef  10.0"
