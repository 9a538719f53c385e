"""The floors of the tree: a module imports only what stands below it, also where the import is deferred, and no import goes in a circle."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

import minivit

ROOT = Path(minivit.__file__).parent

# Lowest first. A name stands for a module, or for a package and all in it that is not named by itself.
FLOORS = (
    "minivit.version",
    "minivit.errors",
    "minivit.progress",
    "minivit.interrupts",
    "minivit.files",
    "minivit.schema",
    "minivit.sides",
    "minivit.kernels.core",
    "minivit.kernels.cpu",
    "minivit.kernels.cuda",
    "minivit.kernels.ops",  # the files at the top of kernels/
    "minivit.kernels",  # the list of ops
    "minivit.grad_mode",
    "minivit.indexing",
    "minivit.tensor",
    "minivit.functional",
    "minivit.runtime",
    "minivit.nn",
    "minivit.layers",
    "minivit.models",
    "minivit.testing",
    "minivit.data",
    "minivit.io",
    "minivit.inference",
    "minivit.plots",
    "minivit.reports",
    "minivit.optim",
    "minivit.training",
    "minivit.serving",
    "minivit.cli",
    "minivit",
    "minivit.__main__",
)
APART = ("minivit.kernels.cpu", "minivit.kernels.cuda")  # neighbours that do not import each other, either way


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package by its __init__.py."""
    found = {}
    for path in sorted([*ROOT.glob("*.py"), *(file for folder in ROOT.iterdir() if folder.is_dir() for file in folder.rglob("*.py"))]):
        parts = ("minivit", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of minivit that a module imports, anywhere in its text, also for type checkers alone."""
    path, targets = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names if alias.name.split(".")[0] == "minivit"}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            if base.split(".")[0] == "minivit":
                targets |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return targets


GRAPH = {name: imports(name) for name in MODULES}


def floor(name: str) -> int:
    """The number of the floor that a module stands on."""
    if name.startswith("minivit.kernels.") and name.count(".") == 2 and name not in FLOORS:
        return FLOORS.index("minivit.kernels.ops")
    while name not in FLOORS:
        name = name.rpartition(".")[0]
        assert name != "minivit", "a module at the top of minivit/ needs a floor of its own"
    return FLOORS.index(name)


@pytest.mark.parametrize("name", GRAPH)
def test_imports_go_down(name):
    upward = {target for target in GRAPH[name] if floor(target) > floor(name)}
    assert not upward, f"{name} imports {', '.join(sorted(upward))}, which stand above it"


def test_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_devices_do_not_know_each_other():
    for one, other in (APART, APART[::-1]):
        crossing = {f"{name} -> {target}" for name in GRAPH if name.startswith(one) for target in GRAPH[name] if target.startswith(other)}
        assert not crossing


def test_every_floor_is_there():
    standing = {floor(name) for name in GRAPH}
    assert standing == set(range(len(FLOORS)))


def test_a_planted_circle_and_an_upward_import_are_seen(monkeypatch):
    monkeypatch.setitem(GRAPH, "minivit.errors", {"minivit.files"})
    with pytest.raises(AssertionError, match="stand above it"):
        test_imports_go_down("minivit.errors")
    monkeypatch.setitem(GRAPH, "minivit.files", {"minivit.errors"})
    with pytest.raises(pytest.fail.Exception):
        test_no_circle()


# ------------------------------------------------------------------------------------------------------------ what an import costs
def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_minivit_takes_no_time():
    code = "from time import perf_counter as now; start = now(); import minivit; print(now() - start)"
    assert median(float(in_a_process(code)) for _ in range(5)) < 0.05


@pytest.mark.parametrize(
    "module", ["minivit", "minivit.kernels", "minivit.kernels.core.cases", "minivit.tensor", "minivit.data", "minivit.cli"]
)
def test_no_numba_before_an_op_is_used(module):
    loaded = in_a_process(f"import sys, {module}; print(*sys.modules)").split()
    assert not {"numba", "llvmlite", "cupy"} & set(loaded)


def test_scikit_learn_is_imported_for_its_estimator_alone():
    assert "sklearn" not in in_a_process("import sys; from minivit import *; import minivit.training.train; print(*sys.modules)").split()
    without = (
        "import sys; sys.modules['sklearn'] = None\ntry: from minivit import VisionClassifier\nexcept ImportError as error: print(error)"
    )
    assert in_a_process(without).startswith("VisionClassifier needs scikit-learn 1.6 or later: pip install 'minivit[sklearn]' (")


def test_an_op_is_imported_when_it_is_looked_up():
    code = "import sys; from minivit.kernels import OPS; {}; print('numba' in sys.modules)"
    assert [in_a_process(code.format(use)).strip() for use in ("list(OPS)", "OPS['softmax']")] == ["False", "True"]
