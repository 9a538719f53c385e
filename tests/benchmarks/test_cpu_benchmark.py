"""Training steps and inference beside rivals."""

import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from benchmark_runs import run
from tqdm import tqdm

import minivit
from benchmarks import answers, cpu, growth, report
from benchmarks.sides import OURS, REFERENCE, Side, best_rates, rivals
from benchmarks.turns import Measured
from benchmarks.worker import Worker

OURS_TRIED = ("float32", "int8")


@pytest.mark.slow
def test_cpu(tmp_path):
    printed = run("cpu", "--models", "mixer_nano_patch2_8", "--threads", 1, "--precisions", *OURS_TRIED, "--json", tmp_path / "cpu.json")
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert result["tiny"] and result["machine"]["threads"] == 1 and result["machine"]["versions"]["minivit"] == minivit.__version__
    assert [(e["workload"], e["batch"]) for e in result["results"]] == [("train", 4), ("infer", 4), ("infer", 1)]
    assert result["product_rates"]["minivit float32"] > 0 and result["memory_rate"] > 0
    for entry in result["results"]:
        assert entry["model"] == "mixer_nano_patch2_8" and entry["model"] in printed
        found = entry["sides"]["minivit float32"]
        assert found["seconds"] > 0 and found["peak_memory"] > found["memory_after_imports"] > 0
        assert found["flops"] > 0 and found["least_bytes"] > 0 and found["of_arithmetic"] > 0 and found["of_memory"] > 0
        precisions = {side["precision"] for name, side in entry["sides"].items() if name.startswith("minivit")}
        assert precisions == ({"float32"} if entry["workload"] == "train" else {*OURS_TRIED}) and not entry["failures"]
        assert "int8" not in precisions or entry["times_as_fast"]["int8"]["ours"]["median"] > 0
        for kind, rival in entry["rivals"].items():
            assert rival in entry["trials"] and entry["times_as_fast"]["float32"][kind]["median"] > 0
    assert {m["rival"] for m in result["geometric_means"]} >= ({"ours", "float32"} if find_spec("torch") else {"ours"})
    assert (find_spec("torch") is not None) == (tmp_path / "cpu.png").exists()
    assert find_spec("torch") or "torch not installed" in printed


@pytest.mark.slow
def test_growth(tmp_path):
    printed = run("cpu", "--growth", "--threads", 1, "--precisions", "float32", "--json", tmp_path / "growth.json")
    result = json.loads((tmp_path / "growth.json").read_text())
    assert [(e["workload"], e["batch"]) for e in result["batches"]] == [(w, b) for w in ("train", "infer") for b in (1, 2, 4)]
    assert [(e["from_tokens"], e["tokens"]) for e in result["tokens"]] == [(16, 36)] * 2 and "tokens" in printed
    for entry in result["tokens"]:
        assert 36 / 16 < entry["operations_ratio"] < 3


def test_what_grows_too_fast_is_told():
    def took(seconds, memory):
        return Measured([[seconds]], (100, 100 + memory))

    even = {8: took(1, 10), 16: took(2, 15), 32: took(4.5, 25)}
    assert [e["verdict"] for e in growth.by_batch(even, 16)] == ["kept"] * 3
    wrong = [e["verdict"] for e in growth.by_batch(even | {8: took(1.2, 10), 32: took(4.5, 30)}, 16)]  # 25 on the line
    assert wrong == ["EXCEEDED", "kept", "EXCEEDED"]
    problems = {size: answers.make_problem("vit_nano_patch2_8", 1, image_size=size) for size in (8, 12)}
    for seconds, verdict in ((2.8, "kept"), (2.9, "EXCEEDED")):
        (entry,) = growth.by_tokens({8: took(1, 1), 12: took(seconds, 1)}, problems, {8: 10, 12: 25})
        assert (entry["verdict"], entry["from_tokens"], entry["tokens"]) == (verdict, 16, 36)


@pytest.mark.slow
def test_the_work_of_a_step_is_counted():
    problem = answers.make_problem("vit_nano_patch2_8", 2)
    tokens, dim, depth, heads, head = 16, 64, 4, 4, 16
    block = 2 * tokens * 12 * dim**2 + 4 * heads * tokens**2 * head  # the products alone
    products = 2 * (depth * block + 2 * tokens * 4 * dim + 2 * dim * 10)
    weights = sum(w.nbytes for w in problem.weights.values())
    _, works = answers.reference_answers(problem, "infer", ("float32", "bfloat16"), threads=1)
    flops, moved = works["float32"]
    assert products <= flops < 1.3 * products and works["bfloat16"] == (flops, moved / 2)
    assert weights + depth * 12 * 2 * tokens * dim * 4 < moved < 3 * weights
    flops, moved = answers.reference_answers(problem, "train", ("float32",), threads=1)[1]["float32"]
    assert 2.9 * products < flops < 3.5 * products
    assert moved > 7 * weights  # AdamW's alone


def answers_of(problem, **adamw):
    with Worker(REFERENCE, replace(problem, adamw=answers.CHECKED_ADAMW | adamw), 1) as worker:
        logits = answers.Answers.of(worker, "infer").logits
        return replace(answers.Answers.of(worker, "train"), logits=logits)


@pytest.mark.slow
def test_sides_that_disagree_are_not_timed():
    problem = answers.make_problem("mixer_nano_patch2_8", 2)
    right = answers_of(problem)
    name = "blocks.1.mlp_tokens.fc1.weight"
    moved = right.weights[name].copy()
    moved.flat[0] += 0.1 * answers.CHECKED_ADAMW["lr"]
    wrong = [
        replace(right, losses=[right.losses[0], right.losses[1] + 1e-4]),
        replace(right, logits=right.logits * 1.01),
        replace(right, weights=right.weights | {name: moved}),
        replace(right, weights=right.weights | {name: moved * np.nan}),
        replace(right, logits=None),
        answers_of(problem, weight_decay=0.5),
    ]
    for each in wrong:
        with pytest.raises(answers.Disagreement):
            answers.compare(problem.weights, REFERENCE, each, right)
    for side in (REFERENCE, Side("PyTorch", "bfloat16 autocast"), Side("PyTorch", "bfloat16 pure")):
        answers.compare(problem.weights, side, right, right)
        if side != REFERENCE:  # rounding is forgiven, doing nothing or something else is not
            answers.compare(problem.weights, side, wrong[1], right)
            for each in (wrong[3], wrong[4], replace(right, weights=problem.weights), replace(right, logits=right.logits * 1.1)):
                with pytest.raises(answers.Disagreement):
                    answers.compare(problem.weights, side, each, right)


@pytest.mark.slow
def test_an_error_in_the_other_process_is_told():
    problem = answers.make_problem("vit_nano_patch2_8", 2)
    with pytest.raises(RuntimeError, match="unknown model"):
        Worker(REFERENCE, replace(problem, family="vat"), 1)
    with Worker(REFERENCE, problem, 1) as worker:
        with pytest.raises(RuntimeError, match="no attribute 'fly'"):
            worker.call("fly")
        assert worker.call("infer").shape == (2, 10)  # it still answers


def test_an_unknown_model_is_told(capsys):
    assert cpu.main(["--tiny", "--models", "vit_nanno_patch2_8"]) == 2
    assert "vit_nano_patch2_8" in capsys.readouterr().out


@pytest.mark.slow
def test_a_rival_that_fails_or_errs_is_not_timed():
    options = cpu.parse(["--tiny", "--threads", "1"])
    problem = answers.make_problem("vit_nano_patch2_8", 2)
    reference, _ = answers.reference_answers(problem, "infer", (), 1)
    fails, errs = Side(OURS, "float16"), Side(OURS, "float32 wrong")
    with tqdm(disable=True) as progress:
        seconds, failures = cpu.try_rivals(problem, "infer", [REFERENCE, fails], reference, options, progress)
        assert seconds.keys() == {"minivit float32"} and "float16" in failures["minivit float16"]
        with pytest.raises(answers.Disagreement):
            cpu.try_rivals(problem, "infer", [errs], replace(reference, logits=reference.logits + 1), options, progress)


def test_the_limit_of_a_precision_is_that_of_what_is_as_exact():
    rates = {"minivit float32": 2.0, "PyTorch float32": 3.0, "PyTorch bfloat16 pure": 12.0, "OpenVINO bfloat16": 10.0}
    assert best_rates(rates) == {"float32": 3, "bf16x3": 4, "bfloat16": 12, "int8": 12}
    assert best_rates(rates | {"minivit bf16x3": 5.0})["bf16x3"] == 5
    assert best_rates({"minivit float32": 2.0}) == dict.fromkeys(("float32", "bf16x3", "bfloat16", "int8"), 2)


def test_int8_is_held_against_int8_and_not_counted_among_the_others():
    seconds = {"A float32": 3.0, "B float32": 4.0, "A bfloat16": 2.0, "A int8": 1.0, "B int8": 5.0, "C int8": 6.0}
    sides = [Side(*name.split()) for name in seconds]
    names = cpu.promising_rivals(sides, seconds)
    assert {kind: {*found} for kind, found in names.items()} == {
        "float32": {"A float32"},
        "any": {"A bfloat16", "A float32"},
        "int8": {"A int8", "B int8"},
    }
    assert cpu.promising_rivals([], {}) == {"float32": [], "any": [], "int8": []}


def test_rivals_are_listed_or_excused(monkeypatch):
    from benchmarks import sides

    monkeypatch.setattr(sides, "find_spec", lambda name: name != "openvino")
    monkeypatch.setattr(sides, "supported", lambda: {"amx": False, "avx512bf16": True})
    found, reasons = sides.rivals(tiny=True)
    assert Side("PyTorch", "bfloat16 pure") in found["train"] and Side("ONNX Runtime", "float32") in found["infer"]
    assert not {side.library for side in found["train"]} - {"PyTorch"}
    assert reasons["OpenVINO bfloat16"] == "openvino not installed" and "tiny" in reasons["PyTorch float32 compiled"]
    monkeypatch.setattr(sides.shutil, "which", lambda name: None)
    assert sides.rivals(tiny=False)[1]["PyTorch float32 compiled"] == "no C++ compiler"
    monkeypatch.setattr(sides, "supported", lambda: {"amx": False, "avx512bf16": False})
    monkeypatch.setattr(sides, "X86", True)
    found, reasons = sides.rivals(tiny=True)
    assert {side.precision for side in found["train"]} == {"float32"} and "without bfloat16" in reasons["PyTorch bfloat16 pure"]


def test_the_picture_shows_what_there_is(tmp_path):
    ratio = {"float32": {"float32": {"median": 2.0}, "any": {"median": 0.5}}}
    entries = [
        {"model": model, "workload": workload, "batch": 1, "times_as_fast": ratio}
        for model in ("a", "b")
        for workload in ("train", "infer")
    ]
    report.draw(entries, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    means = report.geometric_means([*entries, entries[0] | {"model": "c", "times_as_fast": {"float32": {"any": {"median": 4.0}}}}])
    assert [(m["workload"], m["rival"], m["models"]) for m in means] == [
        ("train", "float32", 2),
        ("train", "any", 3),
        ("infer at batch 1", "float32", 2),
        ("infer at batch 1", "any", 2),
    ]
    assert means[1]["times_as_fast"] == pytest.approx(1) and means[1]["least"] == 0.5


@pytest.mark.parametrize("name", ["vit_nano_patch2_8", "vit_tiny_patch4_32", "mixer_tiny_patch4_32", "mixer_nano_patch2_8"])
def test_rivals_compute_the_same(name):
    pytest.importorskip("torch")
    problem = answers.make_problem(name, 2)
    for workload, sides in rivals(tiny=True)[0].items():
        reference, _ = answers.reference_answers(problem, workload, (), 2)
        for side in sides if "nano" in name else [Side("PyTorch", "float32")]:
            with answers.checked(problem, side, workload, reference, 2):  # raises
                pass


def test_rivals_have_every_named_shape():
    torch = pytest.importorskip("torch")
    from benchmarks.rivals import create_model

    for name in ("vit_small_patch4_32", "vit_tiny_patch16_224", "mixer_s16_224"):
        problem = answers.make_problem(name, 1)
        with torch.device("meta"):
            rival = create_model(problem.family, problem.config)
        assert {n: tuple(p.shape) for n, p in rival.state_dict().items()} == {n: w.shape for n, w in problem.weights.items()}
