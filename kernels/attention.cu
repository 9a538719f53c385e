// Multi-head attention; the formulas are in attention.py. A warp owns 16 rows of the (N, N) square of one head, and loops over tiles of its
// columns, as in FlashAttention-2 (Dao, 2307.08691): the square is written to memory only on request. D is the head size in shared memory,
// the smallest of HEAD_SIZES (attention.py) that is large enough.
#include <fragments.cuh>

// Columns of a tile that may hold all. One of 80 does so for an image with 8x8 patches and a class token.
template <class T, int D> constexpr int TILE = sizeof(T) == 2 ? (D > 64 ? 32 : 80) : D > 64 || sizeof(T) == 8 ? 16 : 32;

__device__ __forceinline__ float power(float x, bf16) { return __expf(x); }            // the last argument only selects the type
__device__ __forceinline__ float power(float x, float) { return exp(x); }
__device__ __forceinline__ double power(double x, double) { return exp(x); }

// The rows of a head that a block and a warp own, and the head's offsets in qkv (B, N, 3, H, size), y (B, N, H, size), lse (B, H, N) and
// squares (B, H, N, N).
struct Place {
    int b, h, first, own, row;                                          // first row of the block; of the warp, in the block and in total
    long part, stride, qkv, y, lse, square;                             // strides from q to k to v and between rows of qkv; offsets

    __device__ __forceinline__ Place(int N, int H, int size) : part(long(H) * size), stride(3 * part) {
        const int rows = blockDim.x / 2, tiles = (N + rows - 1) / rows;
        const int head = blockIdx.x / tiles;
        b = head / H, h = head % H;
        first = blockIdx.x % tiles * rows;
        own = threadIdx.x / 32 * 16;
        row = first + own;
        y = b * N * part + long(h) * size, qkv = b * N * stride + long(h) * size;
        lse = long(head) * N, square = lse * N;
    }
};

// y (B, N, H, size), logits, probabilities (B, H, N, N) or null, lse (B, H, N), qkv (B, N, 3, H, size), bias (N, N) per head or null. The
// softmax is online: `highest` and `total` are those of the columns so far. Probabilities need a second pass, when both are final. ONE: all
// columns are in one tile.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
template <class T, int D> constexpr int BLOCKS = sizeof(T) <= 4 && D < 96 ? 2 : 1;   // a multiprocessor
#else
template <class T, int D> constexpr int BLOCKS = 1;                                  // code for other GPUs would spill
#endif
template <class T, int D, bool ONE>
__global__ void __launch_bounds__(256, BLOCKS<T, D>)
attention_forward(T* y, T* logits, T* probabilities, Sum<T>* lse, const T* qkv, const T* bias, long bias_batch, long bias_head, int N,
                  int H, int size, double scale) {
    typedef Sum<T> S;
    constexpr int C = ONE || TILE<T, D> < 64 ? TILE<T, D> : 64;
    DYNAMIC_SHARED(memory);
    T *q = reinterpret_cast<T*>(memory), *others = q + blockDim.x / 2 * LINE<T, D>;
    const Place place(N, H, size);
    const T *from = qkv + place.qkv, *added = bias ? bias + place.b * bias_batch + place.h * bias_head : nullptr;
    const Tiles<T, D, C> tiles{others, from + place.part, from + 2 * place.part, place.stride, place.stride, N, size};
    const int turns = ONE ? 1 : tiles.count;
    read_rows<T, D>(q, from, place.stride, place.first, blockDim.x / 2, N, size);
    tiles.request(0);

    S part[C / 8][4], sums[D / 8][4], highest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    const auto compute_logits = [&](const T* k, int start) {
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
    for (int turn = 0; turn < turns; turn++) {
        const T *k = tiles.take(turn, turns), *v = k + C * LINE<T, D>;
        const int start = turn * C;
        if (place.row >= N) continue;
        compute_logits(k, start);
        if (logits) each(part, [&](S& e, Spot s) {
            const int row = place.row + s.row, column = start + s.column;
            if (row < N && column < N) logits[place.square + long(row) * N + column] = T(e);
        });
        S top[2] = {highest[0], highest[1]}, shift[2], shrink[2];
        each(part, [&](S& e, Spot s) { top[s.half] = larger(top[s.half], e); });
#pragma unroll
        for (int half = 0; half < 2; half++) {
            top[half] = quad_max(top[half]);
            shift[half] = top[half] == S(-INFINITY) ? S(0) : top[half];                // all masked so far: avoids inf - inf
            shrink[half] = ONE ? S(1) : power(highest[half] - shift[half], T(0));
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
        if (threadIdx.x % 4 == 0 && row < N) lse[place.lse + row] = highest[half] + log(total[half]);
    }
#pragma unroll 1
    for (int start = 0; probabilities && start < N; start += C) {
        if (!ONE) {
            __syncthreads();
            read_rows<T, D>(others, from + place.part, place.stride, start, C, N, size);
            arrived();
        }
        if (place.row >= N) continue;
        if (!ONE) {
            compute_logits(others, start);
            each(part, [&](S& e, Spot s) { e = power(e - highest[s.half], T(0)); });
        }
        each(part, [&](S& e, Spot s) {
            const int row = place.row + s.row, column = start + s.column;
            if (row < N && column < N) probabilities[place.square + long(row) * N + column] = T(e * inverse[s.half]);
        });
    }
    if (place.row < N)
        write_rows<T, D>(y + place.y + place.row * place.part, place.part, sums, inverse[0], inverse[1], q + place.own * LINE<T, D>,
                         min(N - place.row, 16), size);
}

// Inputs of the backward kernels besides their tiles; all but lse may be null.
template <class T> struct Given {
    const T *bias, *dlogits, *dprobabilities;
    const Sum<T>* lse;
    int N;
    Sum<T> scale;

    __device__ __forceinline__ Given(const Place& place, const T* bias, const T* dlogits, const T* dprobabilities, const Sum<T>* lse,
                                     long bias_batch, long bias_head, int N, double scale)
        : lse(lse + place.lse), N(N), scale(Sum<T>(scale)) {
        this->bias = bias ? bias + place.b * bias_batch + place.h * bias_head : nullptr;
        this->dlogits = dlogits ? dlogits + place.square : nullptr;
        this->dprobabilities = dprobabilities ? dprobabilities + place.square : nullptr;
    }
    // Turns q·kᵀ and dy·vᵀ into p and dp; both are 0 outside of the square.
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

// dq (in dqkv, or null), dl (B, H, N, N) or null, delta (B, H, N) = Σ p·dp over keys. A warp owns 16 queries. The first pass over keys
// computes delta, the second the rest; if all keys are in one tile, p and dp stay in registers between the two. bf16 has another kernel for
// that, so its tiles can be as small here as two blocks a multiprocessor want.
template <class T, int D>
__global__ void __launch_bounds__(256, BLOCKS<T, D>)
attention_backward_queries(T* dqkv, T* dl, Sum<T>* delta, const T* dy, const T* dlogits, const T* dprobabilities, const T* qkv,
                           const T* bias, const Sum<T>* lse, long bias_batch, long bias_head, int N, int H, int size, double scale) {
    typedef Sum<T> S;
    constexpr int C = TILE<T, D> < 32 ? TILE<T, D> : 32;
    DYNAMIC_SHARED(memory);
    const int rows = blockDim.x / 2;
    T *q = reinterpret_cast<T*>(memory), *g = q + rows * LINE<T, D>;
    const Place place(N, H, size);
    const Given<T> given(place, bias, dlogits, dprobabilities, lse, bias_batch, bias_head, N, scale);
    const T *from = qkv + place.qkv, *gradient = dy ? dy + place.y : nullptr;
    const Tiles<T, D, C> tiles{g + rows * LINE<T, D>, from + place.part, from + 2 * place.part, place.stride, place.stride, N, size};
    read_rows<T, D>(q, from, place.stride, place.first, rows, N, size);
    read_rows<T, D>(g, gradient, place.part, place.first, rows, N, size);
    tiles.request(0);

    S p[C / 8][4], dp[C / 8][4], sums[D / 8][4], row_lse[2], row_delta[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = place.row + threadIdx.x % 32 / 4 + 8 * half;
        row_lse[half] = row < N ? given.lse[row] : S(0);
    }
    clear(sums);
    const int turns = N > C ? 2 * tiles.count : 1;
#pragma unroll 1
    for (int walk = 0; walk < 2; walk++) {
#pragma unroll 1
        for (int tile = 0; tile < tiles.count; tile++) {
            const int start = tile * C, turn = walk * tiles.count + tile;
            const T *k = tiles.pair(turn), *v = k + C * LINE<T, D>;
            if (turn < turns) {
                tiles.take(turn, turns);
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
                if (dl && query < N && key < N) dl[place.square + long(query) * N + key] = T(e);
            });
            if (dqkv) SquareByRows<T, D, C>::add(sums, p, k, N - start);
        }
        if (walk == 0)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = place.row + threadIdx.x % 32 / 4 + 8 * half;
                row_delta[half] = quad_sum(row_delta[half]);
                if (threadIdx.x % 4 == 0 && row < N) delta[place.lse + row] = row_delta[half];
            }
    }
    if (dqkv && place.row < N)
        write_rows<T, D>(dqkv + place.qkv + place.row * place.stride, place.stride, sums, S(scale), S(scale), q + place.own * LINE<T, D>,
                         min(N - place.row, 16), size);
}

// dk and dv (in dqkv). A warp owns 16 keys and loops over the queries: its squares are transposed. If the registers cannot hold both
// results (large heads in double), it makes one pass for each.
template <class T, int D>
__global__ void __launch_bounds__(256, sizeof(T) == 2 ? BLOCKS<T, D> : 1)
attention_backward_keys(T* dqkv, const Sum<T>* delta, const T* dy, const T* dlogits, const T* dprobabilities, const T* qkv, const T* bias,
                        const Sum<T>* lse, long bias_batch, long bias_head, int N, int H, int size, double scale) {
    typedef Sum<T> S;
    constexpr int C = 16;                                               // dk and dv take most registers
    DYNAMIC_SHARED(memory);
    const int rows = blockDim.x / 2;
    T *k = reinterpret_cast<T*>(memory), *v = k + rows * LINE<T, D>;
    const Place place(N, H, size);
    const Given<T> given(place, bias, dlogits, dprobabilities, lse, bias_batch, bias_head, N, scale);
    const T *from = qkv + place.qkv, *gradient = dy ? dy + place.y : nullptr;
    const Tiles<T, D, C> tiles{v + rows * LINE<T, D>, from, gradient, place.stride, place.part, N, size};
    read_rows<T, D>(k, from + place.part, place.stride, place.first, rows, N, size);
    read_rows<T, D>(v, from + 2 * place.part, place.stride, place.first, rows, N, size);
    tiles.request(0);

    constexpr bool APART = sizeof(T) * D > 512;
    T *to = dqkv + place.qkv + place.row * place.stride, *staging = v + place.own * LINE<T, D>;              // v is not needed any more
    S p[C / 8][4], dp[C / 8][4], dk[D / 8][4], dv[D / 8][4];
#pragma unroll
    for (int walk = 0; walk < (APART ? 2 : 1); walk++) {
        clear(dk);
        clear(dv);
#pragma unroll 1
        for (int tile = 0; tile < tiles.count; tile++) {
            const T *q = tiles.take(walk * tiles.count + tile, (APART ? 2 : 1) * tiles.count), *g = q + C * LINE<T, D>;
            const int start = tile * C;
            if (place.row >= N) continue;
            RowsByRows<T, D, C>::multiply(p, k + place.own * LINE<T, D>, q, N - start);
            RowsByRows<T, D, C>::multiply(dp, v + place.own * LINE<T, D>, g, N - start);
            each(p, [&](S& e, Spot s) {
                S& other = dp[s.j][s.i];
                const int key = place.row + s.row, query = start + s.column;
                given.complete(e, other, query, key, query < N ? given.lse[query] : S(0));
                other = given.dl(e, other, query, key, query < N ? delta[place.lse + query] : S(0));
            });
            if (!APART || walk == 1) SquareByRows<T, D, C>::add(dv, p, g, N - start);
            if (!APART || walk == 0) SquareByRows<T, D, C>::add(dk, dp, q, N - start);
        }
        if (place.row >= N) continue;
        const int count = min(N - place.row, 16);
        if (!APART || walk == 0) write_rows<T, D>(to + place.part, place.stride, dk, S(scale), S(scale), staging, count, size);
        if (!APART || walk == 1) write_rows<T, D>(to + 2 * place.part, place.stride, dv, S(1), S(1), staging, count, size);
    }
}

// The whole backward pass in bf16 for N of at most TILE: a block reads one head and computes p and dl once; these pass through shared
// memory from the warps that own queries to those that own keys.
template <class T, int D>
__global__ void __launch_bounds__(256, D > 16 ? 2 : 1)
attention_backward_head(T* dqkv, T* dl, const T* dy, const T* dlogits, const T* dprobabilities, const T* qkv, const T* bias,
                        const float* lse, long bias_batch, long bias_head, int N, int H, int size, double scale) {
    constexpr int C = TILE<T, D>;
    DYNAMIC_SHARED(memory);
    const int rows = blockDim.x / 2, line = rows + WIDTH<T>;
    T *q = reinterpret_cast<T*>(memory), *k = q + rows * LINE<T, D>, *v = k + rows * LINE<T, D>, *g = v + rows * LINE<T, D>;
    T *p_square = g + rows * LINE<T, D>, *dl_square = p_square + rows * line;          // (rows, line) both
    const Place place(N, H, size);
    const Given<T> given(place, bias, dlogits, dprobabilities, lse, bias_batch, bias_head, N, scale);
    const T *from = qkv + place.qkv, *gradient = dy ? dy + place.y : nullptr;
    read_rows<T, D>(q, from, place.stride, 0, rows, N, size);
    read_rows<T, D>(k, from + place.part, place.stride, 0, rows, N, size);
    read_rows<T, D>(v, from + 2 * place.part, place.stride, 0, rows, N, size);
    read_rows<T, D>(g, gradient, place.part, 0, rows, N, size);
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
            if (dl && query < N && s.column < N) dl[place.square + long(query) * N + s.column] = T(e);
            if (s.i % 2 == 0 || s.column >= rows) return;
            const int at = (place.own + s.row) * line + s.column - 1;
            *reinterpret_cast<u32*>(p_square + at) = pack(p[s.j][s.i - 1], p[s.j][s.i]);
            *reinterpret_cast<u32*>(dl_square + at) = pack(dp[s.j][s.i - 1], e);
        });
    }
    if (!dqkv) return;
    __syncthreads();                                                    // v is no longer needed; its memory can be reused
    T *to = dqkv + place.qkv + place.row * place.stride, *staging = v + place.own * LINE<T, D>;
    const int count = min(N - place.row, 16);
    float part[D / 8][4];
    multiply_stored<D, false>(part, dl_square + place.own * line, line, k, N);
    write_rows<T, D>(to, place.stride, part, float(scale), float(scale), staging, count, size);
    multiply_stored<D, true>(part, dl_square + place.own, line, q, N);
    write_rows<T, D>(to + place.part, place.stride, part, float(scale), float(scale), staging, count, size);
    multiply_stored<D, true>(part, p_square + place.own, line, g, N);
    write_rows<T, D>(to + 2 * place.part, place.stride, part, 1.0f, 1.0f, staging, count, size);
}
