"""Muon: PyTorch's numbers, which parameters are its own, and training with it."""

import pickle

import numpy as np
import pytest
from golden_files import assert_matches, part, read_golden
from small_models import batches, nano

from minivit import Module, Parameter, Trainer, UserError, create_model
from minivit.kernels.core import devices
from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.cpu import primitives as cpu
from minivit.kernels.cpu import run
from minivit.kernels.orthogonalise import COEFFICIENTS, forward, multiply_adds
from minivit.nn.convolution import Conv2d
from minivit.nn.layers import Linear
from minivit.optim import FlatParameters, Muon

FAMILIES = {
    "vit_nano_patch2_8": {"depth": 2},
    "mixer_nano_patch2_8": {"depth": 2},
    "localvit_nano_patch2_8": {"depth": 2},
    "t2t_vit_nano_8": {"depth": 2},
    "crossvit_nano_8": {"stages": 1},
    "ff_only_nano_patch2_8": {"depth": 2},
    "dvt_nano_8": {"depth": 1},
}


class Net(Module):
    """The parameters of tests/golden/muon.py."""

    no_muon = ("head",)

    def __init__(self):
        self.qkv = Linear(12, 36, dtype="float64", parts=3)
        for name, (inputs, outputs) in {"proj": (12, 12), "fc1": (12, 20), "fc2": (20, 12), "odd": (7, 5), "odd_again": (7, 5)}.items():
            setattr(self, name, Linear(inputs, outputs, bias=False, dtype="float64"))
        self.conv = Conv2d(3, 6, 2, bias=False, dtype="float64")
        self.head = Linear(12, 4, bias=False, dtype="float64")
        self.pos_embed = Parameter(np.zeros((1, 3, 5)))


@pytest.mark.parametrize(
    "device, setting",
    [
        ("cpu", "original"),
        ("cpu", "match_rms_adamw"),
        ("cpu", "without_nesterov"),
        pytest.param("cuda", "original", marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_follow_pytorch(device, setting, kernels_of):
    """torch.optim.Muon with its rounding to bfloat16 taken out, and torch.optim.AdamW: see tests/golden/muon.py."""
    arrays, config = read_golden("muon.safetensors")
    net = Net()
    net.load_state_dict(part(arrays, "initial/"))
    with kernels_of(device):
        flat = FlatParameters(net, device=device, first=Muon.first)
        optimizer = Muon(flat, weight_decay=config["weight_decay"], betas=tuple(config["betas"]), **config["settings"][setting])
        assert sorted(batch.starts.shape[0] for batch in optimizer.batches) == [1, 1, 1, 2, 4]
        for step in range(config["steps"]):
            optimizer.lr = config["peak"] * (step + 1) / config["steps"]
            for name, parameter in net.named_parameters():
                gradient = arrays[f"noise/{name}"][step] + 0.1 * parameter.numpy()
                if device == "cpu":
                    parameter.grad_home[...] = gradient
                else:
                    devices.runtime().from_numpy(parameter.grad_home, gradient)
            optimizer.step()
        for name, value in net.state_dict().items():
            assert_matches(value, arrays[f"{setting}/{name}"], name)


@pytest.mark.parametrize("rows, columns", [(48, 48), (40, 90), (90, 40)])
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-10), (np.float32, 2e-3), (BFLOAT16, 0.3)])
def test_the_form_without_x_is_the_iteration(rows, columns, dtype, tolerance):
    """The plain Newton-Schulz iteration, on matrices with singular values from 1 to 10⁻⁴. (In bfloat16 PyTorch's own errs by 0.23.)"""
    rng = np.random.default_rng(0)
    u, s, v = np.linalg.svd(rng.standard_normal((3, rows, columns)), full_matrices=False)
    x = np.ascontiguousarray(((u * np.logspace(0, -4, s.shape[1])) @ v).astype(dtype))
    a, b, c = COEFFICIENTS
    expected = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=(1, 2), keepdims=True)
    for _ in range(5):
        A = expected @ expected.swapaxes(1, 2)
        expected = a * expected + (b * A + c * A @ A) @ expected
    y = np.empty_like(x)
    forward(cpu, y, x, 5)
    error = np.linalg.norm(y.astype(np.float64) - expected, 2, axis=(1, 2))
    assert error.max() < tolerance


def test_the_multiply_adds():
    """Of the iteration as published: 2·n²·m + n³ for each step. As here, symmetric products count half, and X is computed once."""
    assert multiply_adds(192, 192, 5) == 5 * (192**3 + 2 * 192**3 // 2)
    assert multiply_adds(192, 768, 5) == multiply_adds(768, 192, 5) == 6 * 192**3 + 17 * 192**3 // 2


def names_of(model):
    matrices = model.hidden_matrices()
    return {name: matrices[id(p)] for name, p in model.named_parameters() if id(p) in matrices}


def test_whose_parameters_are_muons():
    vit = names_of(create_model("vit_nano_patch2_8", depth=1, class_token=True))
    assert vit == {
        "blocks.0.attn.qkv.weight": (3, 64, 64),
        "blocks.0.attn.proj.weight": (1, 64, 64),
        "blocks.0.mlp.fc1.weight": (1, 256, 64),
        "blocks.0.mlp.fc2.weight": (1, 64, 256),
    }
    local = names_of(create_model("localvit_nano_patch2_8", depth=1))
    assert [local[f"blocks.0.conv.conv.{i}.weight"] for i in (0, 7)] == [(1, 128, 64), (1, 64, 128)]
    assert not any(name.endswith("conv.3.weight") for name in local)  # a kernel for each channel
    tokens = names_of(create_model("t2t_vit_nano_8", depth=1))
    assert "tokens_to_token.attention1.kqv.weight" not in tokens  # it meets the pixels
    assert tokens["tokens_to_token.attention2.kqv.weight"] == (3, 16, 144)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_learns_and_every_matrix_turns(name):
    model = create_model(name, seed=1, num_classes=10, in_channels=1, **FAMILIES[name])
    before = model.state_dict()
    trainer = Trainer(model, optimizer="muon", lr=3e-3, clip_norm=1.0, ema=0.9)
    images, labels = next(batches(1, size=16))
    losses = [trainer.step(images, labels) for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]
    after, trained = model.state_dict(), {n for n, p in model.named_parameters() if p.requires_grad}
    for parameter, (parts, rows, columns) in names_of(model).items():
        moved = (after[parameter] - before[parameter]).reshape(parts, rows, columns)
        assert ((np.linalg.norm(moved, axis=(1, 2)) > 0) == (parameter in trained)).all(), parameter


@pytest.mark.parametrize("precision", ["float32", "bf16x3", "bfloat16"])
def test_replays_eager_steps_and_threads_agree_to_the_bit(precision):
    results = []
    for options in ({}, {"plan": False}, *({"threads": n} for n in range(1, min(run.most_threads(), 2) + 1))):
        trainer = Trainer(nano(dim=48, seed=3), optimizer="muon", precision=precision, ema=0.9, clip_norm=0.5, lr=1e-2, **options)
        losses = [trainer.step(images, labels) for images, labels in batches(4)]
        results.append((losses, pickle.dumps(trainer.model.state_dict()), pickle.dumps(trainer.optimizer.state_dict())))
    assert all(result == results[0] for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replays_equal_eager_steps_on_a_gpu(precision, kernels_of):
    with kernels_of("cuda"):
        results = []
        for plan in (True, False):
            trainer = Trainer(nano(), device="cuda", optimizer="muon", precision=precision, ema=0.9, clip_norm=0.5, plan=plan)
            losses = [trainer.step(images, labels) for images, labels in batches(3)]
            results.append((losses, pickle.dumps(trainer.model.state_dict()), pickle.dumps(trainer.optimizer.state_dict())))
    assert results[0] == results[1]


def test_the_second_moment_is_kept_of_adamws_parameters_alone():
    optimizer = Trainer(nano(), optimizer="muon").optimizer
    matrices = sum(parts * rows * columns for parts, rows, columns in names_of(nano()).values())
    assert len(optimizer.m) - len(optimizer.v) == matrices
    assert optimizer.state_dict().keys() == {"m", "v", "scalars"}


def test_frozen_matrices_stay():
    model = nano()
    model.blocks[0].attn.qkv.weight.requires_grad = False
    before = model.state_dict()
    Trainer(model, optimizer="muon", lr=0.1).step(*next(batches(1)))
    np.testing.assert_array_equal(model.state_dict()["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])


def test_a_model_without_hidden_matrices_has_adamw():
    class Probe(Module):
        no_muon = ("weight",)

        def __init__(self):
            self.weight = Parameter(np.ones((10, 64)))

    states = []
    for name in ("muon", "adamw"):
        trainer = Trainer(Probe(), optimizer=name, lr=0.1)
        trainer.flat.gradient[...] = 1
        trainer.optimizer.step()
        states.append(trainer.model.state_dict()["weight"])
    np.testing.assert_array_equal(*states)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"adjust_lr_fn": "match_rms"}, r"unknown adjust_lr_fn 'match_rms' \(nearest: match_rms_adamw\): choose original, match_rms_adamw"),
        ({"ns_steps": 0}, r"ns_steps must be a whole number of 1 \.\.\. 99, got 0"),
        ({"ns_steps": 2.5}, "ns_steps must be a whole number"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"lr": -1.0}, "lr must be"),
        ({"dampening": 0.1}, "muon has no option 'dampening'"),
    ],
)
def test_options_out_of_range_are_told(options, message):
    with pytest.raises(UserError, match=message) as error:
        Trainer(nano(), optimizer="muon", **options)
    assert "\n" not in str(error.value)
