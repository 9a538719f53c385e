"""exp, log, tanh, the logistic function, erf, and GELU with its derivative, for use inside kernels.

Numba's own versions call the C library for every element. In float32 these have no branches or calls, so that loops over them vectorise;
their relative error is about 1e-7. In float64 they are the C library's, with full accuracy. NaN stays NaN.

    exp(x)  = 2ⁿ·exp(r),  n = round(x / ln 2),  |r| <= ln(2)/2,  exp(r) = 1 + r + r²·E(r)
    log(x)  = n·ln 2 + log(m),  x = m·2ⁿ,  √½ <= m < √2,  log(m) = 2s + s³·L(s²),  s = (m - 1) / (m + 1),  L(z) = 2/3 + 2/5 z + ...
    tanh(x) = x / (1 + x² / (3 + x² / (5 + x² / (7 + x² / 9))))  for |x| < 0.625,  otherwise ±(1 - 2 / (exp(2|x|) + 1))
    erf(x)  = x·P(x²) / Q(x²)  for |x| < 4, beyond which it is 1

The coefficients of exp and erf are minimax fits with a relative error of at most 2.5e-8 before rounding, as small as that of the parts of
the series of log and of the fraction of tanh that are left out; those of `gelu_rounded` are less accurate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from .bfloat16 import bfloat16
from .compile import ROUTINE

# No `reassoc`: the argument reduction of exp must be computed as written. Only inlined functions vectorise.
OPTIONS: dict[str, Any] = ROUTINE | {"fastmath": {"contract"}, "forceinline": True}


def _singles(*values: float) -> tuple[np.float32, ...]:
    return tuple(map(np.float32, values))


EXP = _singles(0.5, 0.166665181517601, 0.04166620597243309, 0.008368908427655697, 0.001395052415318787)
ERF_P = _singles(
    1.1283791392988618, 0.19354624670621629, 0.05310190716132531, 0.003883396154014352, 0.0002845673171154257, 1.986776502103817e-06
)
ERF_Q = _singles(1, 0.5048584504844547, 0.11535049398840805, 0.015207355234141079, 0.0011855842485647425, 3.74201881838537e-05)
CDF = _singles(
    0.398856342,
    -0.0661687031,
    0.00967223011,
    -0.00105834892,
    8.4235915e-05,
    -4.67733707e-06,
    1.69729972e-07,
    -3.5862997e-09,
    3.32693838e-11,
)
CDF_END = np.float32(4.5)
ZERO, ONE, HALF, ROOT_HALF = _singles(0, 1, 0.5, math.sqrt(0.5))
EXP_LOWEST, EXP_HIGHEST = _singles(-104, 89)  # beyond these the result is 0, and infinity
LOG2_E, LN2_HIGH, LN2_LOW = _singles(1 / math.log(2), 0.693359375, math.log(2) - 0.693359375)  # n·LN2_HIGH is exact: 10 bits
ROUNDER = np.float32(1.5 * 2**23)  # the low bits of x + ROUNDER contain round(x)
ERF_END = np.float32(4)
LOG = _singles(2 / 3, 2 / 5, 2 / 7, 2 / 9)
LN2_TOP, LN2_REST = _singles(0.693145751953125, math.log(2) - 0.693145751953125)  # n·LN2_TOP is exact: 16 bits, and 8 of an exponent
SMALLEST_NORMAL, TO_NORMAL, TO_NORMAL_BITS, INFINITY = _singles(2.0**-126, 2.0**23, 23, math.inf)
TANH_P, TANH_Q = _singles(945, 105, 1), _singles(945, 420, 15)  # the fraction, multiplied out
TANH_NEAR_0 = np.float32(0.625)
GELU_END, GELU_TANH_END = 40.0, 9.0  # beyond these the derivative is 0 or 1; below them nothing overflows


@intrinsic
def _scaled(typing_context, x, rounded):
    """x·2ⁿ, where `rounded` is n + ROUNDER, in two factors, so that neither overflows and denormal results are rounded once."""

    def generate(context, builder, signature, values):
        i32, f32 = ir.IntType(32), ir.FloatType()
        n = builder.sub(builder.bitcast(values[1], i32), ir.Constant(i32, int(ROUNDER.view(np.int32))))
        half = builder.ashr(n, ir.Constant(i32, 1))
        result = values[0]
        for power in half, builder.sub(n, half):
            bits = builder.shl(builder.add(power, ir.Constant(i32, 127)), ir.Constant(i32, 23))
            result = builder.fmul(result, builder.bitcast(bits, f32))
        return result

    return types.float32(types.float32, types.float32), generate


@njit(**OPTIONS)
def clip(x, lowest, highest):
    """x, but at least `lowest` and at most `highest`."""
    return max(min(x, highest), lowest)  # x is the first argument so that NaN propagates


@njit(**OPTIONS)
def _polynomial(x, coefficients):
    value = coefficients[-1]
    for i in range(len(coefficients) - 2, -1, -1):
        value = value * x + coefficients[i]
    return value


def _single(single: Callable) -> Callable:
    """Decorator: inside kernels, calls with float32 arguments use `single`, and calls with float64 arguments the function itself."""

    def decorate(function: Callable) -> Callable:
        def choose(*arguments):
            return single if arguments[0] in (types.float32, bfloat16) else function

        overload(function, jit_options=OPTIONS, strict=False)(choose)
        return function

    return decorate


def _exp(x):
    x = clip(x, EXP_LOWEST, EXP_HIGHEST)
    rounded = x * LOG2_E + ROUNDER
    n = rounded - ROUNDER
    r = x - n * LN2_HIGH - n * LN2_LOW
    return _scaled(ONE + (r + r * r * _polynomial(r, EXP)), rounded)


@_single(_exp)
def exp(x):
    """e to the x."""
    return math.exp(x)


@intrinsic
def _split(typing_context, x):
    """(m, n): x = m·2ⁿ with √½ <= m < √2, for a positive normal x."""

    def generate(context, builder, signature, values):
        i32, f32 = ir.IntType(32), ir.FloatType()
        bits = builder.bitcast(values[0], i32)
        above = builder.sub(bits, ir.Constant(i32, int(ROOT_HALF.view(np.int32))))
        n = builder.ashr(above, ir.Constant(i32, 23))
        m = builder.bitcast(builder.sub(bits, builder.shl(n, ir.Constant(i32, 23))), f32)
        return context.make_tuple(builder, signature.return_type, (m, builder.sitofp(n, f32)))

    return types.UniTuple(types.float32, 2)(types.float32), generate


def _log(x):
    denormal = x < SMALLEST_NORMAL
    m, n = _split(x * TO_NORMAL if denormal else x * ONE)
    n = n - TO_NORMAL_BITS if denormal else n
    s = (m - ONE) / (m + ONE)
    square = s * s
    value = n * LN2_TOP + (n * LN2_REST + (s + s + s * square * _polynomial(square, LOG)))
    value = value if x > ZERO else -INFINITY if x == ZERO else INFINITY - INFINITY
    return value if x < INFINITY else x * ONE


@_single(_log)
def log(x):
    """The natural logarithm: -∞ of 0, NaN below."""
    return math.log(x)


def _tanh(x):
    square, distance = x * x, abs(x * ONE)
    near = x * _polynomial(square, TANH_P) / _polynomial(square, TANH_Q)
    far = ONE - (ONE + ONE) / (exp(distance + distance) + ONE)
    return near if distance < TANH_NEAR_0 else far if x > ZERO else -far


@_single(_tanh)
def tanh(x):
    """The hyperbolic tangent."""
    return math.tanh(x)


@njit(**OPTIONS)
def power(x, y):
    """x to the y, as the C library's; the powers that are no call of it are exact, and a loop with one such y vectorises."""
    x, y = x * type(x)(1), y * type(y)(1)
    return x if y == 1 else x * x if y == 2 else x**y


@njit(**OPTIONS)
def logistic(x):
    """1 / (1 + exp(-x))."""
    one = type(x)(1)
    return one / (one + exp(-x))


def _erf(x):
    x = clip(x, -ERF_END, ERF_END)
    square = x * x
    return clip(x * _polynomial(square, ERF_P) / _polynomial(square, ERF_Q), -ONE, ONE)


@_single(_erf)
def erf(x):
    """The error function."""
    return math.erf(x)


def _normal_cdf(x):
    return HALF + HALF * erf(x * ROOT_HALF)


@_single(_normal_cdf)
def normal_cdf(x):
    """Φ(x), the cumulative distribution function of the standard normal distribution."""
    return 0.5 * math.erfc(-x * math.sqrt(0.5))


@njit(**OPTIONS)
def gelu_erf(x):
    """(GELU(x), its derivative): x·Φ(x) and Φ(x) + x·Φ'(x)."""
    number = type(x)
    z = clip(x, number(-GELU_END), number(GELU_END))
    cdf = normal_cdf(x)
    return x * cdf, cdf + z * exp(number(-0.5) * z * z) * number(1 / math.sqrt(2 * math.pi))


@njit(**OPTIONS)
def gelu_rounded(x):
    """GELU(x) for results rounded to bfloat16: absolute error at most 6e-5, relative error 2e-5 beyond x = 3; 0 below -CDF_END.

    Φ(x) = 1/2 + x·P(x²), without a division. P is slightly too large at CDF_END, so that rounding cannot make Φ positive at -CDF_END, an
    error that the factor x would amplify.
    """
    z = clip(x, -CDF_END, CDF_END)
    return x * max(HALF + z * _polynomial(z * z, CDF), ZERO)


@njit(**OPTIONS)
def gelu_tanh(x):
    """As `gelu_erf`, with Φ(x) ≈ (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), u = √(2/π)·(x + 0.044715 x³)."""
    number = type(x)
    one, linear, cubic = number(1), number(2 * math.sqrt(2 / math.pi)), number(2 * math.sqrt(2 / math.pi) * 0.044715)
    z = clip(x, number(-GELU_TANH_END), number(GELU_TANH_END))
    power = exp(-z * (linear + cubic * z * z))
    cdf = one / (one + power)
    return x * cdf, cdf + z * power * cdf * cdf * (linear + number(3) * cubic * z * z)


@njit(**ROUTINE | {"fastmath": {"contract", "reassoc", "nsz", "nnan"}})
def highest(x, start, stop):
    """The maximum of x[start:stop]. With nnan it vectorises, but may skip a NaN, which the caller's sum then propagates."""
    value = x[np.uint64(start)]
    for i in range(start, stop):
        value = max(value, x[np.uint64(i)])
    return value
