"""Trees of parameters: names, modes, state dicts."""

import numpy as np
import pytest

from minivit import Module, Parameter, Tensor, UserError


class Leaf(Module):
    def __init__(self, size):
        self.weight = Parameter(np.zeros((size, 2)))
        self.constant = Parameter(np.ones(size), requires_grad=False)
        self.size = size

    def forward(self, x, factor=1):
        return x * factor * self.size


class Tree(Module):
    def __init__(self):
        self.first = Parameter(np.zeros(3, np.float32))
        self.leaves = [Leaf(1), Leaf(2), "no module"]
        self.none = None
        self.last = Leaf(4)


NAMES = ["first", "leaves.0.weight", "leaves.0.constant", "leaves.1.weight", "leaves.1.constant", "last.weight", "last.constant"]


def test_names_are_paths_in_order_of_making():
    tree = Tree()
    assert [name for name, _ in tree.named_parameters()] == NAMES
    assert [id(p) for p in tree.parameters()] == [id(p) for _, p in tree.named_parameters()]
    assert [type(m).__name__ for m in tree.modules()] == ["Tree", "Leaf", "Leaf", "Leaf"]


def test_a_call_is_forward():
    assert Leaf(3)(2, factor=5) == 30
    with pytest.raises(NotImplementedError):
        Tree()(1)


def test_modes_reach_everything():
    tree = Tree()
    assert tree.train() is tree and all(m.training for m in tree.modules())
    assert tree.eval() is tree and not any(m.training for m in tree.modules())


def test_zero_grad():
    tree = Tree()
    for parameter in tree.parameters():
        parameter.grad = Tensor(parameter.data)
    tree.zero_grad()
    assert all(p.grad is None for p in tree.parameters())


def test_state_dict_is_a_copy():
    tree = Tree()
    state = tree.state_dict()
    assert list(state) == NAMES
    state["first"][:] = 7
    assert (tree.first.data == 0).all()


def test_load_keeps_arrays_and_dtypes():
    tree = Tree()
    array = tree.first.data
    state = {name: np.full(a.shape, i, np.float64) for i, (name, a) in enumerate(tree.state_dict().items())}
    tree.load_state_dict(state)
    assert tree.first.data is array and array.dtype == np.float32
    assert all((a == i).all() for i, a in enumerate(tree.state_dict().values()))


def test_every_fault_is_listed_and_nothing_changed():
    tree = Tree()
    state = {name: a + 5 for name, a in tree.state_dict().items()}
    state["first"] = np.zeros(4)
    state["extra"] = state.pop("last.weight")
    before = tree.state_dict()
    with pytest.raises(UserError, match=r"wrong shape: first is \(4,\), not \(3,\); missing: last.weight; unexpected: extra$"):
        tree.load_state_dict(state)
    with pytest.raises(UserError, match=r"wrong shape: first is \(4,\), not \(3,\)$"):
        tree.load_state_dict(state, strict=False)
    assert all(np.array_equal(before[n], a) for n, a in tree.state_dict().items())
    del state["first"]
    tree.load_state_dict(state, strict=False)
    assert (tree.leaves[0].weight.data == 5).all() and (tree.last.weight.data == 0).all()
