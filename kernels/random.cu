// Philox4x32-10, and the kernels that use it: random.py defines the counters. The words are the same as on the CPU.
#include <common.cuh>

struct Words {
    u32 w[4];
};

__device__ __forceinline__ Words philox(u32 block, u32 use, u64 step, u64 seed) {
    u32 a = block, b = use, c = u32(step), d = u32(step >> 32), k0 = u32(seed), k1 = u32(seed >> 32);
#pragma unroll
    for (int i = 0; i < 10; i++) {
        const u64 even = u64(0xD2511F53u) * a, odd = u64(0xCD9E8D57u) * c;
        a = u32(odd >> 32) ^ b ^ k0;
        b = u32(odd);
        c = u32(even >> 32) ^ d ^ k1;
        d = u32(even);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{a, b, c, d}};
}

// A thread processes the four elements of one block of words, as one vector if W is 4.
template <class T, int W>
__global__ void __launch_bounds__(256) dropout(T* y, const T* x, const u64* state, long size, u32 use, u64 threshold, double scale) {
    GRID_STRIDE(block, (size + 3) / 4) {
        const Words words = philox(u32(block), use, state[1], state[0]);
#pragma unroll
        for (int v = 0; v < 4 / W; v++) {
            const long at = block * 4 + v * W;
            if (at >= size) break;
            auto some = load<T, W>(x + at);
#pragma unroll
            for (int k = 0; k < W; k++) some.e[k] = words.w[v * W + k] < threshold ? T(Sum<T>(some.e[k]) * Sum<T>(scale)) : T(0);
            store<T, W>(y + at, some);
        }
    }
}

// x, y (B, size): `parts` blocks per sample; a sample is kept or dropped as a whole.
template <class T, int W>
__global__ void __launch_bounds__(256) drop_path(T* y, const T* x, const u64* state, int parts, long size, u32 use, u64 threshold,
                                                 double scale) {
    const u32 sample = blockIdx.x / parts;
    const bool kept = philox(sample / 4, use, state[1], state[0]).w[sample % 4] < threshold;
    y += sample * size;
    x += sample * size;
    for (long i = blockIdx.x % parts * 256 + threadIdx.x; i < size / W; i += parts * 256) {
        auto some = load<T, W>(x + i * W);
#pragma unroll
        for (int k = 0; k < W; k++) some.e[k] = kept ? T(Sum<T>(some.e[k]) * Sum<T>(scale)) : T(0);
        store<T, W>(y + i * W, some);
    }
}

__global__ void advance(u64* state) { state[1] += 1; }
