"""Products beside BLAS."""

import json
from importlib.util import find_spec

import numpy as np
import pytest

from benchmarks import kernels, products

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
