// In place of kernels/cuda/ptx.cuh where a CPU runs the kernels: the same functions, in C++.
#pragma once
#include "emulation.hpp"

#define DYNAMIC_SHARED(name) unsigned char* name = emulation::shared_memory()

struct alignas(2) bf16 {
    unsigned short bits;
    bf16() = default;
    bf16(float value) {                                                 // to nearest, ties to even
        unsigned word;
        memcpy(&word, &value, 4);
        bits = value != value ? 0x7fff : (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    }
    operator float() const {
        const unsigned word = unsigned(bits) << 16;
        float value;
        memcpy(&value, &word, 4);
        return value;
    }
};

inline unsigned pack(float first, float second) { return bf16(first).bits | unsigned(bf16(second).bits) << 16; }

namespace emulation {
inline float half_of(unsigned pair, int which) {
    bf16 value;
    value.bits = pair >> (16 * which);
    return value;
}

struct Fragments {
    unsigned a[4], b[2];
};
}

inline void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulation::Fragments mine, other;
    memcpy(mine.a, a, sizeof a);
    memcpy(mine.b, b, sizeof b);
    emulation::publish(&mine, sizeof mine);
    const int lane = emulation::lane(), group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        const int row = group % 8, column = 2 * t + i % 2, lower = i / 2;               // rows 8 to 15 are in a[1], a[3]
        for (int k = 0; k < 16; k++) {
            emulation::collect(&other, sizeof other, row * 4 + k % 8 / 2);
            const float x = emulation::half_of(other.a[k / 8 * 2 + lower], k % 2);
            emulation::collect(&other, sizeof other, column * 4 + k % 8 / 2);
            d[i] += x * emulation::half_of(other.b[k / 8], k % 2);
        }
    }
}

namespace emulation {
inline void load_matrices(unsigned (&to)[4], const void* row, bool transposed) {
    if (reinterpret_cast<size_t>(row) % 16) fail("ldmatrix: a row is not aligned to 16 bytes");
    publish(&row, sizeof row);
    const int group = lane() / 4, t = lane() % 4;
    for (int matrix = 0; matrix < 4; matrix++) {
        unsigned short pair[2];
        for (int i = 0; i < 2; i++) {
            const unsigned short* from;
            collect(&from, sizeof from, 8 * matrix + (transposed ? 2 * t + i : group));
            pair[i] = from[transposed ? group : 2 * t + i];
        }
        to[matrix] = pair[0] | unsigned(pair[1]) << 16;
    }
    warp_barrier();                                                     // it has read before any lane goes on to write
}
}

inline void load_matrices(unsigned (&to)[4], const void* row) { emulation::load_matrices(to, row, false); }
inline void load_matrices_transposed(unsigned (&to)[4], const void* row) { emulation::load_matrices(to, row, true); }

inline void copy_later(void* to, const void* from, bool exists) {
    if (reinterpret_cast<size_t>(to) % 16 || exists && reinterpret_cast<size_t>(from) % 16) emulation::fail("cp.async: not aligned to 16 bytes");
    emulation::emulated_copy(to, exists ? from : nullptr);
}
inline void commit_copies() { emulation::emulated_commit(); }
template <int LATER> inline void wait_for_copies() { emulation::emulated_wait(LATER); }
