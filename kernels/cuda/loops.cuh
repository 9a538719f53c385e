// Nested loops over arrays with different strides, as made by core/strides.py: three outer loops and an inner one, whose elements are
// processed W at a time.
#pragma once
#include <common.cuh>

#define LOOP_SIZES u32 n1, u32 n2, u32 n3, u32 vectors                 // n3: size of the inner loop in vectors
#define STEPS(array) long array##0, long array##1, long array##2, long array##3

struct Place {                                                          // one iteration; i3: index of the vector's first element
    long i0, i1, i2, i3;
};

template <int W> __device__ __forceinline__ Place place(u32 vector, u32 n1, u32 n2, u32 n3) {
    const u32 row = vector / n3, outer = row / n2;
    return {long(outer / n1), long(outer % n1), long(row % n2), long(vector % n3) * W};
}

#define AT(at, array) (at.i0 * array##0 + at.i1 * array##1 + at.i2 * array##2 + at.i3 * array##3)

// W adjacent elements, or one element W times.
template <class T, int W, bool REPEATS> __device__ __forceinline__ Vector<T, W> load_or_repeat(const T* from) {
    if constexpr (!REPEATS) return load<T, W>(from);
    Vector<T, W> all;
#pragma unroll
    for (int k = 0; k < W; k++) all.e[k] = *from;
    return all;
}
