"""Who learns most in the same minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import learning
from minivit.data import load_data


def test_runs_are_kept_and_not_repeated(tmp_path, monkeypatch, capsys):
    path = tmp_path / "l.json"
    arguments = ["--tiny", "--learners", "minivit", "--json", str(path), "--picture", str(tmp_path / "l.png")]
    assert learning.main(arguments) == 0
    (entry,) = json.loads(path.read_text())["results"]
    assert entry["learner"] == "minivit" and 0 <= entry["test_accuracy"] <= 1 and entry["epochs"] >= 1 and entry["parameters"] > 1000
    assert entry["seconds"] < 30 and (tmp_path / "l.png").stat().st_size > 5000
    monkeypatch.setattr(learning, "measure", None)  # so that a second measurement would fail
    assert learning.main(arguments) == 0
    assert json.loads(path.read_text())["results"] == [entry]
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "minivit"


def test_a_learner_ends_with_who_began_it():
    given = {
        "learner": "minivit",
        "minutes": 10,
        "seed": 0,
        "data": "digits",
        "image_size": None,
        "limit": None,
        "train": [],
        "tiny": False,
    }
    command = [sys.executable, "-c", "from benchmarks.learners import serve; serve()", json.dumps(given)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "training and" in process.stderr.readline()  # it has begun
    process.stdin.close()
    assert process.wait(60) == 1


def test_the_most_accurate_stands_first():
    base = {"balanced_accuracy": 0.5, "epochs": 2, "parameters": 10**6}
    results = [
        {"learner": "cnn", "minutes": 1.0, "test_accuracy": 0.5, **base},
        {"learner": "minivit", "minutes": 1.0, "test_accuracy": 0.6, **base},
        {"learner": "minivit", "minutes": 1.0, "test_accuracy": 0.8, **base},
        {"learner": "vit", "minutes": 0.5, "test_accuracy": 0.1, **base},
    ]
    rows = learning.rows_of(results)
    assert [row[:3] for row in rows] == [["ViT, as in timm", "0.5", "10.0"], ["minivit", "1", "70.0"], ["small CNN", "1", "50.0"]]


@pytest.mark.parametrize("learner", sorted(learning.RIVALS))
def test_rivals_learn(learner):
    pytest.importorskip("torch")
    from benchmarks.learners import learn

    result = learn(learner, load_data("digits", progress=False), 0.15, 0, [])
    assert result["test_accuracy"] > 0.3 and result["seconds"] < 30
