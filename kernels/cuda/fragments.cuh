// Matrix products of 16 rows per warp, with operands in shared memory.
//
// A warp holds its part of a product in the accumulator layout of tensor cores, for all types: with group = lane / 4 and t = lane % 4,
// part[j][i] is row group + 8·(i / 2), column 8j + 2t + i % 2. bf16 is multiplied by tensor cores, float and double by fused multiply-adds
// in full precision. D is the length of rows in shared memory, a multiple of 16; elements beyond `size` are 0.
#pragma once
#include <common.cuh>

template <class T, int D> constexpr int LINE = D + WIDTH<T>;            // stride of rows in shared memory, without bank conflicts

template <class S> __device__ __forceinline__ S quad_sum(S value) {     // over the four lanes that share a row, in each of them
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
}
template <class S> __device__ __forceinline__ S quad_max(S value) {
    value = larger(value, __shfl_xor_sync(0xffffffffu, value, 1));
    return larger(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

template <class S, int J> __device__ __forceinline__ void clear(S (&part)[J][4]) {
#pragma unroll
    for (int j = 0; j < J; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) part[j][i] = 0;
}

struct Spot {                                                           // position of an element of a part: part[j][i], half = i / 2
    int j, i, half, row, column;
};
template <class S, int J, class F> __device__ __forceinline__ void each(S (&part)[J][4], F f) {    // f(element, spot)
    const int group = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < J; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) f(part[j][i], Spot{j, i, i / 2, group + 8 * (i / 2), 8 * j + 2 * t + i % 2});
}

// to (count, LINE) = rows `first` to first + count of `from`, with `stride` elements between rows; zeros beyond N, or everywhere if from is
// null. The data is available after arrived().
template <class T, int D>
__device__ __forceinline__ void read_rows(T* to, const T* from, long stride, int first, int count, int N, int size) {
    constexpr int W = WIDTH<T>;
    if (size % W == 0 && reinterpret_cast<u64>(from) % 16 == 0) {
#pragma unroll 1
        for (int i = threadIdx.x; i < count * (D / W); i += blockDim.x) {
            const int row = i / (D / W), at = i % (D / W) * W;
            const bool exists = from && first + row < N && at < size;
            copy_later(to + row * LINE<T, D> + at, exists ? from + (first + row) * stride + at : from, exists);
        }
        return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < count * D; i += blockDim.x) {
        const int row = i / D, at = i % D;
        to[row * LINE<T, D> + at] = from && first + row < N && at < size ? from[(first + row) * stride + at] : T(0);
    }
}
__device__ __forceinline__ void arrived() {
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
}

// Tiles of C rows of two matrices with N rows, one pair after the other, from the first again after the last. While a block works on one
// pair, the next one is copied: `memory` holds two pairs. If N is at most C it holds one, which stays.
template <class T, int D, int C> struct Tiles {
    T* memory;
    const T *one, *other;
    long one_stride, other_stride;
    int N, size, count = (N + C - 1) / C;

    __device__ __forceinline__ T* pair(int turn) const { return count > 1 ? memory + turn % 2 * (2 * C * LINE<T, D>) : memory; }
    __device__ __forceinline__ void request(int turn) const {
        const int start = turn % count * C;
        read_rows<T, D>(pair(turn), one, one_stride, start, C, N, size);
        read_rows<T, D>(pair(turn) + C * LINE<T, D>, other, other_stride, start, C, N, size);
        commit_copies();
    }
    // The pair of a turn, which is that of `request(0)` or the one after the last; by all threads of the block.
    __device__ __forceinline__ const T* take(int turn, int turns) const {
        __syncthreads();                                                // nobody reads the pair before it any more
        if (count > 1 && turn + 1 < turns) {
            request(turn + 1);
            wait_for_copies<1>();
        } else wait_for_copies<0>();
        __syncthreads();
        return pair(turn);
    }
};

// Writes the rows of a warp: to (16, size), with row stride `stride`, = factor·part, via 16 rows of shared memory private to the warp.
template <class T, int D>
__device__ __forceinline__ void write_rows(T* to, long stride, Sum<T> (&part)[D / 8][4], Sum<T> upper, Sum<T> lower, T* shared, int rows,
                                           int size) {
    constexpr int W = WIDTH<T>;
    __syncwarp();
    each(part, [&](Sum<T>& e, Spot s) { shared[s.row * LINE<T, D> + s.column] = T(e * (s.half ? lower : upper)); });
    __syncwarp();
    const bool wide = size % W == 0 && reinterpret_cast<u64>(to) % 16 == 0;
    for (int i = threadIdx.x % 32; i < rows * (D / W); i += 32) {
        const int row = i / (D / W), at = i % (D / W) * W;
        const auto some = load<T, W>(shared + row * LINE<T, D> + at);
        if (wide && at < size) store<T, W>(to + row * stride + at, some);
        else {
#pragma unroll
            for (int k = 0; k < W; k++)
                if (at + k < size) to[row * stride + at + k] = some.e[k];
        }
    }
}

// part (16, C) = a (16, D) · bᵀ, b (C, D), of which only the first `columns` rows are used.
template <class T, int D, int C> struct RowsByRows {
    static __device__ __forceinline__ void multiply(Sum<T> (&part)[C / 8][4], const T* a, const T* b, int columns) {
        constexpr int W = WIDTH<T>;
        const int group = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        clear(part);
#pragma unroll 1
        for (int k = 0; k < D; k += W) {
            const auto upper = load<T, W>(a + group * LINE<T, D> + k), lower = load<T, W>(a + (group + 8) * LINE<T, D> + k);
#pragma unroll
            for (int j = 0; j < C / 8; j++)
                if (j / 2 * 16 < columns)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const auto other = load<T, W>(b + (8 * j + 2 * t + i) * LINE<T, D> + k);
#pragma unroll
                        for (int w = 0; w < W; w++) {
                            part[j][i] += upper.e[w] * other.e[w];
                            part[j][2 + i] += lower.e[w] * other.e[w];
                        }
                    }
        }
    }
};
template <int D, int C> struct RowsByRows<bf16, D, C> {
    static __device__ __forceinline__ void multiply(float (&part)[C / 8][4], const bf16* a, const bf16* b, int columns) {
        const int lane = threadIdx.x % 32;
        clear(part);
#pragma unroll 1
        for (int k = 0; k < D; k += 16) {
            unsigned left[4], right[4];
            load_matrices(left, a + lane % 16 * LINE<bf16, D> + k + lane / 16 * 8);
#pragma unroll
            for (int c = 0; c < C; c += 16)
                if (c < columns) {
                    load_matrices(right, b + (c + lane % 8 + lane / 16 * 8) * LINE<bf16, D> + k + lane / 8 % 2 * 8);
                    multiply_add(part[c / 8], left, {right[0], right[1]});
                    multiply_add(part[c / 8 + 1], left, {right[2], right[3]});
                }
        }
    }
};

// part (16, D) += square (16, C) · b (C, D), of which only the first `columns` rows are used.
template <class T, int D, int C> struct SquareByRows {
    static __device__ __forceinline__ void add(Sum<T> (&part)[D / 8][4], const Sum<T> (&square)[C / 8][4], const T* b, int columns) {
        const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
        for (int k = 0; k < C; k++)
            if (k / 16 * 16 < columns) {
                const Sum<T> upper = __shfl_sync(0xffffffffu, square[k / 8][k % 2], lane / 4 * 4 + k % 8 / 2);
                const Sum<T> lower = __shfl_sync(0xffffffffu, square[k / 8][2 + k % 2], lane / 4 * 4 + k % 8 / 2);
#pragma unroll
                for (int j = 0; j < D / 8; j++) {
                    const auto other = load<T, 2>(b + k * LINE<T, D> + 8 * j + 2 * t);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        part[j][i] += upper * other.e[i];
                        part[j][2 + i] += lower * other.e[i];
                    }
                }
            }
    }
};
template <int D, int C> struct SquareByRows<bf16, D, C> {
    static __device__ __forceinline__ void add(float (&part)[D / 8][4], const float (&square)[C / 8][4], const bf16* b, int columns) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < C; k += 16)
            if (k < columns) {
                const auto &one = square[k / 8], &two = square[k / 8 + 1];
                const unsigned left[4] = {pack(one[0], one[1]), pack(one[2], one[3]), pack(two[0], two[1]), pack(two[2], two[3])};
#pragma unroll
                for (int c = 0; c < D; c += 16) {
                    unsigned right[4];
                    load_matrices_transposed(right, b + (k + lane % 16) * LINE<bf16, D> + c + lane / 16 * 8);
                    multiply_add(part[c / 8], left, {right[0], right[1]});
                    multiply_add(part[c / 8 + 1], left, {right[2], right[3]});
                }
            }
    }
};

// part (16, D) = s · b (columns, D), where s is 16 rows of a bf16 matrix in shared memory, or 16 columns if TRANSPOSED. The row stride of
// the matrix is `line`; `square` points to the first element of s.
template <int D, bool TRANSPOSED>
__device__ __forceinline__ void multiply_stored(float (&part)[D / 8][4], const bf16* square, int line, const bf16* b, int columns) {
    const int lane = threadIdx.x % 32;
    clear(part);
#pragma unroll 1
    for (int k = 0; k < columns; k += 16) {
        unsigned left[4], right[4];
        if (TRANSPOSED) load_matrices_transposed(left, square + (k + lane % 8 + lane / 16 * 8) * line + lane / 8 % 2 * 8);
        else load_matrices(left, square + lane % 16 * line + k + lane / 16 * 8);
#pragma unroll
        for (int c = 0; c < D; c += 16) {
            load_matrices_transposed(right, b + (k + lane % 16) * LINE<bf16, D> + c + lane / 16 * 8);
            multiply_add(part[c / 8], left, {right[0], right[1]});
            multiply_add(part[c / 8 + 1], left, {right[2], right[3]});
        }
    }
}
