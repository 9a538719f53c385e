"""Cascades, their budgets and ablations."""

import json

import pytest

from benchmarks import cascade
from minivit.inference.predictor import Predictor


@pytest.fixture(scope="module")
def cascade_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade") / "run"
    cascade.train(cascade.parse(["--tiny", "--train", "lr=0.01"]), folder)
    return folder


@pytest.mark.slow
def test_cascade(cascade_run, tmp_path, capsys):
    assert cascade.main(["--tiny", "--run", str(cascade_run), "--json", str(tmp_path / "cascade.json")]) == 0
    result = json.loads((tmp_path / "cascade.json").read_text())
    assert result["tiny"] and result["images"] == {"calibration": 120, "unseen": 120} and result["model"] == "dvt_nano_8"
    assert [e["share"] for e in result["exits"]] == sorted(e["share"] for e in result["exits"]) and result["exits"][-1]["share"] == 1
    assert len(result["budgets"]) == 20
    for entry in result["budgets"]:
        assert entry["exact"]["accuracy"] >= entry["sweep"]["accuracy"] and entry["exact"]["mean_cost"] <= entry["budget"] * (1 + 1e-9)
    assert {t["batch"] for t in result["times"]} == {64, 1} and all(t["seconds"] > 0 and t["last_seconds"] > 0 for t in result["times"])
    printed = capsys.readouterr().out
    for heading in ("M multiply-adds", "sweep, %", "of budget", "of its time"):
        assert heading in printed


@pytest.mark.slow
def test_a_cascade_that_answers_wrongly_is_not_timed(cascade_run, monkeypatch):
    stop = Predictor.predict
    monkeypatch.setattr(Predictor, "predict", lambda self, images, budget=None: stop(self, images[::-1], budget))
    with pytest.raises(cascade.Disagreement):
        cascade.main(["--tiny", "--run", str(cascade_run)])


@pytest.mark.slow
def test_an_interrupted_ablation_goes_on(tmp_path, monkeypatch, capsys):
    trained, train = [], cascade.train
    monkeypatch.setattr(cascade, "REUSES", {"both": (True, True), "none": (False, False)})

    def interrupted(options, folder, **more):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(more["model_options"])
        return train(options, folder, **more)

    arguments = ["--tiny", "--ablation", "--json", str(tmp_path / "ablation.json")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cascade, "train", interrupted)
        cascade.main(arguments)
    (kept,) = json.loads((tmp_path / "ablation.json").read_text())["results"]
    assert kept["reuse"] == "both" and len(kept["exit_accuracies"]) == 3
    assert cascade.main(arguments) == 0
    first, second = json.loads((tmp_path / "ablation.json").read_text())["results"]
    assert first == kept and second["reuse"] == "none" and second["macs"][-1] < first["macs"][-1]
    assert trained == [{"feature_reuse": True, "relationship_reuse": True}]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["both", "none"]


def test_the_nearest_budget():
    entries = [{"budget": b, "exact": {"accuracy": a}} for b, a in ((0.1, 0.5), (0.2, 0.7), (0.3, 0.799), (0.4, 0.9))]
    for last, budget in ((0.4, 0.1), (0.702, 0.2), (0.7021, 0.3), (0.801, 0.3), (0.95, 0.4)):
        assert cascade.nearest_to_last(entries, "exact", last)["budget"] == budget
