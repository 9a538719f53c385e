"""Convolutions of channels-last maps and attention over channels, against plain NumPy."""

import numpy as np
import pytest

from minivit import Tensor, UserError, gradcheck, no_grad
from minivit.nn.convolution import Conv2d, DepthwiseConv2d, EfficientChannelAttention, SqueezeExcitation
from minivit.nn.initialisers import initialise, normal
from minivit.nn.layers import BatchNorm


def filled(layer):
    initialise(layer, {"running_var": lambda rng, shape: rng.uniform(0.5, 2, shape), "*": normal(0.5)}, seed=0)
    return layer


def maps(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def convolved(x, weight, bias, stride, padding):
    """x (B, H, W, C), weight (O, C, k, k) -> (B, U, V, O)."""
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], (1, 2))[:, ::stride, ::stride]
    return np.einsum("buvcij,ocij->buvo", windows, weight) + (0 if bias is None else bias)


@pytest.mark.parametrize(
    "size, stride, padding, bias", [(7, 2, 3, False), (3, 1, 1, True), (8, 8, 0, True), (1, 1, 0, True), (1, 2, 0, False)]
)
def test_convolutions(size, stride, padding, bias):
    layer, x = filled(Conv2d(3, 5, size, stride, padding, bias, dtype="float64")), maps(2, 16, 8, 3)
    expected = convolved(x, layer.weight.numpy(), layer.bias.numpy() if bias else None, stride, padding)
    np.testing.assert_allclose(layer(Tensor(x)).numpy(), expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(layer, x)


@pytest.mark.parametrize("size, stride, padding", [(3, 1, 1), (3, 2, 1), (5, 1, 0)])
def test_depthwise_convolutions(size, stride, padding):
    layer, x = filled(DepthwiseConv2d(3, size, stride, padding, dtype="float64")), maps(2, 6, 7, 3)
    weight = np.zeros((3, 3, size, size))
    weight[np.arange(3), np.arange(3)] = layer.weight.numpy()[:, 0]
    expected = convolved(x, weight, layer.bias.numpy(), stride, padding)
    np.testing.assert_allclose(layer(Tensor(x)).numpy(), expected, rtol=1e-12, atol=1e-12)
    assert layer.weight.shape == (3, 1, size, size) and gradcheck(layer, x)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "hardswish"])
@pytest.mark.parametrize(
    "make", [lambda: Conv2d(4, 4, 3, 2, 1, dtype="float64"), lambda: DepthwiseConv2d(4, 3, 2, 1, bias=False, dtype="float64")]
)
def test_inference_folds_the_normalisation(make, activation):
    layer, norm, x = filled(make()), filled(BatchNorm(4, dtype="float64")), Tensor(3 * maps(2, 6, 7, 4))
    expected = norm(layer(x), activation).numpy()
    np.testing.assert_array_equal(layer(x, norm, activation).numpy(), expected)
    with no_grad():
        np.testing.assert_allclose(layer(x, norm, activation).numpy(), expected, rtol=1e-11, atol=1e-11)
        norm.train()
        np.testing.assert_array_equal(layer(x, norm, activation).numpy(), norm(layer(x), activation).numpy())


def test_squeeze_and_excitation():
    layer, x = filled(SqueezeExcitation(6, 2, dtype="float64")), 2 * maps(3, 4, 2, 6)
    first, _, second = layer.fc.layers
    hidden = (x.mean((1, 2)) @ first.weight.numpy().T + first.bias.numpy()).clip(0)
    factors = (hidden @ second.weight.numpy().T + second.bias.numpy() + 3).clip(0, 6) / 6
    np.testing.assert_allclose(layer(Tensor(x)).numpy(), x * factors[:, None, None], rtol=1e-12)
    assert first.weight.shape == (3, 6) and gradcheck(layer, x)
    with pytest.raises(UserError, match="a reduction of 7 leaves no hidden unit of 6 channels: make it 6 or less"):
        SqueezeExcitation(6, 7)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("channels, size", [(8, 3), (64, 3), (256, 5), (768, 5)])
def test_efficient_channel_attention(channels, size, hard):
    layer, x = filled(EfficientChannelAttention(channels, hard, dtype="float64")), maps(2, 3, 1, channels)
    assert layer.conv.weight.shape == (1, 1, size)
    padded = np.pad(x.mean((1, 2)), ((0, 0), (size // 2, size // 2)))
    logits = np.lib.stride_tricks.sliding_window_view(padded, size, 1) @ layer.conv.weight.numpy()[0, 0]
    factors = (logits + 3).clip(0, 6) / 6 if hard else 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(layer(Tensor(x)).numpy(), x * factors[:, None, None], rtol=1e-12)
    if channels == 8:
        assert gradcheck(layer, x)
