"""The pages: their worked examples run as they stand, their links lead somewhere, and the tree that they name is the tree there is."""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import minivit
from minivit.kernels.core import devices
from minivit.kernels.core.cases import Sample, make_inputs, shrunk
from minivit.kernels.cuda import kernel as cuda
from minivit.optim import SCHEDULES
from minivit.testing.checks import check_op
from minivit.testing.numerics import check_accuracy
from minivit.testing.result import CheckResult
from minivit.training.options import TrainOptions

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/LOG.md", ROOT / "minivit/data/DIGITS.md"]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
LARGEST_README = 8000  # bytes
LONG = 350  # lines: docs/design.md says why a file is longer


def example(marker: str) -> str:
    """The code that follows `<!-- marker -->` in the one page that has it."""
    found = [code for text in TEXTS.values() for code in re.findall(rf"<!-- {marker} -->\n```\w+\n(.*?)```", text, re.DOTALL)]
    assert len(found) == 1, f"{len(found)} examples are marked {marker}, not one"
    return found[0]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def load(code: str, name: str, folder: Path):
    """Import code as the module of that dotted name, from a file, as Numba's cache wants."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_lines() -> list[str]:
    """The lines of shell examples that call minivit."""
    shell = [code for text in TEXTS.values() for code in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    return [line for code in shell for line in code.splitlines() if line.startswith("minivit ")]


def commands_in_sentences() -> list[str]:
    """Whole commands between backticks, in sentences and tables, that measure what the pages claim."""
    found = [code for text in TEXTS.values() for code in re.findall(r"`((?:minivit [a-z]+|python -m benchmarks\.\w+) [^`]+)`", text)]
    return sorted({re.sub(r"\bN$", "0", " ".join(code.split())) for code in found if "..." not in code})


# ------------------------------------------------------------------------------------------------------------------- examples
def test_an_op(tmp_path, monkeypatch):
    name = "minivit.kernels.square"
    module = load(example("op"), name, tmp_path)
    monkeypatch.delitem(sys.modules, name)
    reports = check_op(module.square)
    assert reports and all(report.passed for report in reports)


@pytest.mark.slow
def test_an_op_on_cuda(tmp_path, monkeypatch, cuda_runtime):
    name = "minivit.kernels.square"
    square = load(example("op"), name, tmp_path).square
    monkeypatch.delitem(sys.modules, name)
    shutil.copytree(cuda.FOLDER / "cuda", tmp_path / "cuda")
    (tmp_path / "square.cu").write_text(example("op-cuda"))
    monkeypatch.setattr(cuda, "FOLDER", tmp_path)
    with devices.using(cuda_runtime):
        for case in square.cases:
            for dtype in ("float32", "float64", "bfloat16"):
                rng, result = np.random.default_rng(0), CheckResult()
                check_accuracy(Sample(square, *make_inputs(square, shrunk(square, case), dtype, rng)), "cuda", rng, result)
                assert not result.failure


def test_a_model(tmp_path):
    from minivit.models import registry

    name = "minivit.models.patch_mlp"
    try:
        load(example("model"), name, tmp_path)
        model = minivit.create_model("patch_mlp_nano_8", seed=1)
        images = np.random.default_rng(0).standard_normal((32, 1, 8, 8), np.float32)
        labels = np.arange(32) % 10
        trainer = minivit.Trainer(model, lr=1e-2)
        losses = [trainer.step(images, labels) for _ in range(30)]
        assert losses[-1] < losses[0] / 2
    finally:
        sys.modules.pop(name, None)
        registry.FAMILIES.pop("patch_mlp", None)
        registry.PRESETS.pop("patch_mlp_nano_8", None)


@pytest.mark.slow
def test_the_python_call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example("python"), names)
    assert names["answer"].probabilities.shape == (3, 10)
    assert "%" in capsys.readouterr().out


@pytest.mark.slow
def test_the_trainer(capsys):
    names = {}
    exec(example("trainer"), names)
    assert np.isfinite(names["loss"])
    assert "%" in capsys.readouterr().out


def test_arrays_that_share_memory():
    names = {}
    exec(example("dlpack"), names)
    assert np.shares_memory(names["again"], names["pixels"])


@pytest.mark.slow
def test_the_search_of_scikit_learn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example("sklearn"), names)
    assert names["search"].best_params_["lr"] in (0.003, 0.006) and capsys.readouterr().out.endswith(" %\n")
    answer = minivit.load("digits.safetensors").predict(names["X_test"].reshape(-1, 8, 8) / 16)
    assert np.mean(answer.labels == names["y_test"]) > 0.9


def test_a_schedule(monkeypatch):
    names = {}
    exec(example("schedule"), names)
    monkeypatch.setitem(SCHEDULES, "exponential", names["exponential"])
    assert TrainOptions(schedule="exponential").schedule == "exponential"
    rates = [SCHEDULES["exponential"](step, 40, 0.003, 8, 0.001) for step in range(41)]
    assert np.isclose(max(rates), 0.003) and np.isclose(rates[40], 0.001)
    assert np.all(np.diff(rates[:8]) > 0) and np.all(np.diff(rates[8:]) < 0)


@pytest.mark.slow
def test_the_cascade(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example("cascade"), names)
    assert names["calibration"].budgets == (0.3, 0.5, 1.0) and names["answer"].exits.tolist() == [1] * 4
    assert minivit.load(names["run"].folder).model.calibration == names["calibration"]


@pytest.mark.slow
@pytest.mark.parametrize("marker", ["onnx", "onnx-cascade"])
def test_the_export(marker, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example(marker), names)
    assert names["logits"].shape == ((5, 10) if marker == "onnx" else (1, 10))
    assert marker != "onnx" or sum(names["names"][k] in "0123456789" for k in names["logits"].argmax(1)) == 5


@pytest.mark.parametrize("marker", ["first-line", "test-line"])
def test_the_lines_to_paste_are_one_line(marker):
    assert len(example(marker).splitlines()) == 1


@pytest.mark.parametrize("line", command_lines())
def test_the_command_lines_are_understood(line):
    options = import_module("minivit.cli.main")._parse(shlex.split(line, comments=True)[1:])
    assert options.command == line.split()[1]


@pytest.mark.parametrize("line", commands_in_sentences())
def test_the_commands_in_sentences_are_understood(line, monkeypatch):
    class Understood(Exception):
        pass

    def parse(self, arguments=None, namespace=None, parse=argparse.ArgumentParser.parse_args):
        parse(self, arguments, namespace)
        raise Understood

    words = shlex.split(line)
    if words[0] == "minivit":
        assert import_module("minivit.cli.main")._parse(words[1:]).command == words[1]
    else:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Understood):
            import_module(words[2]).main(words[3:])


# ---------------------------------------------------------------------------------------------------------------------- pages
def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(TEXTS[page])):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = ROOT / page if not path else (ROOT / page).parent / path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            wrong.append(link)
    assert not wrong


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= LARGEST_README


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_the_readme_or_a_page_that_it_names_leads_to(page):
    assert any(f"({page.name}" in text or f"(docs/{page.name}" in text for text in TEXTS.values())


# ----------------------------------------------------------------------------------------------------------------------- tree
def folders_named() -> dict[str, list[str]]:
    """The names in the first column of each table of docs/tree.md, by the folder that is its heading."""
    found: dict[str, list[str]] = {}
    for line in TEXTS["docs/tree.md"].splitlines():
        if line.startswith("## "):
            folder = line.removeprefix("## ")
        elif line.startswith("| `") and folder.endswith("/"):
            found.setdefault(folder, []).extend(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return found


def folders_there() -> dict[str, list[str]]:
    found = {}
    for top in ("kernels", "minivit"):
        for folder, folders, files in os.walk(ROOT / top):
            folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
            links = [name for name in folders if Path(folder, name).is_symlink()]
            found[Path(folder).relative_to(ROOT).as_posix() + "/"] = sorted(links + [name for name in files if not name.startswith(".")])
    return found


def test_the_tree_names_every_file_once():
    named, there = folders_named(), folders_there()
    assert set(named) == set(there)
    for folder, files in there.items():
        assert sorted(named[folder]) == files, folder


def test_the_readme_names_every_package():
    tree = TEXTS["README.md"].split("## The tree")[1].split("```")[1]
    names = {Path(folder).name for folder in folders_there()}
    assert not [name for name in names if f"{name}/" not in tree]


def test_a_long_file_has_a_reason():
    reasons = TEXTS["docs/design.md"].split("## Long files")[1].split("\n## ")[0]
    code = [file for pattern in ("*.py", "*.cu", "*.cuh", "*.cpp", "*.hpp") for file in ROOT.rglob(pattern)]
    own = [
        file.relative_to(ROOT).as_posix()
        for file in code
        if file.relative_to(ROOT).parts[0] in ("minivit", "kernels", "tests", "benchmarks")
    ]
    long = [
        file
        for file in own
        if not file.startswith("minivit/kernels/") and len((ROOT / file).read_text(encoding="utf-8").splitlines()) > LONG
    ]
    assert not [file for file in long if file not in reasons]
