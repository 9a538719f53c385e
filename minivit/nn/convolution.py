"""Convolutions of channels-last maps, with the normalisation and activation that follow them, and attention over their channels.

Letters: B batch, (H, W) map, C channels. As in `layers`, attributes have the names of the authors' code and of timm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import functional as F
from ..errors import UserError
from ..grad_mode import is_grad_enabled
from ..sides import Sides, both
from ..tensor import Tensor
from .layers import BatchNorm, Linear, Sequential
from .module import Module, filled

__all__ = ["Conv2d", "DepthwiseConv2d", "EfficientChannelAttention", "SqueezeExcitation"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}


class Conv2d(Module):
    """Convolution of channels-last maps: (B, H, W, inputs) -> (B, U, V, outputs), U = (H + 2·padding - size) // stride + 1.

    size, stride, padding: (rows, columns), or one number for both.
    `forward` takes the BatchNorm of its result and the activation after it. In inference, which needs no gradients, the running statistics
    are folded into the weights, which a recorded plan does once.
    """

    def __init__(
        self, inputs: int, outputs: int, size: Sides, stride: Sides = 1, padding: Sides = 0, bias: bool = True, dtype: str = "float32"
    ) -> None:
        self.stride, self.padding = stride, padding
        self.weight = filled((outputs, inputs, *both(size)), 0, dtype)
        self.bias = filled((outputs,), 0, dtype) if bias else None

    def forward(self, x: Tensor, norm: BatchNorm | None = None, activation: str = "none") -> Tensor:
        if norm is None:
            return self._convolve(x, self.weight, self.bias, activation)
        if norm.training or is_grad_enabled():
            return norm(self._convolve(x, self.weight, self.bias, "none"), activation)
        return self._convolve(x, *norm.fold(self.weight, self.bias), activation)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        return ACTIVATIONS[activation](F.convolution(x, weight, bias, self.stride, self.padding))


class DepthwiseConv2d(Conv2d):
    """The same with a kernel for each channel: (B, H, W, channels) -> (B, U, V, channels)."""

    no_muon = ("weight",)

    def __init__(self, channels: int, size: int, stride: int = 1, padding: int = 0, bias: bool = True, dtype: str = "float32") -> None:
        super().__init__(1, channels, size, stride, padding, bias, dtype)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        assert isinstance(self.stride, int)
        return F.depthwise_convolution(x, weight, bias, self.stride, self.padding, activation=activation)


class SqueezeExcitation(Module):
    """Each channel times a factor of 0 … 1, which an MLP computes from the means of all channels (1709.01507): (B, H, W, C) likewise.

    The MLP has C / reduction hidden units and a ReLU; its last activation is the hard sigmoid (1905.02244, section 5.2). Raises UserError
    if no hidden unit is left.
    """

    def __init__(self, channels: int, reduction: int, dtype: str = "float32") -> None:
        if channels < reduction:
            raise UserError(f"a reduction of {reduction} leaves no hidden unit of {channels} channels: make it {channels} or less")
        hidden = channels // reduction
        self.fc = Sequential(Linear(channels, hidden, dtype=dtype), None, Linear(hidden, channels, dtype=dtype))  # None: the ReLU

    def forward(self, x: Tensor) -> Tensor:
        first, _, second = self.fc.layers
        factors = F.hardsigmoid(second(F.relu(first(x.mean((1, 2))))))  # (B, C)
        return x * factors.reshape(len(x), 1, 1, -1)


class EfficientChannelAttention(Module):
    """Each channel times a factor of 0 … 1: a convolution over the means of neighbouring channels (1910.03151): (B, H, W, C) likewise.

    Its kernel has about log2(C)/2 weights (section 3.2.3 with gamma = 2 and b = 1). hard: hard sigmoid instead of sigmoid.
    """

    def __init__(self, channels: int, hard: bool, dtype: str = "float32") -> None:
        self.hard = hard
        self.conv = _ChannelConvolution(int((math.log2(channels) + 1) / 2) | 1, dtype)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.conv(x.mean((1, 2)))  # (B, C)
        factors = F.hardsigmoid(logits) if self.hard else F.sigmoid(logits)
        return x * factors.reshape(len(x), 1, 1, -1)


class _ChannelConvolution(Module):
    """A convolution along the channels of (B, C), zero padded, with the weight of a one-dimensional one: (1, 1, size)."""

    def __init__(self, size: int, dtype: str) -> None:
        self.weight = filled((1, 1, size), 0, dtype)

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.size
        columns = F.unfold(x.reshape(len(x), 1, -1, 1), (size, 1), 1, (size // 2, 0))  # (B, C, 1, size)
        return F.linear(columns, self.weight.reshape(1, size)).reshape(x.shape)


def convolve_all(layers: list[Any], x: Tensor, activation: str) -> Tensor:
    """Run the layers of a list in order: a convolution with the BatchNorm and the activation (None) that follow it, or another module."""
    for i, layer in enumerate(layers):
        if isinstance(layer, Conv2d):
            norm = next((each for each in layers[i + 1 : i + 2] if isinstance(each, BatchNorm)), None)
            after = i + 1 + (norm is not None)
            x = layer(x, norm, activation if after < len(layers) and layers[after] is None else "none")
        elif layer is not None and not isinstance(layer, BatchNorm):
            x = layer(x)
    return x
