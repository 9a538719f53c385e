// Linear attention with exponential features; the formulas are in performer.py. A block goes through the tokens of one part of a sample in
// tiles. Shared memory holds the features, rows of q, k, v or dy, w, and sums of the sample, all as Sum<T>.
#include <common.cuh>

// f(i, j, Σ_k a[i, k]·b[k, j]) for a (rows, depth) and b (depth, columns) in shared memory with these steps; a thread computes 4 × 4 of them.
template <class S, class F>
__device__ __forceinline__ void multiply(int rows, int columns, int depth, const S* a, int a_row, int a_step, const S* b, int b_step,
                                         int b_column, F f) {
    const int across = (columns + 3) / 4, squares = (rows + 3) / 4 * across;
#pragma unroll 1
    for (int square = threadIdx.x; square < squares; square += blockDim.x) {
        const int i = square / across * 4, j = square % across * 4;
        const S *left[4], *right[4];
        S part[4][4] = {};
#pragma unroll
        for (int r = 0; r < 4; r++) {
            left[r] = a + min(i + r, rows - 1) * a_row;
            right[r] = b + min(j + r, columns - 1) * b_column;
        }
#pragma unroll 1
        for (int k = 0; k < depth; k++) {
            S one[4], other[4];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                one[r] = left[r][k * a_step];
                other[r] = right[r][k * b_step];
            }
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int c = 0; c < 4; c++) part[r][c] += one[r] * other[c];
        }
#pragma unroll
        for (int r = 0; r < 4; r++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                if (i + r < rows && j + c < columns) f(i + r, j + c, part[r][c]);
    }
}

// What all kernels share: the part of a sample that the block owns, and its shared memory. Lines are longer by one, against bank conflicts.
template <class T> struct Part {
    typedef Sum<T> S;
    const T* kqv;                                                       // of the sample
    const int E, m, tile, sample, index, first, last;
    const long token;                                                   // the first token of the sample
    const S factor;
    S *w, *sums, *more, *x, *v, *phi, *other, *column;                  // (m, E), (E + 1, m) twice, rows of tokens

    __device__ __forceinline__ Part(unsigned char* memory, const T* packed, const S* weights, int parts, int N, int E, int m, int tile)
        : E(E), m(m), tile(tile), sample(blockIdx.x / parts), index(blockIdx.x % parts), first(long(index) * N / parts),
          last(long(index + 1) * N / parts), token(long(sample) * N), factor(S(1) / sqrt(S(m))) {
        kqv = packed + token * 3 * E;
        w = reinterpret_cast<S*>(memory);
        sums = w + m * (E + 1);
        more = sums + (E + 1) * (m + 1);
        x = more + (E + 1) * (m + 1);
        v = x + tile * (E + 1);
        phi = v + tile * (E + 1);
        other = phi + tile * (m + 1);
        column = other + tile * (m + 1);
        for (int i = threadIdx.x; i < m * E; i += blockDim.x) w[i / E * (E + 1) + i % E] = weights[i];
    }
    __device__ __forceinline__ void read(S* to, const T* from, int stride, int count) const {     // rows (count, E)
        for (int i = threadIdx.x; i < count * E; i += blockDim.x) to[i / E * (E + 1) + i % E] = S(from[long(i / E) * stride + i % E]);
    }
    __device__ __forceinline__ void read_sums(const S* from) const {
        for (int i = threadIdx.x; i < (E + 1) * m; i += blockDim.x) sums[i / m * (m + 1) + i % m] = from[long(sample) * (E + 1) * m + i];
    }
    __device__ __forceinline__ void clear(S* to) const {
        for (int i = threadIdx.x; i < (E + 1) * (m + 1); i += blockDim.x) to[i] = 0;
    }
    __device__ __forceinline__ void write(S* to, const S* from) const {                           // sums of this part
        for (int i = threadIdx.x; i < (E + 1) * m; i += blockDim.x) to[long(blockIdx.x) * (E + 1) * m + i] = from[i / m * (m + 1) + i % m];
    }
    __device__ __forceinline__ void compute_features(int count) const {                           // phi = φ(x)
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            S half = 0;
            for (int e = 0; e < E; e++) half += x[i * (E + 1) + e] * x[i * (E + 1) + e];
            column[i] = half / 2;
        }
        __syncthreads();
        multiply<S>(count, m, E, x, E + 1, 1, w, 1, E + 1,
                    [&](int i, int j, S value) { phi[i * (m + 1) + j] = exp(value - column[i]) * factor; });
        __syncthreads();
    }
    // The first E rows of `to` += rowsᵀ·phi.
    __device__ __forceinline__ void add(S* to, const S* rows, int count) const {
        multiply<S>(E, m, count, rows, 1, E + 1, phi, m + 1, 1, [&](int i, int j, S value) { to[i * (m + 1) + j] += value; });
    }
    // The gradient of x, from z in `other`.
    __device__ __forceinline__ void write_gradient(T* to, int count) const {
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            S total = 0;
            for (int j = 0; j < m; j++) total += other[i * (m + 1) + j];
            column[i] = total;
        }
        __syncthreads();
        multiply<S>(count, E, m, other, m + 1, 1, w, E + 1, 1,
                    [&](int i, int e, S value) { to[long(i) * 3 * E + e] = T(value - column[i] * x[i * (E + 1) + e]); });
    }
};

template <class T>
__global__ void __launch_bounds__(128) performer_keys(Sum<T>* sums, T* v, const T* kqv, const Sum<T>* w, int parts, int N, int E, int m,
                                                      int tile, double) {
    typedef Sum<T> S;
    DYNAMIC_SHARED(memory);
    const Part<T> part(memory, kqv, w, parts, N, E, m, tile);
    part.clear(part.sums);
    for (int start = part.first; start < part.last; start += tile) {
        const int count = min(tile, part.last - start);
        const T* from = part.kqv + long(start) * 3 * E;
        __syncthreads();
        part.read(part.x, from, 3 * E, count);
        part.read(part.v, from + 2 * E, 3 * E, count);
        part.compute_features(count);
        part.add(part.sums, part.v, count);
        for (int j = threadIdx.x; j < m; j += blockDim.x)
            for (int i = 0; i < count; i++) part.sums[E * (m + 1) + j] += part.phi[i * (m + 1) + j];
        for (int i = threadIdx.x; i < count * E; i += blockDim.x)
            v[(part.token + start) * E + i] = T(part.v[i / E * (E + 1) + i % E]);
    }
    __syncthreads();
    part.write(sums, part.sums);
}

template <class T>
__global__ void __launch_bounds__(128) performer_queries(T* y, const Sum<T>* sums, const T* kqv, const Sum<T>* w, int parts, int N, int E,
                                                         int m, int tile, double epsilon) {
    typedef Sum<T> S;
    DYNAMIC_SHARED(memory);
    const Part<T> part(memory, kqv, w, parts, N, E, m, tile);
    part.read_sums(sums);
    for (int start = part.first; start < part.last; start += tile) {
        const int count = min(tile, part.last - start);
        __syncthreads();
        part.read(part.x, part.kqv + (long(start) * 3 + 1) * E, 3 * E, count);
        part.compute_features(count);
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            S d = 0;
            for (int j = 0; j < m; j++) d += part.phi[i * (m + 1) + j] * part.sums[E * (m + 1) + j];
            part.column[i] = S(1) / (d + S(epsilon));
        }
        __syncthreads();
        T* to = y + (part.token + start) * E;
        multiply<S>(count, E, m, part.phi, m + 1, 1, part.sums, 1, m + 1,
                    [&](int i, int e, S value) { to[long(i) * E + e] = T(value * part.column[i]); });
    }
}

template <class T>
__global__ void __launch_bounds__(128) performer_backward_queries(T* dkqv, Sum<T>* dsums, const T* dy, const Sum<T>* sums, const T* kqv,
                                                                  const Sum<T>* w, int parts, int N, int E, int m, int tile,
                                                                  double epsilon) {
    typedef Sum<T> S;
    DYNAMIC_SHARED(memory);
    const Part<T> part(memory, kqv, w, parts, N, E, m, tile);
    part.read_sums(sums);
    part.clear(part.more);
    for (int start = part.first; start < part.last; start += tile) {
        const int count = min(tile, part.last - start);
        const long at = (long(start) * 3 + 1) * E;
        __syncthreads();
        part.read(part.x, part.kqv + at, 3 * E, count);
        if (dy) part.read(part.v, dy + (part.token + start) * E, E, count);
        else for (int i = threadIdx.x; i < count * (E + 1); i += blockDim.x) part.v[i] = 0;
        part.compute_features(count);
        multiply<S>(count, m, E, part.v, E + 1, 1, part.sums, m + 1, 1, [&](int i, int j, S value) { part.other[i * (m + 1) + j] = value; });
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            S d = 0, dot = 0, *phi = part.phi + i * (m + 1), *h = part.other + i * (m + 1);
            for (int j = 0; j < m; j++) {
                d += phi[j] * part.sums[E * (m + 1) + j];
                dot += phi[j] * h[j];
            }
            const S inverse = S(1) / (d + S(epsilon)), dd = -dot * inverse * inverse;
            for (int j = 0; j < m; j++) {
                h[j] = (h[j] * inverse + part.sums[E * (m + 1) + j] * dd) * phi[j];
                phi[j] *= inverse;
            }
            part.column[i] = -dot * inverse;                            // ds = Σ (φ / d)·this
        }
        __syncthreads();
        part.add(part.more, part.v, count);
        for (int j = threadIdx.x; j < m; j += blockDim.x)
            for (int i = 0; i < count; i++) part.more[E * (m + 1) + j] += part.phi[i * (m + 1) + j] * part.column[i];
        part.write_gradient(dkqv + part.token * 3 * E + at, count);
    }
    __syncthreads();
    part.write(dsums, part.more);
}

template <class T>
__global__ void __launch_bounds__(128) performer_backward_keys(T* dkqv, const T* dv, const Sum<T>* dsums, const T* kqv, const Sum<T>* w,
                                                               int parts, int N, int E, int m, int tile, double) {
    typedef Sum<T> S;
    DYNAMIC_SHARED(memory);
    const Part<T> part(memory, kqv, w, parts, N, E, m, tile);
    part.read_sums(dsums);
    for (int start = part.first; start < part.last; start += tile) {
        const int count = min(tile, part.last - start);
        const T* from = part.kqv + long(start) * 3 * E;
        T* to = dkqv + (part.token + start) * 3 * E;
        __syncthreads();
        part.read(part.x, from, 3 * E, count);
        part.read(part.v, from + 2 * E, 3 * E, count);
        part.compute_features(count);
        multiply<S>(count, E, m, part.phi, m + 1, 1, part.sums, 1, m + 1, [&](int i, int e, S value) {
            to[(long(i) * 3 + 2) * E + e] = T(dv ? value + S(dv[(part.token + start + i) * E + e]) : value);
        });
        multiply<S>(count, m, E, part.v, E + 1, 1, part.sums, m + 1, 1, [&](int i, int j, S value) {
            part.other[i * (m + 1) + j] = (value + part.sums[E * (m + 1) + j]) * part.phi[i * (m + 1) + j];
        });
        part.write_gradient(to, count);
    }
}
