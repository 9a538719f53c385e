// Multi-head attention: the formulas are in attention.py. A warp owns 16 rows of the (N, N) square of one head, and walks through its
// columns a tile at a time, as FlashAttention-2 does (Dao, 2307.08691): the square itself is only written where it is asked for.
//
// What a warp holds of a square or of a product, in every type, is laid out as a tensor core leaves it: with group = lane / 4 and
// t = lane % 4, part[j][i] is row group + 8·(i / 2), column 8j + 2t + i % 2. bf16 is multiplied by tensor cores, float and double by
// fused multiply-adds, in full precision. D is the head size in shared memory, a multiple of 16; what is beyond `size` is 0.
#include <common.cuh>

#ifndef INFINITY                                                        // NVRTC has none
#define INFINITY __int_as_float(0x7f800000)
#endif

// Columns a tile. 80 hold an image of 8x8 patches and its class token at once.
template <class T, int D> constexpr int TILE = sizeof(T) == 2 ? (D > 64 ? 32 : 80) : D > 64 || sizeof(T) == 8 ? 16 : 32;
template <class T, int D> constexpr int LINE = D + WIDTH<T>;            // from one row to the next in shared memory: no bank conflicts

__device__ __forceinline__ float power(float x, bf16) { return __expf(x); }            // the last is only there for its type
__device__ __forceinline__ float power(float x, float) { return exp(x); }
__device__ __forceinline__ double power(double x, double) { return exp(x); }

template <class S> __device__ __forceinline__ S quad_sum(S value) {     // of the four lanes that share a row, in each
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

struct Spot {                                                           // where an element of a part is: part[j][i], half = i / 2
    int j, i, half, row, column;
};
template <class S, int J, class F> __device__ __forceinline__ void each(S (&part)[J][4], F f) {    // f(element, spot)
    const int group = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < J; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) f(part[j][i], Spot{j, i, i / 2, group + 8 * (i / 2), 8 * j + 2 * t + i % 2});
}

// Which rows of which head a block and a warp own.
struct Place {
    int b, h, first, own, row;                                          // first row of the block, of the warp in it, in all

    __device__ __forceinline__ Place(int N, int H) {
        const int rows = blockDim.x / 2, tiles = (N + rows - 1) / rows;
        const int head = blockIdx.x / tiles;
        b = head / H, h = head % H;
        first = blockIdx.x % tiles * rows;
        own = threadIdx.x / 32 * 16;
        row = first + own;
    }
};

// to (count, LINE) = rows `first` to first + count of `from`, whose rows are `stride` elements apart; zeros beyond N, and all without from.
// They are there after arrived().
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
    wait_for_copies();
    __syncthreads();
}

// Rows of a warp: to (16, size), with rows `stride` apart, = factor·part, by way of 16 rows of shared memory that nobody else uses.
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

// part (16, C) = a (16, D) · bᵀ, b (C, D), of which only the first `columns` rows count.
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

// part (16, D) += square (16, C) · b (C, D), of which only the first `columns` rows count.
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

// y (B, N, H, size), logits, probabilities (B, H, N, N) or null, lse (B, H, N), qkv (B, N, 3, H, size), bias (N, N) a head or null. The
// softmax is online: `highest` and `total` are of the columns so far. Probabilities take a second walk, when both are known.
template <class T, int D>
__global__ void __launch_bounds__(256, sizeof(T) == 4 && D < 96 ? 2 : 1)
attention_forward(T* y, T* logits, T* probabilities, Sum<T>* lse, const T* qkv, const T* bias, long bias_batch, long bias_head, int N, int H,
                  int size, double scale) {
    typedef Sum<T> S;
    constexpr int C = TILE<T, D>;
    DYNAMIC_SHARED(memory);
    T *q = reinterpret_cast<T*>(memory), *k = q + blockDim.x / 2 * LINE<T, D>, *v = k + C * LINE<T, D>;
    const Place place(N, H);
    const long stride = 3L * H * size, square = (long(place.b) * H + place.h) * N * N;
    const T* from = qkv + (long(place.b) * N * 3 * H + place.h) * size;
    const T* added = bias ? bias + place.b * bias_batch + place.h * bias_head : nullptr;
    read_rows<T, D>(q, from, stride, place.first, blockDim.x / 2, N, size);

    S part[C / 8][4], sums[D / 8][4], highest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    const auto compute_logits = [&](int start) {
        RowsByRows<T, D, C>::multiply(part, q + place.own * LINE<T, D>, k, N - start);
        each(part, [&](S& e, Spot s) {
            const int row = place.row + s.row, column = start + s.column;
            if (column >= N) e = -INFINITY;
            else {
                e *= S(scale);
                if (added && row < N) e += S(added[long(row) * N + column]);
            }
        });
    };
    clear(sums);
#pragma unroll 1
    for (int start = 0; start < N; start += C) {
        __syncthreads();
        read_rows<T, D>(k, from + long(H) * size, stride, start, C, N, size);
        read_rows<T, D>(v, from + 2L * H * size, stride, start, C, N, size);
        arrived();
        if (place.row >= N) continue;
        compute_logits(start);
        if (logits) each(part, [&](S& e, Spot s) {
            const int row = place.row + s.row, column = start + s.column;
            if (row < N && column < N) logits[square + long(row) * N + column] = T(e);
        });
        S top[2] = {highest[0], highest[1]}, shift[2], shrink[2];
        each(part, [&](S& e, Spot s) { top[s.half] = larger(top[s.half], e); });
#pragma unroll
        for (int half = 0; half < 2; half++) {
            top[half] = quad_max(top[half]);
            shift[half] = top[half] == S(-INFINITY) ? S(0) : top[half];                // all masked so far: no inf - inf
            shrink[half] = power(highest[half] - shift[half], T(0));
            highest[half] = top[half];
            total[half] *= shrink[half];
        }
        each(part, [&](S& e, Spot s) { total[s.half] += e = power(e - shift[s.half], T(0)); });
        each(sums, [&](S& e, Spot s) { e *= shrink[s.half]; });
        SquareByRows<T, D, C>::add(sums, part, v, N - start);
    }
    S inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        total[half] = quad_sum(total[half]);
        inverse[half] = S(1) / total[half];
        const int row = place.row + threadIdx.x % 32 / 4 + 8 * half;
        if (threadIdx.x % 4 == 0 && row < N) lse[(long(place.b) * H + place.h) * N + row] = highest[half] + log(total[half]);
    }
#pragma unroll 1
    for (int start = 0; probabilities && start < N; start += C) {
        if (N > C) {
            __syncthreads();
            read_rows<T, D>(k, from + long(H) * size, stride, start, C, N, size);
            arrived();
        }
        if (place.row >= N) continue;
        if (N > C) {
            compute_logits(start);
            each(part, [&](S& e, Spot s) { e = power(e - highest[s.half], T(0)); });
        }
        each(part, [&](S& e, Spot s) {
            const int row = place.row + s.row, column = start + s.column;
            if (row < N && column < N) probabilities[square + long(row) * N + column] = T(e * inverse[s.half]);
        });
    }
    if (place.row < N)
        write_rows<T, D>(y + ((long(place.b) * N + place.row) * H + place.h) * size, long(H) * size, sums, inverse[0], inverse[1],
                         q + place.own * LINE<T, D>, min(N - place.row, 16), size);
}

// What both backward kernels read beside their tiles; any but qkv and lse may be null.
template <class T> struct Given {
    const T *bias, *dlogits, *dprobabilities;
    const Sum<T>* lse;
    int N;
    Sum<T> scale;

    __device__ __forceinline__ Given(const Place& place, const T* bias, const T* dlogits, const T* dprobabilities, const Sum<T>* lse,
                                     long bias_batch, long bias_head, int N, int H, double scale)
        : N(N), scale(Sum<T>(scale)) {
        const long head = long(place.b) * H + place.h, square = head * N * N;
        this->bias = bias ? bias + place.b * bias_batch + place.h * bias_head : nullptr;
        this->dlogits = dlogits ? dlogits + square : nullptr;
        this->dprobabilities = dprobabilities ? dprobabilities + square : nullptr;
        this->lse = lse + head * N;
    }
    // From q·kᵀ and dy·vᵀ to p and dp; both 0 outside of the square.
    __device__ __forceinline__ void complete(Sum<T>& p, Sum<T>& dp, int query, int key, Sum<T> row_lse) const {
        if (query < N && key < N) {
            const long at = long(query) * N + key;
            p = power(p * scale + (bias ? Sum<T>(bias[at]) : Sum<T>(0)) - row_lse, T(0));
            if (dprobabilities) dp += Sum<T>(dprobabilities[at]);
        } else p = dp = 0;
    }
    __device__ __forceinline__ Sum<T> dl(Sum<T> p, Sum<T> dp, int query, int key, Sum<T> delta) const {
        const Sum<T> value = p * (dp - delta);
        return dlogits && query < N && key < N ? value + Sum<T>(dlogits[long(query) * N + key]) : value;
    }
};

// dq (in dqkv, or null), dl (B, H, N, N) or null, delta (B, H, N) = Σ p·dp over keys. A warp owns 16 queries. The first walk through the
// keys finds delta, the second the rest; where all keys fit into one tile, p and dp stay in registers between the two.
template <class T, int D>
__global__ void __launch_bounds__(256, 1)
attention_backward_queries(T* dqkv, T* dl, Sum<T>* delta, const T* dy, const T* dlogits, const T* dprobabilities, const T* qkv,
                           const T* bias, const Sum<T>* lse, long bias_batch, long bias_head, int N, int H, int size, double scale) {
    typedef Sum<T> S;
    constexpr int C = TILE<T, D>;
    DYNAMIC_SHARED(memory);
    const int rows = blockDim.x / 2;
    T *q = reinterpret_cast<T*>(memory), *g = q + rows * LINE<T, D>, *k = g + rows * LINE<T, D>, *v = k + C * LINE<T, D>;
    const Place place(N, H);
    const Given<T> given(place, bias, dlogits, dprobabilities, lse, bias_batch, bias_head, N, H, scale);
    const long stride = 3L * H * size, head = long(place.b) * H + place.h, begin = (long(place.b) * N * 3 * H + place.h) * size;
    const T* from = qkv + begin;
    read_rows<T, D>(q, from, stride, place.first, rows, N, size);
    read_rows<T, D>(g, dy ? dy + (long(place.b) * N * H + place.h) * size : nullptr, long(H) * size, place.first, rows, N, size);

    S p[C / 8][4], dp[C / 8][4], sums[D / 8][4], row_lse[2], row_delta[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = place.row + threadIdx.x % 32 / 4 + 8 * half;
        row_lse[half] = row < N ? given.lse[row] : S(0);
    }
    clear(sums);
#pragma unroll 1
    for (int walk = 0; walk < 2; walk++) {
#pragma unroll 1
        for (int start = 0; start < N; start += C) {
            if (walk == 0 || N > C) {
                __syncthreads();
                read_rows<T, D>(k, from + long(H) * size, stride, start, C, N, size);
                read_rows<T, D>(v, from + 2L * H * size, stride, start, C, N, size);
                arrived();
                if (place.row >= N) continue;
                RowsByRows<T, D, C>::multiply(p, q + place.own * LINE<T, D>, k, N - start);
                RowsByRows<T, D, C>::multiply(dp, g + place.own * LINE<T, D>, v, N - start);
                each(p, [&](S& e, Spot s) {
                    given.complete(e, dp[s.j][s.i], place.row + s.row, start + s.column, row_lse[s.half]);
                });
            }
            if (place.row >= N) continue;
            if (walk == 0) {
                each(p, [&](S& e, Spot s) { row_delta[s.half] += e * dp[s.j][s.i]; });
                continue;
            }
            each(p, [&](S& e, Spot s) {
                const int query = place.row + s.row, key = start + s.column;
                e = given.dl(e, dp[s.j][s.i], query, key, row_delta[s.half]);
                if (dl && query < N && key < N) dl[head * N * N + long(query) * N + key] = T(e);
            });
            if (dqkv) SquareByRows<T, D, C>::add(sums, p, k, N - start);
        }
        if (walk == 0)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = place.row + threadIdx.x % 32 / 4 + 8 * half;
                row_delta[half] = quad_sum(row_delta[half]);
                if (threadIdx.x % 4 == 0 && row < N) delta[head * N + row] = row_delta[half];
            }
    }
    if (dqkv && place.row < N)
        write_rows<T, D>(dqkv + begin + place.row * stride, stride, sums, S(scale), S(scale), q + place.own * LINE<T, D>,
                         min(N - place.row, 16), size);
}

// dk and dv (in dqkv). A warp owns 16 keys, and walks through the queries: its squares are transposed. Where registers do not hold both
// results (wide heads in double), it walks once for each.
template <class T, int D>
__global__ void __launch_bounds__(256, 1)
attention_backward_keys(T* dqkv, const Sum<T>* delta, const T* dy, const T* dlogits, const T* dprobabilities, const T* qkv, const T* bias,
                        const Sum<T>* lse, long bias_batch, long bias_head, int N, int H, int size, double scale) {
    typedef Sum<T> S;
    constexpr int C = D > 64 || sizeof(T) == 8 ? 16 : 32;               // keeps nothing between tiles: registers go to dk and dv
    DYNAMIC_SHARED(memory);
    const int rows = blockDim.x / 2;
    T *k = reinterpret_cast<T*>(memory), *v = k + rows * LINE<T, D>, *q = v + rows * LINE<T, D>, *g = q + C * LINE<T, D>;
    const Place place(N, H);
    const Given<T> given(place, bias, dlogits, dprobabilities, lse, bias_batch, bias_head, N, H, scale);
    const long stride = 3L * H * size, head = long(place.b) * H + place.h, begin = (long(place.b) * N * 3 * H + place.h) * size;
    const T *from = qkv + begin, *gradient = dy ? dy + (long(place.b) * N * H + place.h) * size : nullptr;
    read_rows<T, D>(k, from + long(H) * size, stride, place.first, rows, N, size);
    read_rows<T, D>(v, from + 2L * H * size, stride, place.first, rows, N, size);

    constexpr bool APART = sizeof(T) * D > 512;
    T *to = dqkv + begin + place.row * stride, *staging = v + place.own * LINE<T, D>;              // dv needs no v
    S p[C / 8][4], dp[C / 8][4], dk[D / 8][4], dv[D / 8][4];
#pragma unroll
    for (int walk = 0; walk < (APART ? 2 : 1); walk++) {
        clear(dk);
        clear(dv);
#pragma unroll 1
        for (int start = 0; start < N; start += C) {
            __syncthreads();
            read_rows<T, D>(q, from, stride, start, C, N, size);
            read_rows<T, D>(g, gradient, long(H) * size, start, C, N, size);
            arrived();
            if (place.row >= N) continue;
            RowsByRows<T, D, C>::multiply(p, k + place.own * LINE<T, D>, q, N - start);
            RowsByRows<T, D, C>::multiply(dp, v + place.own * LINE<T, D>, g, N - start);
            each(p, [&](S& e, Spot s) {
                S& other = dp[s.j][s.i];
                const int key = place.row + s.row, query = start + s.column;
                given.complete(e, other, query, key, query < N ? given.lse[query] : S(0));
                other = given.dl(e, other, query, key, query < N ? delta[head * N + query] : S(0));
            });
            if (!APART || walk == 1) SquareByRows<T, D, C>::add(dv, p, g, N - start);
            if (!APART || walk == 0) SquareByRows<T, D, C>::add(dk, dp, q, N - start);
        }
        if (place.row >= N) continue;
        const int count = min(N - place.row, 16);
        if (!APART || walk == 0) write_rows<T, D>(to + long(H) * size, stride, dk, S(scale), S(scale), staging, count, size);
        if (!APART || walk == 1) write_rows<T, D>(to + 2L * H * size, stride, dv, S(1), S(1), staging, count, size);
    }
}

// part (16, D) = 16 rows of a square of bf16 in shared memory, or columns where it is transposed, · b (columns, D). Its rows are `line`
// elements apart; `square` is the first of its elements that count.
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

// All of the above at once, in bf16, for N of at most TILE: a block takes a head, reads it once and makes p and dl once, which pass from
// the warps that own queries to those that own keys in shared memory.
template <class T, int D>
__global__ void __launch_bounds__(256, D > 16 ? 2 : 1)
attention_backward_head(T* dqkv, T* dl, const T* dy, const T* dlogits, const T* dprobabilities, const T* qkv, const T* bias,
                        const float* lse, long bias_batch, long bias_head, int N, int H, int size, double scale) {
    constexpr int C = TILE<T, D>;
    DYNAMIC_SHARED(memory);
    const int rows = blockDim.x / 2, line = rows + WIDTH<T>;
    T *q = reinterpret_cast<T*>(memory), *k = q + rows * LINE<T, D>, *v = k + rows * LINE<T, D>, *g = v + rows * LINE<T, D>;
    T *p_square = g + rows * LINE<T, D>, *dl_square = p_square + rows * line;          // (rows, line) both
    const Place place(N, H);
    const Given<T> given(place, bias, dlogits, dprobabilities, lse, bias_batch, bias_head, N, H, scale);
    const long stride = 3L * H * size, head = long(place.b) * H + place.h, begin = (long(place.b) * N * 3 * H + place.h) * size;
    const T* from = qkv + begin;
    read_rows<T, D>(q, from, stride, 0, rows, N, size);
    read_rows<T, D>(k, from + long(H) * size, stride, 0, rows, N, size);
    read_rows<T, D>(v, from + 2L * H * size, stride, 0, rows, N, size);
    read_rows<T, D>(g, dy ? dy + (long(place.b) * N * H + place.h) * size : nullptr, long(H) * size, 0, rows, N, size);
    arrived();
    {
        float p[C / 8][4], dp[C / 8][4], row_lse[2], delta[2] = {0, 0};
#pragma unroll
        for (int half = 0; half < 2; half++) row_lse[half] = given.lse[min(place.row + int(threadIdx.x) % 32 / 4 + 8 * half, N - 1)];
        RowsByRows<T, D, C>::multiply(p, q + place.own * LINE<T, D>, k, N);
        RowsByRows<T, D, C>::multiply(dp, g + place.own * LINE<T, D>, v, N);
        each(p, [&](float& e, Spot s) {
            given.complete(e, dp[s.j][s.i], place.row + s.row, s.column, row_lse[s.half]);
            delta[s.half] += e * dp[s.j][s.i];
        });
        delta[0] = quad_sum(delta[0]);
        delta[1] = quad_sum(delta[1]);
        each(dp, [&](float& e, Spot s) {
            const int query = place.row + s.row;
            e = given.dl(p[s.j][s.i], e, query, s.column, delta[s.half]);
            if (dl && query < N && s.column < N) dl[head * N * N + long(query) * N + s.column] = T(e);
            if (s.i % 2 == 0 || s.column >= rows) return;
            const int at = (place.own + s.row) * line + s.column - 1;
            *reinterpret_cast<u32*>(p_square + at) = pack(p[s.j][s.i - 1], p[s.j][s.i]);
            *reinterpret_cast<u32*>(dl_square + at) = pack(dp[s.j][s.i - 1], e);
        });
    }
    if (!dqkv) return;
    __syncthreads();                                                    // now v has been read, and is free
    T *to = dqkv + begin + place.row * stride, *staging = v + place.own * LINE<T, D>;
    const int count = min(N - place.row, 16);
    float part[D / 8][4];
    multiply_stored<D, false>(part, dl_square + place.own * line, line, k, N);
    write_rows<T, D>(to, stride, part, float(scale), float(scale), staging, count, size);
    multiply_stored<D, true>(part, dl_square + place.own, line, q, N);
    write_rows<T, D>(to + long(H) * size, stride, part, float(scale), float(scale), staging, count, size);
    multiply_stored<D, true>(part, p_square + place.own, line, g, N);
    write_rows<T, D>(to + 2L * H * size, stride, part, 1.0f, 1.0f, staging, count, size);
}
