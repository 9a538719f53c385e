// The activations that batch normalisation and convolutions apply; cpu/activations.py has their formulas and their arguments.
#pragma once
#include <common.cuh>

// f(z): hardswish if `curved`, otherwise z clipped to low ... high.
template <class S> __device__ __forceinline__ S activated(S z, S low, S high, bool curved) {
    if (curved) return z * (z <= S(-3) ? S(0) : z >= S(3) ? S(6) : z + S(3)) * S(1.0 / 6);
    return z < low ? low : z > high ? high : z;
}

// f'(z).
template <class S> __device__ __forceinline__ S slope(S z, S low, S high, bool curved) {
    if (curved) return z <= S(-3) ? S(0) : z >= S(3) ? S(1) : z * S(1.0 / 3) + S(0.5);
    return low < z && z < high ? S(1) : S(0);
}
