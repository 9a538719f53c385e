"""Every op, on all its cases and on shapes that Hypothesis draws: nothing here names one.

Its CUDA kernels run on a GPU, or, where there is none, on the CPU (`cuda_emulation`), on smaller cases.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from math import prod

import numba
import numpy as np
import pytest
from cuda_emulation.emulator import Emulator
from hypothesis import assume, given, reject
from hypothesis import strategies as st

from minivit.errors import UserError
from minivit.kernels import OPS
from minivit.kernels.core import devices
from minivit.kernels.core.cases import Sample, input_shapes, letters, make_inputs, shrunk
from minivit.kernels.core.op import Cost, Implementation, Op
from minivit.kernels.cpu.gemm import products_in
from minivit.testing.checks import check_gradients
from minivit.testing.numerics import check_accuracy
from minivit.testing.result import CheckResult

KERNELS = ("cpu", "cuda")
IMPLEMENTATIONS = ("reference", *KERNELS)
DTYPES = ("float32", "float64", "bfloat16")
EVERY = list(OPS.values())
DIFFERENTIABLE = [op for op in EVERY if op.backward]
SMALL = 50_000  # elements of all inputs; larger cases run only the tests that sizes matter to
SIZES = {"reference": {}, "cpu": {}, "cuda": {"elements": 60_000, "operations": 20_000_000}}  # to which cases are shrunk


def size_of(op: Op, case) -> int:
    return sum(prod(s) for s in input_shapes(op, case).values() if s is not None)


def small_cases(op: Op) -> list:
    return [case for case in op.cases if size_of(op, case) <= SMALL]


def cases(ops=EVERY, choose=lambda op: op.cases) -> list:
    """All cases; those after the first of an op are slow."""
    return [
        pytest.param(op, case, id=f"{op.name}-{i}", marks=pytest.mark.slow if i else ()) for op in ops for i, case in enumerate(choose(op))
    ]


def typed_cases(choose=lambda op: op.cases) -> list:
    """Cases in every dtype that the op has: there is no bfloat16 form where all that floats are parameters."""
    return [
        pytest.param(*c.values, dtype, id=f"{c.id}-{dtype}", marks=c.marks)
        for dtype in DTYPES
        for c in cases(choose=choose)
        if has_dtype(c.values[0], dtype)
    ]


def has_dtype(op: Op, dtype) -> bool:
    return any(call_of(op, shrunk(op, case, elements=1), dtype)[0].dtype == dtype for case in op.cases[:1])


def call_of(op: Op, case, dtype="float64", sizes=None) -> tuple[Sample, np.random.Generator]:
    rng = np.random.default_rng(0)
    return Sample(op, *make_inputs(op, case, dtype, rng, sizes)), rng


def multiplies(call: Sample) -> bool:
    """Whether the op is made of products, which "bf16x3" computes in another way."""
    weights = call.weights(np.random.default_rng(1))
    plain = call.run("cpu", weights)
    with products_in("bf16x3"):
        return not same_bits(plain, call.run("cpu", weights))


def same_bits(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all((one[n] is None and other[n] is None) or one[n].tobytes() == other[n].tobytes() for n in one)


def passed(check: Callable, *arguments, **options) -> CheckResult:
    result = CheckResult()
    check(*arguments, result=result, **options)
    assert not result.failure, result.failure
    return result


# ------------------------------------------------------------------------------------------------------------ the spec is whole
@pytest.mark.parametrize("key", OPS)
def test_spec(key):
    op = OPS[key]
    assert op.name == key
    assert op.shapes and len(op.cases) > 0
    assert set(op.values) <= set(op.inputs) and set(op.accumulates) <= set(op.differentiable) <= set(op.inputs)
    assert op.backward is None or (op.results and op.differentiable)
    for direction in (op.forward, op.backward):
        assert direction is None or all(callable(getattr(direction, i)) for i in IMPLEMENTATIONS)
    for name, source in op.gradient_aliases.items():
        assert name in op.differentiable and name not in op.accumulates
        target = source[1:]
        assert source[0] == "d" and (target in op.results or (target in op.differentiable and target not in op.gradient_aliases))
        assert target not in op.accumulates, f"{name} would be given the gradient that runs to {target}"


@pytest.mark.parametrize("op, case", cases())
def test_spec_of_a_case(op, case):
    shapes = input_shapes(op, case)
    inputs, constants = make_inputs(op, case, "float32", np.random.default_rng(0))
    arrays = list(inputs.values())
    outputs = op.describe(arrays, constants)
    assert tuple(outputs)[: len(op.results)] == op.results
    assert set(op.saves) <= set(op.inputs) | set(outputs)
    assert set(op.backward_only) <= set(op.saves) & (set(outputs) - set(op.results))
    for name in op.gradient_aliases:
        assert shapes[name] is None or op.gradient_aliases[name][1:] not in shapes or shapes[name] == shapes[op.gradient_aliases[name][1:]]
    cost = op.cost(*shapes.values(), *constants.values())
    forward, backward = op.least_bytes(arrays, constants)
    assert isinstance(cost, Cost) and cost.forward >= 0 and forward > 0
    if op.backward:
        assert cost.backward >= 0 and backward > 0


# ------------------------------------------------------------------------------------------------------------ gradients
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op, case", cases(DIFFERENTIABLE))
def test_gradients_against_differences(op, case, implementation, kernels_of):
    small = size_of(op, case) <= SMALL
    if not small and implementation == "reference":
        pytest.skip("large cases are for kernels")
    few = not small or implementation == "cuda"
    call, rng = call_of(op, shrunk(op, case, **SIZES[implementation]))
    with kernels_of(implementation):
        result = passed(check_gradients, call, implementation, rng, directions=1 if few else 3, elements=2 if few else 60)
    assert result.directions > 0 and result.elements >= len(call.differentiable)


def planted(op: Op, name: str, factor: float = 1.01) -> Op:
    """`op` with a wrong gradient of one input: scaled, or, where it is another array (`same`), the forward scaled instead."""
    if name in op.gradient_aliases:

        def forward(*arguments):
            place = len(arguments) - len(op.constants) - len(op.inputs) + op.inputs.index(name)
            op.forward.cpu(*arguments[:place], factor * arguments[place], *arguments[place + 1 :])

        return replace(op, forward=Implementation(op.forward.reference, forward))
    place = [n for n in op.differentiable if n not in op.gradient_aliases].index(name)

    def backward(*arguments):
        op.backward.cpu(*arguments)
        arguments[place][...] *= factor

    return replace(op, backward=Implementation(op.backward.reference, backward))


@pytest.mark.slow
@pytest.mark.parametrize("op, name", [pytest.param(op, n, id=f"{op.name}-{n}") for op in DIFFERENTIABLE for n in op.differentiable])
def test_a_planted_wrong_gradient_is_caught(op, name):
    having = [case for case in small_cases(op) if input_shapes(op, case)[name] is not None]
    assert having, f"no small case of {op.name} has {name}"
    for options in (dict(directions=3, elements=0), dict(directions=0, elements=10)):
        result = CheckResult()
        for case in having:
            call, rng = call_of(planted(op, name), case)
            check_gradients(call, "cpu", rng, result=result, **options)
        assert result.failure, f"not seen by {options}"


# ------------------------------------------------------------------------------------------------------------ agreement
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("op, case, dtype", typed_cases())
def test_agreement_with_the_reference(op, case, dtype, implementation, kernels_of, poisoned_scratch):
    call, rng = call_of(op, shrunk(op, case, **SIZES[implementation]), dtype)
    with kernels_of(implementation):
        passed(check_accuracy, call, implementation, rng)
        if op.accumulates:
            passed(check_accuracy, call, implementation, rng, accumulate=True)
        if implementation == "cpu" and dtype == "float32" and multiplies(call):
            passed(check_accuracy, call, implementation, rng, split=True)


LENGTHS = st.sampled_from((1, 2, 3, 4, 5, 7, 8, 11, 16, 17))
LONG = st.sampled_from((31, 64, 97, 131, 257, 521))  # of one letter only


@st.composite
def drawn_cases(draw, op: Op) -> dict:
    """One of the op's cases with other letters."""
    case = dict(draw(st.sampled_from(list(op.cases))))
    names = list(letters(op, case))
    long = draw(st.sampled_from([None, *names]))
    case |= {n: draw(LONG if n == long else LENGTHS) for n in names}
    try:
        assume(size_of(op, case) <= SMALL)
        inputs, constants = make_inputs(op, case, "float32", np.random.default_rng(0))
        shapes = [None if a is None else a.shape for a in inputs.values()]
        outputs = op.describe(list(inputs.values()), constants)
    except ValueError:
        assume(False)
    assume(all(min(a.shape, default=1) > 0 for a in outputs.values() if a is not None))
    assume(sum(prod(a.shape) for a in outputs.values() if a is not None) <= 2 * SMALL)
    assume(op.cost(*shapes, *constants.values()).forward < 5e6)
    return case


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("op", EVERY, ids=list(OPS))
@given(data=st.data())
def test_agreement_at_any_shape(op, implementation, kernels_of, poisoned_scratch, data):
    case = data.draw(drawn_cases(op))
    accumulate = bool(op.accumulates) and data.draw(st.booleans())
    for dtype in (dtype for dtype in DTYPES if has_dtype(op, dtype)):
        call, rng = call_of(op, case, dtype)
        try:
            with kernels_of(implementation):
                passed(check_accuracy, call, implementation, rng, accumulate=accumulate)
        except UserError:  # a GPU's kernels refuse, in words, heads of more than 128 channels
            assert implementation == "cuda"
            reject()
        if implementation == "cpu" and dtype == "float32" and multiplies(call):
            passed(check_accuracy, call, "cpu", rng, split=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op, case", cases([op for op in DIFFERENTIABLE if op.accumulates], small_cases))
def test_a_running_gradient_is_added_to(op, case, implementation, kernels_of):
    call, rng = call_of(op, case)
    weights, running = call.weights(rng), call.running(rng)
    with kernels_of(implementation):
        outputs = call.forward(implementation)
        alone = call.backward(implementation, outputs, weights)
        added = call.backward(implementation, outputs, weights, running=running)
        assert same_bits(added, call.backward(implementation, outputs, weights, running=running, in_place=True))
    for name in alone:
        before = 0 if running.get(name) is None else running[name]
        np.testing.assert_allclose(added[name], alone[name] + before, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ a kernel's manners
@pytest.mark.parametrize("op, case, dtype", typed_cases(small_cases))
def test_inputs_stay_as_they_are(op, case, dtype, kernels_of):
    for implementation in IMPLEMENTATIONS if dtype != "bfloat16" else KERNELS:
        call, rng = call_of(op, shrunk(op, case, **SIZES[implementation]), dtype)
        weights, running = call.weights(rng), call.running(rng)
        given = deepcopy((call.inputs, weights, running))
        with kernels_of(implementation):
            outputs = call.forward(implementation)
            given_outputs = deepcopy(outputs)
            if op.backward:
                call.backward(implementation, outputs, weights, running=running)
        assert all(map(same_bits, (call.inputs, weights, running, outputs), (*given, given_outputs))), implementation


@pytest.mark.parametrize("op, case, dtype", typed_cases())
def test_every_run_and_any_number_of_threads_gives_the_same_bits(op, case, dtype, set_threads):
    call, rng = call_of(op, shrunk(op, case, elements=1_000_000, operations=500_000_000), dtype)
    weights = call.weights(rng)
    for split in (False, True) if dtype == "float32" and multiplies(call) else (False,):
        with products_in("bf16x3" if split else "float32"):
            first = call.run("cpu", weights)
            assert same_bits(first, call.run("cpu", weights))
            for number in range(1, min(numba.config.NUMBA_NUM_THREADS, 3) + 1):
                set_threads(number)
                assert same_bits(first, call.run("cpu", weights)), f"{number} threads, split={split}"


@pytest.mark.parametrize("op, case, dtype", typed_cases(small_cases))
def test_cuda_kernels_give_the_same_bits_in_every_run(op, case, dtype, kernels_of):
    call, rng = call_of(op, shrunk(op, case, **SIZES["cuda"]), dtype)
    weights = call.weights(rng)
    with kernels_of("cuda"):
        first = call.run("cuda", weights)
        for seed in (1, 2):
            if isinstance(devices.runtime(), Emulator):  # threads run in another order, so that a race shows
                with devices.using(Emulator(seed)):
                    assert same_bits(first, call.run("cuda", weights))
            else:
                assert same_bits(first, call.run("cuda", weights))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op, case, dtype", [c for c in typed_cases() if c.values[0].backward_only])
def test_an_output_for_backward_alone_may_be_absent(op, case, dtype, implementation, kernels_of):
    call, _ = call_of(op, case if implementation == "cpu" else shrunk(op, case, **SIZES[implementation]), dtype)
    with kernels_of(implementation):
        every, fewer = call.forward(implementation), call.forward(implementation, absent=op.backward_only)
    assert same_bits(fewer, every | dict.fromkeys(op.backward_only))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op, case", cases(DIFFERENTIABLE, small_cases))
def test_a_gradient_nobody_needs_changes_no_other(op, case, implementation, kernels_of):
    call, rng = call_of(op, shrunk(op, case, **SIZES[implementation]))
    weights, running = call.weights(rng), call.running(rng)
    with kernels_of(implementation):
        outputs = call.forward(implementation)
        every = call.backward(implementation, outputs, weights, running=running)
        for name in every:
            others = [n for n in every if n != name]
            for wanted in filter(None, ([name], others)):  # backward is never asked for nothing
                some = call.backward(implementation, outputs, weights, wanted, running)
                assert same_bits(some, {n: every[n] for n in wanted}), f"with {wanted} alone"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op, case", cases([op for op in DIFFERENTIABLE if len(op.results) > 1], small_cases))
def test_a_result_nobody_uses_has_no_gradient(op, case, implementation, kernels_of):
    call, rng = call_of(op, shrunk(op, case, **SIZES[implementation]))
    weights = call.weights(rng)
    present = [n for n in weights if weights[n] is not None]
    for unused in present if len(present) > 1 else []:
        with kernels_of(implementation):
            outputs = call.forward(implementation)
            absent = call.backward(implementation, outputs, weights | {unused: None})
            zeros = call.backward(implementation, outputs, weights | {unused: np.zeros_like(weights[unused])})
        for name in zeros:
            np.testing.assert_allclose(absent[name], zeros[name], rtol=1e-12, atol=1e-12, err_msg=f"d{name} without d{unused}")
