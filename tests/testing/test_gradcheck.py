"""The checkers pass what is right and catch what is wrong."""

from dataclasses import replace

import numpy as np
import pytest

from minivit import functional
from minivit.errors import UserError
from minivit.kernels import OPS
from minivit.kernels.core.cases import Sample, input_shapes, make_inputs, shrunk
from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.core.op import Cost, Implementation, Op
from minivit.nn.module import Module, Parameter
from minivit.tensor import Tensor
from minivit.testing.checks import check, check_model, check_op
from minivit.testing.gradcheck import GradientError, gradcheck
from minivit.testing.numerics import check_accuracy
from minivit.testing.result import CheckResult


# ------------------------------------------------------------------------------------------------------------ an op
def forward(y, sums, x, w, shift, power):
    y[...] = x**power * w + (0 if shift is None else shift)
    if sums is not None:
        sums[...] = x.sum(-1)


def backward(dx, dw, dshift, dy, dx_sum, x, w, power):
    if dx is not None:
        dx[...] = dy * power * x ** (power - 1) * w + (0 if dx_sum is None else dx_sum)
    if dw is not None:
        dw[...] = (dy * x**power).reshape(-1, len(w)).sum(0)
    if dshift is not None:
        dshift[...] = dy.reshape(-1, dy.shape[-1]).sum(0)


POWER = Op(
    "power",
    shapes={"x": "B 2*C", "w": "2*C", "shift": "2*C"},
    constants={"power": 3, "tiles": (1, 1)},
    outputs=lambda x, w, shift, power, tiles: {"y": x, "sums": x[:-1] if shift else None},
    forward=Implementation(lambda *a: forward(*a[:-1]), lambda *a: forward(*a[:-1])),
    backward=Implementation(lambda *a: backward(*a[:-1]), lambda *a: backward(*a[:-1])),
    saves=("x", "w"),
    accumulates=("x",),
    cases=[dict(B=3, C=2), dict(B=2, C=3, shift=None, power=2)],
    cost=lambda x, w, shift, power, tiles: Cost(forward=2 * x[0] * x[1], backward=4 * x[0] * x[1]),
)


def with_cpu(forward=None, backward=None) -> Op:
    """POWER, with `forward` or `backward` called after its own on the same arguments."""

    def after(own, spoil):
        def run(*arguments):
            own(*arguments)
            if spoil:
                spoil(*arguments)

        return run

    return replace(
        POWER,
        forward=Implementation(POWER.forward.reference, after(POWER.forward.cpu, forward)),
        backward=Implementation(POWER.backward.reference, after(POWER.backward.cpu, backward)),
    )


def failed(op: Op) -> set:
    return {(r.dtype, r.against) for r in check_op(op) if not r.passed}


def test_a_case_gives_sizes_shapes_and_constants():
    rng = np.random.default_rng(0)
    inputs, constants = make_inputs(POWER, dict(B=3, C=2), np.float32, rng)
    assert {n: a.shape for n, a in inputs.items()} == {"x": (3, 4), "w": (4,), "shift": (4,)}
    assert {a.dtype for a in inputs.values()} == {np.dtype(np.float32)} and constants == {"power": 3, "tiles": (1, 1)}
    inputs, constants = make_inputs(POWER, dict(B=3, C=2, shift=None, power=2), np.float64, rng, sizes={"B": 7})
    assert inputs["x"].shape == (7, 4) and inputs["shift"] is None and constants["power"] == 2
    assert input_shapes(POWER, dict(B=3, C=2, tiles=(4, 5), shift="power tiles[1]-C"))["shift"] == (3, 3)
    assert input_shapes(POWER, dict(B=3, C=2, shift=""))["shift"] == ()
    assert make_inputs(POWER, dict(B=3, C=2, tiles=lambda s: (s["B"], 9)), np.float64, rng)[1]["tiles"] == (3, 9)
    with pytest.raises(ValueError, match=r"power: shift \(B-3\)"):
        input_shapes(POWER, dict(B=3, C=2, shift="B-3"))


def test_a_large_case_is_shrunk_by_its_first_letter():
    case = dict(B=1000, C=50, shift=None)
    assert shrunk(POWER, case) == case
    assert shrunk(POWER, case, elements=100_000) == {**case, "B": 250}
    assert shrunk(POWER, case, operations=100_000) == {**case, "B": 500}
    assert shrunk(POWER, case, elements=1)["B"] == 1


def test_a_gradient_of_zero_passes():
    assert all(r.passed for r in check_op(POWER, cases=[dict(B=3, C=2, power=0)]))


def test_values_make_an_input():
    op = replace(POWER, values={"w": lambda rng, shape, sizes: np.full(shape, sizes["B"] + sizes["power"], np.int64)})
    w = make_inputs(op, dict(B=3, C=2), np.float32, np.random.default_rng(0))[0]["w"]
    assert w.dtype == np.int64 and (w == 6).all()


def test_a_right_op_passes():
    rows = check_op(POWER)
    assert [(r.dtype, r.against) for r in rows] == [
        ("float64", "differences"),
        ("float64", "reference"),
        ("float32", "reference"),
        ("bfloat16", "reference"),
    ]
    assert all(r.passed and r.name == "power" and r.backend == "cpu" for r in rows)
    assert rows[0].directions == 4 and rows[0].elements == 12 + 4 + 4 + 12 + 6  # all: both cases are small
    assert 0 < rows[0].worst < 1e-8
    assert [(r.dtype, r.against) for r in check_op(POWER, "reference")] == [("float64", "differences")]


@pytest.mark.parametrize("place, name", list(enumerate(["dx", "dw", "dshift"])))
def test_a_wrong_gradient_is_caught(place, name):
    def spoil(*arguments):
        if arguments[place] is not None:
            arguments[place].flat[-1] *= 1.001

    op = with_cpu(backward=spoil)
    assert ("float64", "differences") in failed(op)
    assert f"d{name[1:]}" in check_op(op, directions=0)[0].failure


def test_an_unwritten_element_is_caught():
    def skip(y, *arguments):
        y.flat[3] = np.nan

    rows = check_op(with_cpu(forward=skip))
    assert not any(r.passed for r in rows) and all(r.worst == np.inf for r in rows)


def test_an_imprecise_kernel_is_caught():
    def spoil(y, *arguments):
        y *= 1 + 1e-5

    assert failed(with_cpu(forward=spoil)) >= {("float64", "reference"), ("float32", "reference")}

    def single(y, *arguments):
        y[...] = y.astype(np.float32)

    assert ("float64", "reference") in failed(with_cpu(forward=single))
    assert ("float32", "reference") not in failed(with_cpu(forward=single))


def test_a_running_gradient_that_is_forgotten_is_caught():
    def forget(dx, dw, dshift, dy, dx_sum, *arguments):
        if dx_sum is not None:
            dx -= dx_sum

    assert failed(with_cpu(backward=forget)) == {(dtype, "reference") for dtype in ("float64", "float32", "bfloat16")}


def test_bfloat16_is_held_to_one_rounding_more_than_naive():
    def spoil(part):
        def multiply(y, sums, x, *arguments):
            if y.dtype == BFLOAT16:
                y[...] = y.astype(np.float32) * (1 + part)

        return with_cpu(forward=multiply)

    assert failed(spoil(2**-5)) == {("bfloat16", "reference")}
    assert not failed(spoil(2**-9))  # as naive as the reference, and not worse


def test_without_activations_there_is_no_bfloat16():
    rows = check_op(replace(POWER, parameters=("x", "w", "shift")))
    assert "bfloat16" not in {r.dtype for r in rows} and all(r.passed for r in rows)


@pytest.mark.parametrize("part, found", [(1e-3, True), (1e-6, False)])
def test_split_products_are_held_to_their_own_bound(part, found):
    def spoil(y, *arguments):
        y *= 1 + part

    rng, result = np.random.default_rng(0), CheckResult()
    check_accuracy(Sample(with_cpu(forward=spoil), *make_inputs(POWER, POWER.cases[0], "float32", rng)), "cpu", rng, result, split=True)
    assert bool(result.failure) == found


def test_optional_pieces_reach_the_kernels():
    inputs, constants = make_inputs(POWER, dict(B=3, C=2, shift=None), "float64", np.random.default_rng(0))
    call = Sample(POWER, inputs, constants)
    weights = call.weights(np.random.default_rng(1))
    outputs = call.forward("cpu")
    assert outputs["sums"] is None and set(call.backward("cpu", outputs, weights)) == {"x", "w"}
    assert set(call.backward("cpu", outputs, weights, wanted=["w"])) == {"w"}


# ------------------------------------------------------------------------------------------------------------ a function
def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def test_gradcheck_passes():
    assert gradcheck(lambda a, b: a * b + a @ b, [normal(3, 3), normal(3, 3)]) is True
    assert gradcheck(lambda x: (x * x).sum(), normal(2, 3))
    assert gradcheck(lambda x: x.reshape(6).transpose(), Tensor(normal(2, 3), requires_grad=True))
    assert gradcheck(lambda x, labels: functional.cross_entropy(x, labels), [normal(4, 3), np.array([0, 2, 1, 1])])


def test_gradcheck_leaves_a_tensor_alone_that_requires_no_gradient():
    weight = Tensor(normal(3, 3))
    assert gradcheck(lambda x, w: x * w.detach(), [Tensor(normal(3, 3), requires_grad=True), weight])
    assert weight.grad is None


def test_gradcheck_names_input_index_and_both_values():
    a, b = normal(2, 2), normal(2, 2) + 3
    with pytest.raises(GradientError, match=r"input 1, index \(0, 0\): backward gives (\S+), the central difference (\S+)") as caught:
        gradcheck(lambda a, b: a + b * b.detach(), [a, b])
    given, difference = (float(str(caught.value).split(f"{word} ")[1].split(",")[0]) for word in ("gives", "difference"))
    assert difference == pytest.approx(2 * given)


def test_gradcheck_sees_a_gradient_that_is_missing():
    with pytest.raises(GradientError, match="input 1"):
        gradcheck(lambda a, b: a * b.detach(), [normal(2), normal(2)])
    with pytest.raises(GradientError, match="depends on no input"):
        gradcheck(lambda a: a.detach() * 2.0, [normal(2)])


def test_gradcheck_checks_every_output():
    assert gradcheck(lambda a, b: (a * b, (a + b).sum()), [normal(2, 3), normal(2, 3)])
    assert gradcheck(lambda a: functional.split(a, 3, axis=1), normal(2, 3))
    assert gradcheck(lambda a: [a, a, Tensor(np.ones(3))], normal(2))
    for place in range(3):
        with pytest.raises(GradientError, match=rf"output {place}, input 1, index \(0,\): backward gives 0, the central difference"):
            gradcheck(lambda a, b, place=place: [a * (b.detach() if i == place else b) for i in range(3)], [normal(2), normal(2)])
    with pytest.raises(GradientError, match="output 1, input 0"):
        gradcheck(lambda a: (a, a.detach() * 2.0), normal(2))
    with pytest.raises(GradientError, match="depends on no input"):
        gradcheck(lambda a: (), normal(2))
    with pytest.raises(TypeError, match="or a tuple or list of them, not ndarray"):
        gradcheck(lambda a: (a, a.numpy()), normal(2))


def test_gradcheck_refuses_what_it_cannot_judge():
    with pytest.raises(UserError, match="input 0 is float32"):
        gradcheck(lambda a: a, [normal(2).astype(np.float32)])
    with pytest.raises(UserError, match="nothing to check"):
        gradcheck(lambda a: a, [Tensor(normal(2))])
    with pytest.raises(TypeError, match="must return a Tensor, or a tuple or list of them, not ndarray"):
        gradcheck(lambda a: a.numpy(), [normal(2)])
    random = np.random.default_rng(0)
    with pytest.raises(GradientError, match="two calls"):
        gradcheck(lambda a: a * random.standard_normal(2), [normal(2)])


# ------------------------------------------------------------------------------------------------------------ a model
class Small(Module):
    def __init__(self, dtype=np.float64, cut: bool = False, noise: bool = False):
        self.weight = Parameter(np.full((4, 12), 0.5, dtype))
        self.bias = Parameter(np.zeros(4, dtype))
        self.frozen = Parameter(np.ones(4, dtype), requires_grad=False)
        self.cut, self.noise = cut, np.random.default_rng(0) if noise else None

    def forward(self, images):
        bias = self.bias.detach() + self.bias * 0.5 if self.cut else self.bias
        out = functional.gelu(functional.linear(images.reshape(len(images), -1), self.weight, bias)) * self.frozen
        return out * (1 + self.noise.random()) if self.noise else out


def test_check_model_passes_and_puts_everything_back():
    model = Small()
    before = model.state_dict()
    report = check_model(model, normal(2, 3, 2, 2), name="small", directions=2, elements=5)
    assert report.passed and report.name == "small" and report.dtype == "float64" and report.worst < 1e-7
    assert report.directions == 2 and report.elements == 5 + 4 + 5
    assert all(np.array_equal(before[n], a) for n, a in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_check_model_catches_a_wrong_gradient():
    assert not check_model(Small(cut=True), normal(2, 3, 2, 2), directions=1, elements=0).passed
    report = check_model(Small(cut=True), normal(2, 3, 2, 2), directions=0, elements=2)
    assert "dbias" in report.failure


def test_check_model_refuses_what_it_cannot_judge():
    with pytest.raises(UserError, match=r"weight is float32; create the model with dtype=\"float64\""):
        check_model(Small(np.float32), normal(2, 3, 2, 2))
    model = Small(noise=True)
    before = model.state_dict()
    with pytest.raises(UserError, match=r"differ: call model\.eval\(\)"):
        check_model(model, normal(2, 3, 2, 2))
    assert all(np.array_equal(before[n], a) for n, a in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ the table
def test_the_table_is_in_the_order_asked_for():
    name = next(iter(OPS))
    rows = list(check([name, "small"], {"small": lambda: (Small(), normal(2, 3, 2, 2))}))
    assert [r.name for r in rows] == [name] * 4 + ["small"] and all(r.passed for r in rows)


def test_an_unknown_name_is_refused_before_anything_runs():
    with pytest.raises(UserError, match=r"no op or model is called 'smal' \(nearest: small"):
        check(["smal"], {"small": lambda: pytest.fail("made")})
