// Functions of one variable, element by element; they are listed in elementwise.py.
#include <common.cuh>

template <class S> __device__ __forceinline__ S clip(S x, S lowest, S highest) {       // NaN stays NaN
    return x < lowest ? lowest : x > highest ? highest : x;
}

// Kernels of a function: `value` is an expression of x, and `slope`, its derivative, one of `saved`, which is x or y.
#define FUNCTION(name, value, saved, slope)                                                                                                \
    template <class T, int W> __global__ void __launch_bounds__(256) name##_forward(T* to, const T* from, long size) {                     \
        typedef Sum<T> S;                                                                                                                  \
        map<W>(to, from, size, [](T e) { const S x = S(e); return T(value); });                                                            \
    }                                                                                                                                      \
    template <class T, int W> __global__ void __launch_bounds__(256) name##_backward(T* dx, const T* dy, const T* kept, long size) {       \
        typedef Sum<T> S;                                                                                                                  \
        GRID_STRIDE(i, size / W) {                                                                                                         \
            auto some = load<T, W>(dy + i * W);                                                                                            \
            const auto others = load<T, W>(kept + i * W);                                                                                  \
            for (int k = 0; k < W; k++) {                                                                                                  \
                const S saved = S(others.e[k]);                                                                                            \
                some.e[k] = T(S(some.e[k]) * S(slope));                                                                                    \
            }                                                                                                                              \
            store<T, W>(dx + i * W, some);                                                                                                 \
        }                                                                                                                                  \
    }

FUNCTION(exp, exp(x), y, y)
FUNCTION(log, log(x), x, 1 / x)
FUNCTION(sqrt, sqrt(x), y, S(0.5) / y)
FUNCTION(absolute, fabs(x), x, x > 0 ? 1 : x < 0 ? -1 : 0)
FUNCTION(tanh, tanh(x), y, 1 - y * y)
FUNCTION(sigmoid, 1 / (1 + exp(-x)), y, y * (1 - y))
FUNCTION(relu, x < 0 ? S(0) : x, y, y > 0)
FUNCTION(relu6, clip(x, S(0), S(6)), y, y > 0 && y < 6)
FUNCTION(hardsigmoid, clip(x + 3, S(0), S(6)) * S(1. / 6), x, x > -3 && x < 3 ? S(1. / 6) : S(0))
FUNCTION(hardswish, x * clip(x + 3, S(0), S(6)) * S(1. / 6), x, x <= -3 ? S(0) : x >= 3 ? S(1) : (x + x + 3) * S(1. / 6))
