// Features without a C++ syntax: bfloat16, tensor-core products, dynamic shared memory. Compute capability 8.0 and later.
#pragma once

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

struct alignas(2) bf16 {                                                // 16 bits in memory; arithmetic is in float
    unsigned short bits;
    bf16() = default;
    __device__ __forceinline__ bf16(float value) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value)); }
    __device__ __forceinline__ operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};

// Two adjacent elements in one register, the first in the lower half, as tensor cores expect them.
__device__ __forceinline__ unsigned pack(float first, float second) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

// d (16, 8) += a (16, 16) * b (16, 8), by a whole warp. With group = lane / 4 and t = lane % 4, a lane holds
//   a[0]: row group,     columns 2t, 2t + 1     a[1]: row group + 8, the same     a[2], a[3]: the same rows, columns 2t + 8, 2t + 9
//   b[0]: column group,  rows 2t, 2t + 1        b[1]: rows 2t + 8, 2t + 9
//   d[0], d[1]: row group, columns 2t, 2t + 1   d[2], d[3]: row group + 8
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four 8x8 matrices of 16-bit elements from shared memory, by a whole warp: lane i passes the address of row i % 8 of matrix i / 8
// (16 bytes, aligned) and receives elements 2t, 2t + 1 of row `group` of each matrix, or of its transpose.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
    const unsigned at = unsigned(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&to)[4], const void* row) {
    const unsigned at = unsigned(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}

// Asynchronous copy of 16 aligned bytes to shared memory, or of zeros if the source does not exist; it occupies no registers. What a thread
// has asked for since its last commit_copies() is a group; wait_for_copies<LATER>() waits for all its groups but the last LATER.
__device__ __forceinline__ void copy_later(void* to, const void* from, bool exists) {
    const unsigned at = unsigned(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(at), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int LATER> __device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" : : "n"(LATER) : "memory"); }
