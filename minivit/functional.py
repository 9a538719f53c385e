"""Functions of tensors, thin wrappers of the ops.

x is a Tensor or an array. Letters: B batch, N tokens, C channels, O outputs, H heads, D head size, K classes. Weights are in PyTorch's
layout. Images are (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from .errors import UserError
from .kernels import OPS
from .kernels.concatenate import concatenation, splitting
from .kernels.core.dtypes import accumulator_dtype
from .sides import Sides, both
from .tensor import Tensor, apply, axis_in, elementwise


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    precise: bool = False,
) -> Tensor:
    """residual + activation(x @ weight.T + bias): x (..., C), weight (O, C), bias (O,), residual (..., O) -> (..., O).

    activation: "none", "gelu" or "gelu_tanh". precise: the result is float32 even if x is bfloat16; without activation and residual.
    """
    return apply(OPS["linear"], x, weight, bias, residual, activation=activation, precise=precise)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise the last axis, then scale and shift: x (..., C), weight and bias (C,) (1607.06450)."""
    return apply(OPS["layernorm"], x, weight, bias, eps=eps)


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Returns x + branch and its layer normalisation, computed in one pass."""
    return apply(OPS["add_layernorm"], x, branch, weight, bias, eps=eps)


def token_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise each channel over the tokens, then scale and shift: x (B, N, C), weight and bias (N,) (2105.02723, section 2)."""
    return apply(OPS["token_layernorm"], x, weight, bias, eps=eps)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "none",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """activation(normalised x·weight + bias), normalised per channel over all rows: x (..., C), all others (C,) (1502.03167).

    activation: "none", "relu", "relu6" or "hardswish". Returns the result, and the mean and the biased variance of the rows, without
    gradient; None for these two with a running mean and variance, which then normalise in their place.
    """
    return apply(OPS["batchnorm"], x, weight, bias, running_mean, running_var, eps=eps, activation=activation)


def fold_batch_norm(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, running_mean: Tensor, running_var: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Weights (O, ...) and bias (O,) of the product that includes a normalisation of its result by running statistics; no gradient.

    scale, shift: the weight and the bias of the normalisation.
    """
    return apply(OPS["fold_batchnorm"], weight, bias, scale, shift, running_mean, running_var, eps=eps)


def follow_statistics(running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, count: int, momentum: float = 0.1) -> None:
    """Move running statistics (C,), in place, by the fraction `momentum` to the mean and the biased variance of `count` values per channel.

    As in PyTorch, the running variance follows the unbiased one. A recorded step moves them in each replay.
    """
    inputs = tuple(t.data for t in (running_mean, running_var, mean, variance))
    op, constants = OPS["running_statistics"], {"momentum": momentum, "count": count}
    op.describe(inputs, constants)
    op.run("forward", (*inputs[:2], *inputs, *constants.values()), inputs, constants.values())


def attention(
    qkv: Tensor,
    heads: int,
    scale: float | None = None,
    bias: Tensor | None = None,
    *,
    return_probabilities: bool = False,
    return_logits: bool = False,
) -> Any:
    """Multi-head attention softmax(scale·q kᵀ + bias) v from packed qkv (B, N, 3·C), ordered q, k, v, then head: -> (B, N, C).

    scale: D^-1/2 by default. bias: broadcast to (B, H, N, N). With return_probabilities or return_logits (scaled and biased, before the
    softmax), returns a tuple of the context and these, (B, H, N, N). Raises UserError if 3·heads does not divide the channels, and on a GPU
    for heads with more than 128 channels.
    Source: 1706.03762, section 3.2; order of qkv as in timm.
    """
    _check_rank("attention", "qkv", qkv, "(B, N, 3·C)")
    B, N, channels = qkv.shape
    if channels % 3:
        raise UserError(f"attention: qkv has {channels} channels, which is no multiple of 3")
    size = _head_size("attention", channels // 3, heads)
    if bias is not None:
        bias = bias if isinstance(bias, Tensor) else Tensor(np.asarray(bias, qkv.dtype))
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        if bias.shape[2:] != (N, N):
            bias = broadcast(bias, (*bias.shape[:2], N, N))
    context, logits, probabilities = apply(
        OPS["attention"],
        qkv.reshape(B, N, 3, heads, size),
        bias,
        scale=float(size**-0.5 if scale is None else scale),
        keep_logits=return_logits,
        keep_probabilities=return_probabilities,
    )
    context = context.reshape(B, N, channels // 3)
    optional_results = [t for t in (probabilities, logits) if t is not None]
    return (context, *optional_results) if optional_results else context


def head_moments(p: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance among the heads of attention probabilities (B, H, N, N): -> (H,) and (H, H), float32 if p is bfloat16."""
    return apply(OPS["head_moments"], p)


def head_mixing(p: Tensor, v: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """Values weighted by attention probabilities that are mixed among the heads: y_h = (Σ a_hg·p_g + c_h)·v_h.

    p (B, H, N, N), v (B, N, H, D), a (H, H), c (H,) -> (B, N, H, D). Source: 2103.11886, section 4.2.
    """
    return apply(OPS["head_mixing"], p, v, a, c)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """Multi-head attention of one query per sample: q (B, C), k and v (B, N, C) -> (B, C).

    scale: D^-1/2 by default. Raises UserError if heads does not divide the channels. Source: 2103.14899, equation 5.
    """
    for name, value, shape in (("q", q, "(B, C)"), ("k", k, "(B, N, C)"), ("v", v, "(B, N, C)")):
        _check_rank("cross_attention", name, value, shape)
    channels = q.shape[1]
    size = _head_size("cross_attention", channels, heads)
    keys, values = (t.reshape(*t.shape[:2], -1, size) if t.shape[2] % size == 0 else t for t in (k, v))
    context = apply(
        OPS["cross_attention"], q.reshape(len(q), heads, size), keys, values, scale=float(size**-0.5 if scale is None else scale)
    )
    return context.reshape(len(q), channels)


def _head_size(function: str, channels: int, heads: int) -> int:
    """The channels of a head. Raises UserError if heads does not divide the channels."""
    if heads < 1:
        raise UserError(f"{function}: heads must be 1 or more, not {heads}")
    if channels % heads:
        raise UserError(f"{function}: heads must divide the channels: {channels} is not a multiple of {heads}")
    return channels // heads


def performer(kqv: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Linear attention φ(q)(φ(k)ᵀ v) / (φ(q)·Σ φ(k) + 1e-8), φ(x) = exp(x wᵀ - |x|²/2) / √m, from packed kqv (B, T, 3·E), ordered k, q, v.

    weights: w, (m, E), without a gradient. Returns this, (B, T, E), and v, (B, T, E), for a residual connection.
    Source: 2101.11986 (T2T-ViT), whose code has this order and this constant; 2009.14794, lemma 1.
    """
    _check_rank("performer", "kqv", kqv, "(B, T, 3·E)")
    _check_rank("performer", "weights", weights, "(m, E)")
    return apply(OPS["performer"], kqv.reshape(*kqv.shape[:2], 3, weights.shape[1]), weights)


def patch_projection(images: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sides | None = None, padding: Sides = 0) -> Tensor:
    """Project each patch: images (B, C, H, W), weight (O, C, P, Q) -> (B, rows·columns, O), patches in row-major order.

    stride: the patch size by default, so that patches do not overlap. Source: 2010.11929, section 3.1 (a convolution).
    """
    _check_rank("patch_projection", "weight", weight, "(O, C, P, Q)")
    patches = unfold(images, weight.shape[2:], weight.shape[2:] if stride is None else stride, padding)
    B, rows, columns, size = patches.shape
    return linear(patches.reshape(B, rows * columns, size), weight.reshape(len(weight), size), bias)


def depthwise_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Sides = 0,
    *,
    activation: str = "none",
) -> Tensor:
    """activation(convolution + bias) of channels-last maps (B, H, W, C) with a kernel for each channel, weight (C, 1, kh, kw), bias (C,).

    -> (B, U, V, C), U = (H + 2·padding - kh) // stride + 1; zero padded. activation: "none", "relu", "relu6" or "hardswish".
    Source: 1704.04861, section 3.1.
    """
    _check_rank("depthwise_convolution", "x", x, "(B, H, W, C)")
    _check_rank("depthwise_convolution", "weight", weight, "(C, 1, kh, kw)")
    border = both(padding)
    w = weight.reshape(weight.shape[0], *weight.shape[2:])
    return apply(OPS["depthwise"], x, w, bias, stride=stride, padding=border, activation=activation)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sides = 1, padding: Sides = 0) -> Tensor:
    """Convolution of channels-last maps (B, H, W, C) with weight (O, C, kh, kw), as a matrix product: -> (B, U, V, O), zero padded."""
    _check_rank("convolution", "x", x, "(B, H, W, C)")
    _check_rank("convolution", "weight", weight, "(O, C, kh, kw)")
    if (*weight.shape[2:], stride, padding) != (1, 1, 1, 0):
        x = unfold(x, weight.shape[2:], stride, padding, channels_last=True)  # (B, U, V, C·kh·kw)
    return linear(x, weight.reshape(len(weight), -1), bias)


def unfold(
    images: Tensor,
    kernel: Sides,
    stride: Sides = 1,
    padding: Sides = 0,
    *,
    channels_last: bool = False,
) -> Tensor:
    """Extract patches of images (B, C, H, W) as rows: -> (B, rows, columns, C·kh·kw), zero padded.

    channels_last: the images are (B, H, W, C), as tokens of a grid are; the patches are the same. Raises UserError if none fits.
    """
    size, step, border = map(both, (kernel, stride, padding))
    _check_rank("unfold", "images", images, "(B, H, W, C)" if channels_last else "(B, C, H, W)")
    first = 1 if channels_last else 2  # axis of the height
    for axis, name in ((0, "height"), (1, "width")):
        length = images.shape[first + axis]
        if length + 2 * border[axis] < size[axis]:
            raise UserError(f"patch size {size[axis]} does not fit into image {name} {length} with padding {border[axis]}")
    return apply(OPS["unfold"], images, kernel=size, stride=step, padding=border, channels_last=channels_last)


def resample(x: Tensor, old: Sides, new: Sides, method: str, class_token: str = "none") -> Tensor:
    """Resample the tokens of a grid to another grid: x (A, old rows · columns, C) -> (A, new rows · columns, C), in row-major order.

    old, new: (rows, columns), or one number for a square.
    method: "bilinear" (2105.02723), "upsample" (to twice the size, then the means of the new bins: 2105.15075, section 3.3), "bicubic" or
    "bicubic_antialias"; see `kernels.resample.axis_matrix`.
    class_token: "none"; otherwise both have a class token before the patches; the result's is zero ("zero") or copied from x ("keep").
    """
    return apply(OPS["resample"], x, old=both(old), new=both(new), method=method, class_token=class_token)


def channel_mixing_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, residual: Tensor | None = None, approximate: str = "none"
) -> Tensor:
    """residual + gelu(x @ w1.T + b1) @ w2.T + b2: x (B, N, C), w1 (F, C), w2 (O, F) -> (B, N, O) (2105.01601, equation 1)."""
    return apply(OPS["channel_mixing"], x, w1, b1, w2, b2, residual, approximate=approximate)


def token_mixing_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, residual: Tensor | None = None, approximate: str = "none"
) -> Tensor:
    """The same MLP over the token axis: x (B, N, C), w1 (F, N), w2 (O, F) -> (B, O, C) (2105.01601, equation 1)."""
    return apply(OPS["token_mixing"], x, w1, b1, w2, b2, residual, approximate=approximate)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x·Φ(x); approximate "none" uses erf, "tanh" the tanh form (1606.08415)."""
    return apply(OPS["gelu"], x, approximate=approximate)


def power(x: Tensor, y: Tensor) -> Tensor:
    """x ** y with NumPy's broadcasting; one of the two may be a number. NaN for x < 0 where y is no whole number."""
    return elementwise("power", x, y)


def maximum(x: Tensor, y: Tensor) -> Tensor:
    """The larger of two elements, with NumPy's broadcasting; where they are equal, each gets half of the gradient."""
    return elementwise("maximum", x, y)


def minimum(x: Tensor, y: Tensor) -> Tensor:
    """The smaller of two elements, with NumPy's broadcasting; where they are equal, each gets half of the gradient."""
    return elementwise("minimum", x, y)


def exp(x: Tensor) -> Tensor:
    """eˣ."""
    return elementwise("exp", x)


def log(x: Tensor) -> Tensor:
    """The natural logarithm: -∞ of 0, NaN below, without a warning."""
    return elementwise("log", x)


def sqrt(x: Tensor) -> Tensor:
    """The square root: NaN below 0, without a warning. The derivative at 0 is ∞."""
    return elementwise("sqrt", x)


def absolute(x: Tensor) -> Tensor:
    """|x|; the derivative at 0 is 0."""
    return elementwise("absolute", x)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return elementwise("tanh", x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e⁻ˣ)."""
    return elementwise("sigmoid", x)


def relu(x: Tensor) -> Tensor:
    """max(x, 0); the derivative at 0 is 0."""
    return elementwise("relu", x)


def relu6(x: Tensor) -> Tensor:
    """min(max(x, 0), 6); the derivative at 0 and at 6 is 0 (1704.04861)."""
    return elementwise("relu6", x)


def hardsigmoid(x: Tensor) -> Tensor:
    """relu6(x + 3) / 6; the derivative at -3 and at 3 is 0 (1905.02244, section 5.2)."""
    return elementwise("hardsigmoid", x)


def hardswish(x: Tensor) -> Tensor:
    """x·relu6(x + 3) / 6, also called h-swish; the derivative at -3 is 0, at 3 it is 1 (1905.02244, section 5.2)."""
    return elementwise("hardswish", x)


def softmax(x: Tensor) -> Tensor:
    """exp(x) / Σ exp(x) over the last axis."""
    return apply(OPS["softmax"], x)


def take(x: Tensor, indices: Any, axis: int) -> Tensor:
    """x at whole-number indices along an axis, which have any shape and may be negative or repeated. Raises IndexError beyond the end."""
    numbers = np.asarray(indices)
    if numbers.dtype.kind not in "iu":
        raise UserError(f"take: indices must be whole numbers, not {numbers.dtype}")
    return x[(slice(None),) * axis_in(axis, x.ndim) + (numbers,)]


def broadcast(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Broadcast x to a shape by NumPy's rules."""
    return apply(OPS["broadcast"], x, shape=tuple(shape))


def class_token(x: Tensor, token: Tensor, positions: Tensor) -> Tensor:
    """The token (1, 1, C) before x (B, N, C), and positions (1, 1 + N, C) added to all: (B, 1 + N, C) (2010.11929, equation 1)."""
    return apply(OPS["class_token"], x, token, positions)


def concatenate(*tensors: Tensor, axis: int) -> Tensor:
    """Join tensors along an axis."""
    if not tensors:
        raise UserError("concatenate takes one tensor or more")
    axis = axis_in(axis, tensors[0].ndim)
    if any(t.ndim != tensors[0].ndim for t in tensors):
        raise UserError(f"concatenate: tensors must have as many axes, not shapes {', '.join(str(t.shape) for t in tensors)}")
    if len(tensors) == 1:
        return tensors[0]
    return apply(concatenation(len(tensors)), *tensors, lengths=tuple(t.shape[axis] for t in tensors), axis=axis)


def split(x: Tensor, parts: int | Sequence[int], axis: int) -> tuple[Tensor, ...]:
    """Split a tensor along an axis into parts of equal length, or of the given lengths. Raises UserError if the parts do not fit."""
    axis = axis_in(axis, x.ndim)
    if isinstance(parts, int):
        if parts < 1 or x.shape[axis] % parts:
            raise UserError(f"split: {parts} parts do not divide axis {axis} of shape {x.shape}")
        parts = (x.shape[axis] // parts,) * parts
    if min(parts, default=0) < 1 or sum(parts) != x.shape[axis]:
        raise UserError(f"split: lengths of {tuple(parts)} do not make up axis {axis} of shape {x.shape}")
    return (x,) if len(parts) == 1 else apply(splitting(len(parts)), x, lengths=tuple(parts), axis=axis)


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors of the same shape."""
    return reduce(Tensor.__add__, tensors)


def _check_rank(function: str, name: str, value: Tensor, shape: str) -> None:
    if value.ndim != shape.count(",") + 1:
        raise UserError(f"{function}: {name} must have the shape {shape}, not {value.shape}")


def cross_entropy(logits: Tensor, targets: Any, label_smoothing: float = 0.0, *, weight: Any = None, batch: Any = None) -> Tensor:
    """Mean cross-entropy of logits (B, K) against classes (B,) or probabilities (B, K): -> ().

    label_smoothing s makes the target (1 - s)·target + s / K (1512.00567, section 7).
    weight: (K,), of the classes, as in PyTorch: against classes the mean is weighted too, Σ w·loss / Σ w of the rows' classes, and 0 if the
    latter is 0; against probabilities the weight multiplies each class's term, and the mean is over rows.
    batch: (M,), the classes of the batch of which these rows are a part: the mean is then over that batch, so that parts add up.
    Raises UserError for a class outside 0 … K - 1, a wrong number of targets or weights, and weights that are negative, not finite or all
    0. Arrays on a GPU are not checked: a class that is out of range makes the loss NaN.
    """
    on_cpu = logits.device != "cuda"
    targets = np.asarray(targets) if on_cpu else targets
    _check_rank("cross_entropy", "logits", logits, "(B, K)")
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing must lie in 0 ... below 1, got {label_smoothing}")
    if targets.ndim not in (1, 2):
        raise UserError(f"cross_entropy: targets must have the shape (B,) or (B, K), not {targets.shape}")
    if len(targets) != len(logits):
        raise UserError(f"cross_entropy: {len(targets)} targets for {len(logits)} rows of logits")
    if weight is not None and on_cpu:
        weight = checked_class_weights(weight, logits.shape[1]).astype(accumulator_dtype(logits.dtype), copy=False)
    if targets.ndim == 2:
        targets = targets.astype(logits.dtype, copy=False) if on_cpu else targets
        return apply(OPS["soft_cross_entropy"], logits, targets, weight, label_smoothing=label_smoothing)
    if on_cpu:
        targets, batch = (None if labels is None else classes_below(np.asarray(labels), logits.shape[1]) for labels in (targets, batch))
    return apply(OPS["cross_entropy"], logits, targets, weight, batch, label_smoothing=label_smoothing)


def classes_below(labels: np.ndarray, number: int) -> np.ndarray:
    """The labels as int64. Raises UserError for labels that are not whole numbers, and names the first outside 0 … number - 1."""
    if labels.dtype.kind not in "iu":
        raise UserError(f"labels must be whole numbers, got {labels.dtype}")
    outside = np.flatnonzero((labels < 0) | (labels >= number))
    if len(outside):
        raise UserError(f"label {labels[outside[0]]} at position {outside[0]} is outside 0 … {number - 1}")
    return labels.astype(np.int64, copy=False)


def checked_class_weights(weights: Any, number: int) -> np.ndarray:
    """The weights of `number` classes as a floating-point array (number,). Raises UserError for anything that is not that, or useless."""
    try:
        array = np.asarray(weights)
        array = array if array.dtype.kind == "f" else array.astype(np.float64)
    except (TypeError, ValueError):
        raise UserError(f"class weights must be {number} numbers, one for each class, got {str(weights)[:100]!r}") from None
    if array.shape != (number,):
        raise UserError(f"class weights must be {number} numbers, one for each class, got the shape {array.shape}")
    wrong = ~(np.isfinite(array) & (array >= 0))
    if wrong.any():
        raise UserError(f"the weight of class {np.argmax(wrong)} is {array[np.argmax(wrong)]}: a weight must be finite, and 0 or more")
    if not array.any():
        raise UserError("all class weights are 0: nothing would be learned; leave them out, or give some class a weight")
    return array


def dropout(x: Tensor, rate: float, state: np.ndarray, use: int = 0) -> Tensor:
    """Zero each element with probability `rate` and scale the others by 1 / (1 - rate).

    state: uint64 (seed, step); use: the number of the call site. Equal seed, step and use give the same mask.
    """
    return apply(OPS["dropout"], x, state, rate=float(rate), use=use)


def drop_path(x: Tensor, rate: float, state: np.ndarray, use: int = 0) -> Tensor:
    """Stochastic depth: `dropout` of entire samples of x (B, ...) (1603.09382)."""
    return apply(OPS["drop_path"], x, state, rate=float(rate), use=use)
