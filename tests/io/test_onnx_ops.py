"""Each op as nodes of ONNX: in ONNX Runtime its cases give what its reference gives."""

# ruff: noqa: E402 (what follows needs the packages)

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


from minivit import UserError
from minivit import functional as F
from minivit.io.onnx_graph import Graph, walk
from minivit.io.onnx_ops import TRANSLATIONS, translate, translation_of
from minivit.kernels import OPS
from minivit.kernels.core.cases import Sample, make_inputs, shrunk
from minivit.tensor import Tensor, apply

# Losses, optimizers, what is drawn at random, and the statistics of batches: no forward of a model in evaluation has them.
OF_TRAINING = {"dropout", "drop_path", "cross_entropy", "soft_cross_entropy", "begin_update", "adamw", "sgd", "orthogonalise"}
OF_TRAINING |= {"muon_momentum", "muon", "augment", "running_statistics", "head_moments"}
IN_FORWARD = [name for name in OPS if name not in OF_TRAINING]


def graph_of(function, first, second=None):
    graph = Graph(walk(function, first), walk(function, first if second is None else second))
    translate(graph)
    model = graph.model({})
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model, inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([each.name for each in session.get_outputs()], session.run(None, inputs)))


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_nodes_or_is_for_training(name):
    if name in OF_TRAINING:
        with pytest.raises(UserError, match=f"the op {name} has no ONNX form"):
            translation_of(name)
    else:
        translation_of(name)


def test_each_entry_is_of_an_op():
    assert set(TRANSLATIONS) <= set(OPS)


@pytest.mark.parametrize("name, number", [(name, i) for name in IN_FORWARD for i in range(len(OPS[name].cases))])
def test_a_case_gives_what_the_reference_gives(name, number):
    op = OPS[name]
    inputs, constants = make_inputs(op, shrunk(op, op.cases[number], 20_000, 10_000_000), "float32", np.random.default_rng(0))
    if name in ("log", "sqrt", "power"):
        inputs = {n: np.asarray(np.abs(a) + 0.1, np.float32) for n, a in inputs.items()}
    sample = Sample(op, inputs, constants)
    expected = {n: None if a is None or n in op.backward_only else np.zeros(a.shape, a.dtype) for n, a in sample.describe().items()}
    op.forward.reference(*expected.values(), *inputs.values(), *constants.values())
    given = {n: a for n, a in inputs.items() if a is not None}

    def function(**tensors):
        passed = {n: t if n not in op.dtypes else given[n] for n, t in tensors.items()}
        results = apply(op, *(passed.get(n) for n in op.inputs), **constants)
        names = [*op.results, *op.detached]
        return {n: t for n, t in zip(names, results if len(names) > 1 else [results]) if t is not None}

    floating = {n: a for n, a in given.items() if n not in op.dtypes}
    answers = run(graph_of(lambda **tensors: function(**tensors, **{n: None for n in given if n in op.dtypes}), floating), floating)
    assert answers
    for result, answer in answers.items():
        assert answer.shape == expected[result].shape
        np.testing.assert_allclose(answer, expected[result], rtol=2e-5, atol=2e-5 * max(1, np.abs(expected[result]).max()))


# ---------------------------------------------------------------------------------------------------------------------- batches
def in_batches(function, size=4):
    """What the graph of a function of x (B, 3, 4) gives for a batch of another size than those it was made of, and that batch."""
    arrays = [np.random.default_rng(0).standard_normal((n, 3, 4)).astype(np.float32) for n in (2, 3, size)]
    model = graph_of(lambda x: {"y": function(x)}, {"x": arrays[0]}, {"x": arrays[1]})
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    return run(model, {"x": arrays[2]})["y"], arrays[2]


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda x: x.reshape(-1, 4), lambda x: x.reshape(-1, 4)),
        (lambda x: x.reshape(len(x), 2, 6) * 2.0, lambda x: x.reshape(-1, 2, 6) * 2),
        (lambda x: F.broadcast(Tensor(np.ones((1, 1, 4), np.float32)), (len(x), 2, 4)), lambda x: np.ones((len(x), 2, 4))),
        (lambda x: x.reshape(1, -1, 4).mean(1), lambda x: x.reshape(1, -1, 4).mean(1)),
        (lambda x: x[:, -1:, ::-1], lambda x: x[:, -1:, ::-1]),
        (lambda x: x[:, [2, 0, 0]], lambda x: x[:, [2, 0, 0]]),
        (
            lambda x: x.reshape(len(x) * 3, 4) + F.broadcast(Tensor(np.ones((1, 1), np.float32)), (len(x) * 3, 4)),
            lambda x: x.reshape(-1, 4) + 1,
        ),
        (lambda x: F.concatenate(*F.split(x, (1, 2), axis=1)[::-1], axis=1), lambda x: x[:, [1, 2, 0]]),
        (lambda x: x, lambda x: x),
    ],
    ids=["rows", "reshape", "broadcast", "mean", "slice", "take", "times", "split", "nothing"],
)
def test_a_batch_of_any_size(function, expected):
    answer, x = in_batches(function)
    np.testing.assert_allclose(answer, expected(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", [lambda x: x[-1], lambda x: x[: len(x) - 1], lambda x: x.sum(0) * (1 / len(x)) if len(x) > 2 else x])
def test_what_depends_on_the_size_of_the_batch_is_refused(function):
    with pytest.raises(UserError, match="no ONNX form"):
        in_batches(function)


def test_what_follows_from_constants_is_computed_at_once():
    weight = Tensor(np.arange(12, dtype=np.float32).reshape(3, 4))
    x = np.ones((2, 4), np.float32)
    model = graph_of(lambda x: {"y": x @ F.exp(weight).T}, {"x": x}, {"x": np.ones((3, 4), np.float32)})
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Identity"]
    np.testing.assert_allclose(run(model, {"x": x})["y"], x @ np.exp(weight.numpy()).T, rtol=1e-6)
