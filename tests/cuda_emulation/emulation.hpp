// Enough of CUDA C++ to run a kernel on a CPU. A block's threads are fibers on one thread of the CPU; which of them goes first after a
// barrier is drawn anew from a seed, so that a race shows as results that differ with it. `scheduler.cpp` switches between them.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) alignas(n)
#define __shared__ static
#define __constant__ static const

struct dim3 {
    unsigned x, y, z;
};

namespace emulation {
struct Thread {                                                         // what a running thread sees
    dim3 thread, block_index, block_size, grid_size;
    unsigned char* shared;
    unsigned char (*slots)[2][64];                                      // of its warp, two a lane, which take turns: while some
    unsigned turn;                                                      // lanes still read the one, others write the other
};
extern "C" Thread* emulated_thread;                                     // the running one
extern "C" void emulated_block_barrier();
extern "C" void emulated_warp_barrier();
extern "C" void emulated_copy(void* to, const void* from);
extern "C" void emulated_commit();
extern "C" void emulated_wait(unsigned later);
extern "C" void emulated_fail(const char* reason);
extern "C" int emulated_run(void (*body)(void*), void* argument, unsigned blocks, unsigned threads, unsigned shared, unsigned seed);

inline unsigned char* shared_memory() { return emulated_thread->shared; }
inline int lane() { return emulated_thread->thread.x % 32; }
inline void warp_barrier() { emulated_warp_barrier(); }
inline void fail(const char* reason) { emulated_fail(reason); }

inline void publish(const void* value, size_t bytes) {                  // for the other lanes of the warp to collect
    Thread& thread = *emulated_thread;
    memcpy(thread.slots[lane()][thread.turn ^= 1], value, bytes);
    warp_barrier();
}
inline void collect(void* value, size_t bytes, int from) {
    const Thread& thread = *emulated_thread;
    memcpy(value, thread.slots[from & 31][thread.turn], bytes);
}

template <class T> T exchange(T value, int from) {
    static_assert(sizeof(T) <= 64, "too large to exchange");
    T result;
    publish(&value, sizeof value);
    collect(&result, sizeof result, from);
    return result;
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

template <class... A> struct Body {
    void (*kernel)(A...);
    void** arguments;
    static void run(void* self) {
        const Body& body = *static_cast<Body*>(self);
        call(body.kernel, body.arguments, std::index_sequence_for<A...>{});
    }
};

template <class... A> int launch(void (*kernel)(A...), void** arguments, int number, unsigned blocks, unsigned threads, unsigned shared,
                                 unsigned seed) {
    if (number != int(sizeof...(A))) return -int(sizeof...(A)) - 1;     // it takes so many
    Body<A...> body{kernel, arguments};
    return emulated_run(Body<A...>::run, &body, blocks, threads, shared, seed);
}
}

#define threadIdx (emulation::emulated_thread->thread)
#define blockIdx (emulation::emulated_thread->block_index)
#define blockDim (emulation::emulated_thread->block_size)
#define gridDim (emulation::emulated_thread->grid_size)

inline void __syncthreads() { emulation::emulated_block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { emulation::emulated_warp_barrier(); }
template <class T> T __shfl_sync(unsigned, T value, int from) { return emulation::exchange(value, from); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return emulation::exchange(value, emulation::lane() ^ mask); }
template <class T> T __shfl_down_sync(unsigned, T value, unsigned by) {
    const int from = emulation::lane() + int(by);
    return emulation::exchange(value, from < 32 ? from : emulation::lane());
}
inline unsigned __ballot_sync(unsigned, int vote) {
    unsigned char one = vote != 0, other;
    unsigned ballot = 0;
    emulation::publish(&one, 1);
    for (int i = 0; i < 32; i++) {
        emulation::collect(&other, 1, i);
        ballot |= unsigned(other) << i;
    }
    return ballot;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }

// Of <cmath>, which takes longer to read than most kernels to compile, what they may call.
#define FUNCTION(name) \
    inline float name##f(float x) { return __builtin_##name##f(x); } \
    inline float name(float x) { return __builtin_##name##f(x); } \
    inline double name(double x) { return __builtin_##name(x); }
FUNCTION(exp) FUNCTION(exp2) FUNCTION(expm1) FUNCTION(log) FUNCTION(log2) FUNCTION(log1p) FUNCTION(sqrt) FUNCTION(tanh) FUNCTION(erf)
FUNCTION(erfc) FUNCTION(sin) FUNCTION(cos) FUNCTION(floor) FUNCTION(ceil) FUNCTION(fabs)
#undef FUNCTION
inline float powf(float x, float y) { return __builtin_powf(x, y); }
inline float pow(float x, float y) { return __builtin_powf(x, y); }
inline double pow(double x, double y) { return __builtin_pow(x, y); }
inline float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
inline double nan(const char*) { return __builtin_nan(""); }
template <class T> bool isnan(T x) { return x != x; }
inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline float rsqrtf(float x) { return 1.0f / sqrt(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return 1.0f / sqrt(x); }
inline float __expf(float x) { return exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
