// GELU and its derivative; the formulas are in gelu.py. Also used by the epilogues of matrix products.
//
// In float, Φ(-a) = exp(-a²/2)·t·P(1 - 2t), t = 3.75 / (a + 3.75), where P is a minimax fit for 0 <= a <= 14.5 with error 1.5e-8: the
// relative error stays near 5e-7 in the negative tail, Φ' uses the same exponential, and there are no branches. In double, erfc is used.
#pragma once
#include <common.cuh>

template <class S> struct Normal {
    S cdf, rest;                                                        // Φ(x), x·Φ'(x), or their tanh approximations
};

// x clamped to [-limit, limit]; NaN stays NaN.
template <class S> __device__ __forceinline__ S bounded(S x, S limit) { return x > limit ? limit : x < -limit ? -limit : x; }

__device__ __forceinline__ float fast_ratio(float a, float b) { return __fdividef(a, b); }              // error up to 2 ulp; b < 2^126
__device__ __forceinline__ double fast_ratio(double a, double b) { return a / b; }

__device__ __forceinline__ Normal<float> normal_erf(float x) {
    const float z = bounded(x, 40.0f), a = fabsf(z), square = z * z, low = fmaf(z, z, -square);          // z² = square + low
    const float bell = expf(-0.5f * square) * fmaf(-0.5f, low, 1.0f), t = fast_ratio(3.75f, a + 3.75f), u = fmaf(-2.0f, t, 1.0f);
    float p = 0.00011825323f;
    p = fmaf(p, u, 0.00013590089f);
    p = fmaf(p, u, -0.0011117382f);
    p = fmaf(p, u, 0.0003200196f);
    p = fmaf(p, u, 0.009998002f);
    p = fmaf(p, u, -0.040405557f);
    p = fmaf(p, u, 0.094117224f);
    p = fmaf(p, u, -0.1568502f);
    p = fmaf(p, u, 0.20007841f);
    const float tail = bell * (t * p);                                  // Φ(-a)
    return {x > 0 ? 1 - tail : tail, z * bell * 0.3989422804f};
}
__device__ __forceinline__ Normal<double> normal_erf(double x) {
    const double z = bounded(x, 40.0);
    return {0.5 * erfc(-0.7071067811865476 * x), z * exp(-0.5 * z * z) * 0.3989422804014327};
}

// (1 + tanh(v)) / 2 = 1 / (1 + exp(-2v)), 2v = z·(linear + cubic·z²)
template <class S> __device__ __forceinline__ Normal<S> normal_tanh(S x) {
    const S linear = S(1.5957691216057308), cubic = S(0.07135481627260025);
    const S z = bounded(x, S(9.9)), square = z * z, power = exp(-z * (linear + cubic * square)), cdf = fast_ratio(S(1), 1 + power);
    return {cdf, z * power * cdf * cdf * (linear + 3 * cubic * square)};
}

// Both terms for one x: gelu = x·cdf, gelu_slope = cdf + rest.
template <class S> __device__ __forceinline__ Normal<S> normal(S x, bool tanh_form) { return tanh_form ? normal_tanh(x) : normal_erf(x); }
template <class S> __device__ __forceinline__ S gelu(S x, bool tanh_form) { return x * normal(x, tanh_form).cdf; }
template <class S> __device__ __forceinline__ S gelu_slope(S x, bool tanh_form) {
    const Normal<S> n = normal(x, tanh_form);
    return n.cdf + n.rest;
}
