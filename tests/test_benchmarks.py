"""The benchmarks work at their tiny sizes, and refuse to time what is wrong."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import minivit
from minivit.kernels import OPS
from minivit.predict import Predictor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))                           # `benchmarks` is not installed

from benchmarks import cascade, cpu, kernels, start  # noqa: E402
from benchmarks.measure import Summary, milliseconds, repeat, table  # noqa: E402
from benchmarks.worker import Worker  # noqa: E402


def run(name, *options):
    finished = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--tiny", *map(str, options)], cwd=ROOT, capture_output=True,
                              text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


# -------------------------------------------------------------------------------------------------------------------------- cpu
def test_cpu(tmp_path):
    printed = run("cpu", "--models", "mixer_nano_patch2_8", "--threads", 1, "--json", tmp_path / "cpu.json")
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert result["tiny"] and result["machine"]["threads"] == 1 and result["machine"]["versions"]["minivit"] == minivit.__version__
    assert [e["workload"] for e in result["results"]] == ["train", "infer"]
    for entry in result["results"]:
        assert entry["model"] == "mixer_nano_patch2_8" and entry["model"] in printed and entry["flops"] > 0
        found = entry["sides"]["minivit"]
        assert found["seconds"] > 0 and found["peak_memory"] > found["memory_after_imports"] > 0
        assert ("times_as_fast" in entry) == ("PyTorch" in entry["sides"])


def test_the_operations_of_a_step_are_counted():
    problem = cpu.make_problem("vit_nano_patch2_8", 2)
    tokens, dim, depth, heads, head = 16, 64, 4, 4, 16
    block = 2 * tokens * 12 * dim ** 2 + 4 * heads * tokens ** 2 * head         # the products alone
    products = 2 * (depth * block + 2 * tokens * 4 * dim + 2 * dim * 10)
    flops = cpu.check(problem, {"minivit": "ours"}, threads=1)
    assert products <= flops["infer"] < 1.3 * products
    assert 2.9 * products < flops["train"] < 3.5 * products


def answers_of(problem, **adamw):
    with Worker("ours", replace(problem, adamw=cpu.CHECKED_ADAMW | adamw), 1) as worker:
        return cpu.Answers.of(worker)


def test_sides_that_disagree_are_not_timed():
    problem = cpu.make_problem("mixer_nano_patch2_8", 2)
    right = answers_of(problem)
    cpu.compare(problem.weights, right, right)
    name = "blocks.1.mlp_tokens.fc1.weight"
    moved = right.weights[name].copy()
    moved.flat[0] += 0.1 * cpu.CHECKED_ADAMW["lr"]
    for wrong in (replace(right, losses=[right.losses[0], right.losses[1] + 1e-4]), replace(right, logits=right.logits * 1.01),
                  replace(right, weights=right.weights | {name: moved}),
                  replace(right, weights=right.weights | {name: moved * np.nan}), answers_of(problem, weight_decay=0.5)):
        with pytest.raises(cpu.Disagreement):
            cpu.compare(problem.weights, wrong, right)


def test_an_error_in_the_other_process_is_told():
    problem = cpu.make_problem("vit_nano_patch2_8", 2)
    with pytest.raises(RuntimeError, match="unknown model"):
        Worker("ours", replace(problem, family="vat"), 1)
    with Worker("ours", problem, 1) as worker:
        with pytest.raises(RuntimeError, match="no attribute 'fly'"):
            worker.call("fly")
        assert worker.call("infer").shape == (2, 10)    # it still answers


def test_an_unknown_model_is_told(capsys):
    assert cpu.main(["--tiny", "--models", "vit_nanno_patch2_8"]) == 2
    assert "vit_nano_patch2_8" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["vit_nano_patch2_8", "vit_tiny_patch4_32", "mixer_tiny_patch4_32", "mixer_nano_patch2_8"])
def test_rivals_compute_the_same(name):
    pytest.importorskip("torch")
    cpu.check(cpu.make_problem(name, 2), cpu.SIDES, threads=1)      # raises


def test_rivals_have_every_named_shape():
    torch = pytest.importorskip("torch")
    from benchmarks.rivals import create_model

    for name in ("vit_small_patch4_32", "vit_tiny_patch16_224", "mixer_s16_224"):
        problem = cpu.make_problem(name, 1)
        with torch.device("meta"):
            rival = create_model(problem.family, problem.config)
        assert {n: tuple(p.shape) for n, p in rival.state_dict().items()} == {n: w.shape for n, w in problem.weights.items()}


# ---------------------------------------------------------------------------------------------------------------------- kernels
def test_kernels(tmp_path):
    printed = run("kernels", "layernorm", "permute", "--json", tmp_path / "kernels.json")
    result = json.loads((tmp_path / "kernels.json").read_text())
    timed = [(e["op"], e["direction"]) for e in result["results"]]
    assert timed == [(op, direction) for op in ("layernorm", "permute") for direction in ("forward", "backward")]
    assert all(e["seconds"] > 0 and e["bytes"] > 0 and e["launches"] > 0 for e in result["results"])
    assert result["memory_rate"] > 0 and "layernorm" in printed


def test_kernels_times_the_largest_case():
    for op in OPS.values():
        chosen = kernels.choose_case(op, tiny=False)
        assert kernels.size(op, chosen) == max(kernels.size(op, case) for case in op.cases)


def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys):
    op = OPS["layernorm"]

    def wrong(y, *arguments):
        op.forward.cpu(y, *arguments)
        y *= 1.001

    monkeypatch.setitem(OPS, "layernorm", replace(op, forward=replace(op.forward, cpu=wrong)))
    assert kernels.main(["layernorm", "--tiny"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "GB/s  of memory\nWRONG" in printed


# ------------------------------------------------------------------------------------------------------------------------ start
def test_import_is_timed_and_light(tmp_path):
    assert 0 < start.time_import(str(tmp_path)).seconds < 5


def test_a_heavy_import_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "IMPORT", start.IMPORT.replace("import minivit", "import minivit, numba"))
    with pytest.raises(RuntimeError, match="numba"):
        start.time_import(str(tmp_path))


def test_the_first_step_runs():
    cache = os.environ.get(start.CACHE_VARIABLE, str(Path.home() / ".cache"))
    found = start.run(start.FIRST_STEP, cache)
    assert found.seconds > 0 and found.cpu_seconds > 0 and 0 < float(found.words[0]) < 10


def test_a_program_that_fails_is_told(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        start.run("raise SystemExit(3)", str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------- cascade
@pytest.fixture(scope="module")
def cascade_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade") / "run"
    cascade.train(cascade.parse(["--tiny", "--train", "lr=0.01"]), folder)
    return folder


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


def test_a_cascade_that_answers_wrongly_is_not_timed(cascade_run, monkeypatch):
    stop = Predictor.predict
    monkeypatch.setattr(Predictor, "predict", lambda self, images, budget=None: stop(self, images[::-1], budget))
    with pytest.raises(cascade.Disagreement):
        cascade.main(["--tiny", "--run", str(cascade_run)])


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
    kept, = json.loads((tmp_path / "ablation.json").read_text())["results"]
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


# ---------------------------------------------------------------------------------------------------------------------- measure
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
