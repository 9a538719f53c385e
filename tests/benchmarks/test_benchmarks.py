"""The benchmarks work at their tiny sizes, and refuse to time what is wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

import minivit
from minivit.inference.predictor import Predictor
from minivit.kernels import OPS
from minivit.kernels.core import devices
from minivit.training.profiling import repeat

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # `benchmarks` is not installed

from benchmarks import answers, cascade, cpu, families, gpu, growth, kernels, products, report, start  # noqa: E402
from benchmarks.measure import Summary, milliseconds, table  # noqa: E402
from benchmarks.sides import OURS, REFERENCE, Side, best_rates, rivals  # noqa: E402
from benchmarks.turns import Measured  # noqa: E402
from benchmarks.worker import Worker  # noqa: E402


def run(name, *options):
    finished = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--tiny", *map(str, options)], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


# -------------------------------------------------------------------------------------------------------------------------- cpu
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

    monkeypatch.setitem(OPS._loaded, "layernorm", replace(op, forward=replace(op.forward, cpu=wrong)))
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


@pytest.mark.slow
def test_the_first_step_runs():
    cache = os.environ.get(start.CACHE_VARIABLE, str(Path.home() / ".cache"))
    found = start.run(start.FIRST_STEP, cache, "float32")
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


# -------------------------------------------------------------------------------------------------------------------------- gpu
@pytest.mark.slow
def test_gpu(cuda_runtime, tmp_path, capsys):
    with devices.using(cuda_runtime):
        assert gpu.main(["--tiny", "--json", str(tmp_path / "gpu.json")]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["machine"]["gpu"] == cuda_runtime.name and not result["failures"] and 0 <= result["curve_distance"] < 1e-3
    assert {(e["op"], e["direction"]) for e in result["kernels"]} >= {
        ("attention", "forward"),
        ("attention", "backward"),
        ("adamw", "forward"),
    }
    for entry in result["kernels"]:
        assert entry["seconds"] > 0 and entry["bytes"] > 0 and entry["launches"] > 0
    (step,) = result["steps"]
    assert step["minivit"]["host"] > 0 and step["minivit"]["seconds"] > 0 and step["minivit"]["memory"] > 0
    assert (tmp_path / "gpu.png").exists() and "vit_nano_patch2_8" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(devices, "_runtime", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert gpu.main([]) == 0 and capsys.readouterr().out.startswith("nothing measured: device='cuda' needs CuPy")


# ----------------------------------------------------------------------------------------------------------------------- products
LOOP = """
outer:
    movq %rax, %rbx
inner:
    vbroadcastss (%rax), %ymm0
    vfmadd231ps (%rbx), %ymm0, %ymm1
    movq 8(%rsp), %rcx
    vfmadd231ps 32(%rbx), %ymm0, %ymm2
    addq $64, %rbx
    cmpq %rbx, %rdx
    jne inner
    vfmadd213ps %ymm0, %ymm1, %ymm2
    jg outer
"""


def test_the_inner_loop_is_found():
    assert products.InnerLoop.of(LOOP) == products.InnerLoop(instructions=7, multiply_adds=2, loads_of_spilled=1)


@pytest.mark.parametrize("turn_a, turn_b", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    "batch_a, batch_b, summed", [((), (), False), ((2,), (2,), False), ((2,), (2,), True), ((), (2,), False), ((2,), (), False)]
)
def test_libraries_multiply_the_same(batch_a, batch_b, summed, turn_a, turn_b):
    a, b = ((*batch_a, 3, 5) if turn_a else (*batch_a, 5, 3)), ((*batch_b, 7, 3) if turn_b else (*batch_b, 3, 7))
    shape = products.Shape(a, b, turn_a, turn_b, summed)
    assert shape.sides == (max([1, *batch_a, *batch_b]), 5, 7, 3)
    libraries = ["minivit", "NumPy", *(["PyTorch"] if find_spec("torch") else [])]
    found = [products.Contender(0.0, products.Multiplier(library, "float32")).sample([shape])[0] for library in libraries]
    left, right = (m.swapaxes(-1, -2) if turn else m for m, turn in zip(products.operands(shape), (turn_a, turn_b)))
    for each in found:
        np.testing.assert_allclose(each, ((left @ right).sum(0) if summed else left @ right).reshape(-1), rtol=1e-5, atol=1e-5)


def test_products_against_blas(tmp_path, capsys):
    assert kernels.main(["--against-blas", "--tiny", "--json", str(tmp_path / "p.json")]) == 0
    content, out = json.loads((tmp_path / "p.json").read_text()), capsys.readouterr().out
    assert content["loop"]["multiply_adds"] > 0 and "threads: 1, " in out
    assert {"NumPy", "minivit"} <= content["results"][0]["seconds"].keys()
    assert all(entry["times_as_fast"] > 0 for entry in content["results"])


# ----------------------------------------------------------------------------------------------------------------------- families
def test_families_go_on_where_they_were_interrupted(tmp_path, monkeypatch, capsys):
    """Equal time, so more images for the faster model; each run is kept as it ends, and the most accurate stands first."""
    speed = families.speed
    rates = {"vit_nano_patch2_8": 2000.0, "mixer_nano_patch2_8": 1000.0}
    monkeypatch.setattr(families, "speed", lambda *given: speed(*given) | {"images_per_second": rates[given[-1]]})
    arguments = ["--tiny", "--json", str(tmp_path / "f.json"), "--models", "vit_nano_patch2_8", "mixer_nano_patch2_8"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls, measure = [], families.measure

        def interrupted(*given):
            calls.append(given)
            if len(calls) > 1:
                raise KeyboardInterrupt
            return measure(*given)

        patch.setattr(families, "measure", interrupted)
        families.main(arguments)
    (kept,) = json.loads((tmp_path / "f.json").read_text())["results"]
    assert families.main([*arguments, "--picture", str(tmp_path / "f.png")]) == 0
    first, second = json.loads((tmp_path / "f.json").read_text())["results"]
    assert first == kept and [first["model"], second["model"]] == ["vit_nano_patch2_8", "mixer_nano_patch2_8"]
    assert [round(e["epochs"] * e["limit"], -1) for e in (first, second)] == [1200, 600]
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[0] for line in lines] == [e["model"] for e in sorted((first, second), key=lambda e: -e["test_accuracy"])]
    assert (tmp_path / "f.png").stat().st_size > 5000


@pytest.mark.parametrize("images, epochs, limit", [(10, 1, 10), (100, 1, 100), (150, 2, 75), (1000, 10, 100)])
def test_a_share_of_the_images(images, epochs, limit):
    assert families.share_of(images, 100) == {"epochs": epochs, "limit": limit}
