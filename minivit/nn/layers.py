"""The layers of the models.

Letters: B batch, N tokens, C channels, H heads, D head size, (H, W) image size. A layer's weights are zero (scales of
normalisations one) until `initialisers.initialise` or `load_state_dict` sets them. Attributes, and hence parameters, have timm's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from .. import functional as F
from ..errors import UserError
from ..grad_mode import current_tracer
from ..kernels import primitives
from ..kernels.core.arrays import empty_like, to_device
from ..kernels.core.devices import device_of
from ..kernels.random import advance
from ..sides import Sides, both
from ..tensor import Tensor
from .initialisers import Initialiser
from .module import Module, Parameter, filled

__all__ = [
    "Attention",
    "AttentionPool",
    "BatchNorm",
    "CrossAttention",
    "DropPath",
    "Dropout",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "Mlp",
    "PatchEmbed",
    "Projection",
    "Random",
    "Sequential",
    "Stem",
    "TokenLayerNorm",
    "TokenMlp",
]

APPROXIMATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # activation -> argument `approximate` of functional.gelu


class Random:
    """The random state of a model, from which its dropout layers draw masks.

    state: uint64 (seed, step); a mask depends only on seed, step and the number of its layer, so these two numbers suffice to resume a run.
    current: the copy from which masks are drawn in the forward pass, and again in its backward pass.
    """

    def __init__(self, seed: int = 0) -> None:
        self.state = np.array([seed, 0], np.uint64)
        self.current = self.state
        self.uses = 0
        self.active = False  # whether any layer has a rate above 0

    def to(self, device: str) -> None:
        """Move the state to "cpu" or "cuda"."""
        self.state = self.current = to_device(self.state, device)

    def register_layer(self, rate: float) -> int:
        """Register a dropout layer with this rate; returns its number."""
        self.active |= rate > 0
        self.uses += 1
        return self.uses - 1

    def advance(self) -> None:
        """Advance to the next step. Kernels do this, so that it is part of a recorded plan."""
        advance.on(device_of(self.state))(self.state)
        self.current = empty_like(self.state)  # a new array: the backward of an earlier pass may still need the old one
        primitives(device_of(self.state)).copy(self.current, self.state, (2,), (1,), (1,))


class Sequential(Module):
    """A sequence of modules; parameters are named by position, and None stands for a position without parameters."""

    def __init__(self, *layers: Any) -> None:
        self.layers = list(layers)

    def child_slots(self) -> Iterator[tuple[str, Any, Any, Module | Parameter]]:
        yield from ((str(i), self.layers, i, layer) for i, layer in enumerate(self.layers) if layer is not None)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Dropout(Module):
    """Zero elements with probability `rate` in training, and scale the others by 1 / (1 - rate) (Srivastava et al., 2014)."""

    function = staticmethod(F.dropout)

    def __init__(self, rate: float, random: Random) -> None:
        self.rate, self.random = rate, random
        self.use = random.register_layer(rate)

    @property
    def active(self) -> bool:
        return self.training and self.rate > 0

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.rate, self.random.current, self.use) if self.active else x


class DropPath(Dropout):
    """Stochastic depth: `Dropout` of entire samples, for the branch of a residual block (1603.09382)."""

    function = staticmethod(F.drop_path)


class Linear(Module):
    """activation(x @ weight.T + bias) + residual: x (..., inputs) -> (..., outputs).

    parts: the weight stacks the matrices of so many projections, of which Muon orthogonalises each.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, dtype: str = "float32", parts: int = 1) -> None:
        self.parts = parts
        self.weight = filled((outputs, inputs), 0.0, dtype)
        self.bias = filled((outputs,), 0.0, dtype) if bias else None

    def forward(self, x: Tensor, activation: str = "none", residual: Tensor | None = None, precise: bool = False) -> Tensor:
        return F.linear(x, self.weight, self.bias, activation=activation, residual=residual, precise=precise)


class LayerNorm(Module):
    """Normalisation over the last axis (1607.06450)."""

    def __init__(self, dim: int, eps: float = 1e-6, dtype: str = "float32") -> None:
        self.eps = eps
        self.weight = filled((dim,), 1.0, dtype)
        self.bias = filled((dim,), 0.0, dtype)

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Any:
        if branch is None:
            return F.layer_norm(x, self.weight, self.bias, self.eps)
        return F.add_layer_norm(x, branch, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x + branch and its normalisation, computed in one pass."""
        return self(x, branch)


class TokenLayerNorm(Module):
    """Normalisation of each channel over the tokens: (B, tokens, C) -> (B, tokens, C) (2105.02723, section 2)."""

    def __init__(self, tokens: int, eps: float = 1e-6, dtype: str = "float32") -> None:
        self.eps = eps
        self.weight = filled((tokens,), 1.0, dtype)
        self.bias = filled((tokens,), 0.0, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.token_layer_norm(x, self.weight, self.bias, self.eps)


class BatchNorm(Module):
    """Normalisation of each channel over all rows of a batch, and an activation: (..., C) -> (..., C) (1502.03167).

    In evaluation the running statistics normalise. In training the batch's own do, and the running ones follow them, also in a recorded
    step, which is why a batch is not computed in parts. A module that computes the statistics elsewhere uses the parameters of this one
    and calls `check_batch` and `follow`. Raises UserError for a batch of one image in training.
    """

    statistics = ("running_mean", "running_var")
    ignored = ("num_batches_tracked",)  # PyTorch's

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1, dtype: str = "float32") -> None:
        self.eps, self.momentum = eps, momentum
        self.weight = filled((dim,), 1, dtype)
        self.bias = filled((dim,), 0, dtype)
        self.running_mean = filled((dim,), 0, dtype, requires_grad=False)
        self.running_var = filled((dim,), 1, dtype, requires_grad=False)

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        if not self.training:
            given = self.running_mean, self.running_var
            return F.batch_norm(x, self.weight, self.bias, *given, self.eps, activation=activation)[0]
        self.check_batch(x)
        y, mean, variance = F.batch_norm(x, self.weight, self.bias, eps=self.eps, activation=activation)
        assert mean is not None and variance is not None
        self.follow(mean, variance, x.size // x.shape[-1])
        return y

    @staticmethod
    def check_batch(x: Tensor) -> None:
        """Raises UserError for a batch (B, ...) of one image, whose statistics would be those of the image."""
        if len(x) < 2:
            raise UserError(
                "batch normalisation learns from two images or more at once, got 1: choose a larger batch, or call model.eval()"
            )

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights (dim, ...) and bias (dim,) of a product with these, whose result the running statistics normalise; without gradient."""
        return F.fold_batch_norm(weight, bias, self.weight, self.bias, self.running_mean, self.running_var, self.eps)

    def follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics towards the mean and biased variance (C,) of `count` values per channel."""
        if current_tracer() is None:  # which computes nothing
            F.follow_statistics(self.running_mean, self.running_var, mean, variance, count, self.momentum)


class LayerScale(Module):
    """x · gamma, with one factor per channel, initially `initial` (2103.17239, section 2)."""

    def __init__(self, dim: int, initial: float, dtype: str = "float32") -> None:
        self.gamma = filled((dim,), initial, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def check_images(images: Tensor, shape: tuple[int, ...]) -> None:
    """Raises UserError for images that do not have the shape (B, *shape)."""
    if images.ndim != 4 or images.shape[1:] != shape:
        raise UserError(
            f"images have shape {images.shape}, the model takes (B, {', '.join(map(str, shape))}): resize them, "
            "or create the model with their image_size and in_channels"
        )


def with_class_token(x: Tensor, token: Tensor | None, positions: Tensor | None = None) -> Tensor:
    """Tokens with the class token (1, 1, C) before them, if there is one, and positions added: (B, N, C) -> (B, 1 + N or N, C)."""
    if token is None:
        return x if positions is None else x + positions
    if positions is not None:
        return F.class_token(x, token, positions)
    return F.concatenate(F.broadcast(token, (len(x), 1, x.shape[2])), x, axis=1)


class Stem(Module):
    """The first layers of a model: images (B, in_channels, H, W) -> tokens (B, N, dim).

    grid: rows and columns of patches, N in all. first: the name of the weights (outputs, in_channels, rows, columns) that meet the pixels.
    """

    grid: tuple[int, int]
    first: ClassVar[str]

    def initialisers(self) -> dict[str, Initialiser]:
        """The distributions of its parameters, by pattern of their names, if the model's table does not have them."""
        return {}

    @property
    def filters(self) -> Parameter:
        """The weights that meet the pixels."""
        return dict(self.named_parameters())[self.first]


class PatchEmbed(Stem):
    """Cut images into patches and project each: (B, in_channels, H, W) -> (B, N, dim) (2010.11929, section 3.1).

    image_size, patch_size, stride, padding: (rows, columns), or one number for both. stride: pixels from one patch to the next; None: the
    patch size, which must then divide the image size. padding: pixels of zeros around the image.
    Raises UserError if the patches do not fit the image size, or for images of another shape.
    """

    first = "proj.weight"
    no_muon = (first,)

    def __init__(
        self,
        image_size: Sides,
        patch_size: Sides,
        in_channels: int,
        dim: int,
        dtype: str = "float32",
        stride: Sides | None = None,
        padding: Sides = 0,
    ) -> None:
        self.shape = in_channels, *both(image_size)
        self.stride, self.padding = both(patch_size if stride is None else stride), both(padding)
        self.grid = patch_grid(image_size, patch_size, stride, padding)
        self.proj = Projection(in_channels, dim, patch_size, dtype)

    @classmethod
    def of(cls, config: Any) -> PatchEmbed:
        """The layer for a configuration with these fields (`models.config.BackboneConfig`), and `dim`."""
        return cls(
            config.image_size, config.patch_size, config.in_channels, config.dim, config.dtype, config.patch_stride, config.patch_padding
        )

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.shape)
        return F.patch_projection(images, self.proj.weight, self.proj.bias, self.stride, self.padding)


def patch_grid(image_size: Sides, patch_size: Sides, stride: Sides | None = None, padding: Sides = 0) -> tuple[int, int]:
    """Rows and columns of patches, as for `PatchEmbed`. Raises UserError if they do not fit the image."""
    grid = []
    for image, patch, step, border in zip(both(image_size), both(patch_size), both(stride or 0), both(padding)):
        if not step and image % patch:
            raise UserError(f"patch_size must divide image_size: {image} is not a multiple of {patch}")
        if patch > image + 2 * border:
            raise UserError(f"patches of {patch} pixels do not fit into an image of {image} pixels with padding {border}")
        grid.append((image + 2 * border - patch) // (step or patch) + 1)
    return grid[0], grid[1]


class Projection(Module):
    """The weights of a convolution; the parent module applies them as a matrix product. size: rows and columns, or one number for both."""

    def __init__(self, inputs: int, outputs: int, size: Sides, dtype: str = "float32") -> None:
        self.weight = filled((outputs, inputs, *both(size)), 0.0, dtype)
        self.bias = filled((outputs,), 0.0, dtype)


class Attention(Module):
    """Multi-head self-attention with one projection to q, k and v: (B, N, C) -> (B, N, C) (1706.03762, section 3.2).

    `forward` takes a bias (B, H, N, N), which is added to the scaled logits, and with return_logits also returns these logits,
    (B, H, N, N). With `first` it returns the results of so many first tokens alone. residual: (B, N, C), which the projection adds, in the
    same pass; not with an active proj_drop. Raises UserError if `heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        random: Random,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dtype: str = "float32",
    ) -> None:
        if dim % heads:
            raise UserError(f"heads must divide dim: {dim} is not a multiple of {heads}")
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, qkv_bias, dtype, parts=3)
        self.attn_drop = Dropout(attn_drop, random)
        self.proj = Linear(dim, dim, dtype=dtype)
        self.proj_drop = Dropout(proj_drop, random)

    @property
    def needs_probabilities(self) -> bool:
        """Whether `context` computes the weighted sum of the values."""
        return self.attn_drop.active

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        return_logits: bool = False,
        first: int | None = None,
        residual: Tensor | None = None,
    ) -> Any:
        qkv = self.qkv(x)  # (B, N, 3·C)
        result = F.attention(qkv, self.heads, bias=bias, return_probabilities=self.needs_probabilities, return_logits=return_logits)
        context, *optional_results = result if isinstance(result, tuple) else (result,)
        if self.needs_probabilities:
            B, N, channels = x.shape
            v = qkv.reshape(B, N, 3, self.heads, channels // self.heads)[:, :, 2]  # (B, N, H, D)
            context = self.context(self.attn_drop(optional_results.pop(0)), v).reshape(B, N, channels)
        if first is not None:
            context, residual = context[:, :first], None if residual is None else residual[:, :first]
        y = self.proj_drop(self.proj(context, residual=residual))
        return (y, optional_results[0]) if return_logits else y

    def context(self, probabilities: Tensor, v: Tensor) -> Tensor:
        """The values weighted by the probabilities (B, H, N, N), after dropout: v (B, N, H, D) -> (B, N, H, D)."""
        return (probabilities @ v.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


class CrossAttention(Module):
    """Attention of the first token to all tokens: (B, N, C) -> (B, 1, C) (2103.14899, equation 5).

    Raises UserError if `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, random: Random, proj_drop: float = 0.0, dtype: str = "float32") -> None:
        if dim % heads:
            raise UserError(f"heads must divide dim: {dim} is not a multiple of {heads}")
        self.heads = heads
        self.wq, self.wk, self.wv, self.proj = (Linear(dim, dim, dtype=dtype) for _ in range(4))
        self.proj_drop = Dropout(proj_drop, random)

    def forward(self, z: Tensor) -> Tensor:
        context = F.cross_attention(self.wq(z[:, 0]), self.wk(z), self.wv(z), self.heads)  # (B, C)
        return self.proj_drop(self.proj(context)).reshape(len(z), 1, -1)


class AttentionPool(Module):
    """The mean of tokens, weighted by the softmax of a learned score of each: (B, N, C) -> (B, C) (2104.05704, section 3.1).

    With the scores' weights of zero at first, it begins as the plain mean. There is no bias, which the softmax would cancel.
    """

    def __init__(self, dim: int, dtype: str = "float32") -> None:
        self.weight = filled((1, dim), 0.0, dtype)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        scores = F.linear(x, self.weight, None).reshape(B, 1, N)
        return (F.softmax(scores) @ x).reshape(B, C)


class Mlp(Module):
    """fc2(gelu(fc1(x))) over the channels, with dropout after each layer: (B, N, dim) -> (B, N, out).

    out: by default dim. activation: "gelu" (erf) or "gelu_tanh". `forward` adds `residual`, in the same pass if dropout is inactive.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        random: Random,
        activation: str = "gelu",
        drop: float = 0.0,
        dtype: str = "float32",
        out: int | None = None,
    ) -> None:
        self.activation = activation
        self.fc1 = Linear(dim, hidden, dtype=dtype)
        self.drop1 = Dropout(drop, random)
        self.fc2 = Linear(hidden, out or dim, dtype=dtype)
        self.drop2 = Dropout(drop, random)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.drop1.active:
            y = self._with_dropout(x)
            return y if residual is None else residual + y
        return self._fused(x, residual)

    def _weights(self) -> tuple[Any, ...]:
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return F.channel_mixing_mlp(x, *self._weights(), residual=residual, approximate=APPROXIMATIONS[self.activation])

    def _with_dropout(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.fc1(x, self.activation))))


class TokenMlp(Mlp):
    """The same MLP over the tokens, shared by all channels: (B, dim, C) -> (B, dim, C) (2105.01601, section 2)."""

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return F.token_mixing_mlp(x, *self._weights(), residual=residual, approximate=APPROXIMATIONS[self.activation])

    def _with_dropout(self, x: Tensor) -> Tensor:
        return super()._with_dropout(x.transpose(0, 2, 1)).transpose(0, 2, 1)
