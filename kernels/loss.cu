// Softmax cross-entropy; the formulas are in loss.py. One warp per row of K classes.
#include <common.cuh>

template <class S> __device__ __forceinline__ S weight_of(const S* weights, long k) { return weights ? weights[k] : S(1); }

// The sum of the weights (K,), in every lane; K if there are none.
template <class S> __device__ __forceinline__ S sum_of(const S* weights, int K) {
    if (!weights) return S(K);
    S total = 0;
    for (int k = threadIdx.x % 32; k < K; k += 32) total += weights[k];
    return warp_sum(total);
}

// losses, lse (B,), logits (B, K), weights (K,) or null; targets (B, K) if SOFT, otherwise classes (B,).
template <class T, bool SOFT>
__global__ void __launch_bounds__(128) cross_entropy(Sum<T>* losses, Sum<T>* lse, const T* logits, const long* classes, const T* targets,
                                                     const Sum<T>* weights, long B, int K, double smoothing) {
    typedef Sum<T> S;
    const S rest = S(1 - smoothing), everywhere = S(smoothing / K), all_weights = sum_of(weights, K);
    const int lane = threadIdx.x % 32;
    for (long i = (long(blockIdx.x) * blockDim.x + threadIdx.x) / 32; i < B; i += long(gridDim.x) * (blockDim.x / 32)) {
        const T* row = logits + i * K;
        S largest = S(row[0]), total = 0, all = 0, weighted = 0, weight = 0;
        for (int k = lane; k < K; k += 32) largest = larger(largest, S(row[k]));
        largest = warp_max(largest);
        for (int k = lane; k < K; k += 32) {
            const S x = S(row[k]) - largest;
            total += exp(x);
            all += weight_of(weights, k) * x;
            if (SOFT) {
                const S t = weight_of(weights, k) * S(targets[i * K + k]);
                weight += t;
                weighted += t * x;
            }
        }
        total = log(warp_sum(total));
        all = warp_sum(all);
        if (SOFT) {
            weight = warp_sum(weight);
            weighted = warp_sum(weighted);
        } else {
            const long known = classes[i];
            weight = known >= 0 && known < K ? weight_of(weights, known) : S(nan(""));
            if (lane == 0) weighted = weight == weight ? weight * (S(row[known]) - largest) : weight;
        }
        if (lane == 0) {
            lse[i] = largest + total;
            losses[i] = (rest * weight + everywhere * all_weights) * total - rest * weighted - everywhere * all;
        }
    }
}

// One block: total = the sum of the weights of the classes (M,), M if there are none, and loss = the sum of losses (B,) / total.
template <class S> __global__ void __launch_bounds__(256) mean_loss(S* loss, S* total, const S* losses, const long* classes,
                                                                    const S* weights, long B, long M, int K) {
    __shared__ double shares[32];
    double sum = 0, rows = 0;
    for (long i = threadIdx.x; i < B; i += 256) sum += losses[i];
    for (long i = threadIdx.x; classes && i < M; i += 256) rows += classes[i] >= 0 && classes[i] < K ? weight_of(weights, classes[i]) : S(nan(""));
    sum = block_sum(sum, shares);
    rows = classes ? block_sum(rows, shares) : double(M);
    if (threadIdx.x == 0) {
        *total = S(rows);
        *loss = rows != 0 ? S(sum / rows) : S(0);
    }
}

template <class T, bool SOFT>
__global__ void __launch_bounds__(128, 1) cross_entropy_backward(T* dlogits, const Sum<T>* dloss, const T* logits, const long* classes,
                                                              const T* targets, const Sum<T>* weights, const Sum<T>* lse,
                                                              const Sum<T>* total, long B, int K, double smoothing) {
    typedef Sum<T> S;
    const S rest = S(1 - smoothing), everywhere = S(smoothing / K), all_weights = sum_of(weights, K);
    const S mean = *total != 0 ? *dloss / *total : S(0);
    const int lane = threadIdx.x % 32;
    for (long i = (long(blockIdx.x) * blockDim.x + threadIdx.x) / 32; i < B; i += long(gridDim.x) * (blockDim.x / 32)) {
        const long known = SOFT ? 0 : classes[i];
        const bool wrong = known < 0 || known >= K;
        S weight = 0;
        if (SOFT) {
            for (int k = lane; k < K; k += 32) weight += weight_of(weights, k) * S(targets[i * K + k]);
            weight = warp_sum(weight);
        } else if (!wrong) {
            weight = weight_of(weights, known);
        }
        weight = (rest * weight + everywhere * all_weights) * mean;
        for (int k = lane; k < K; k += 32) {
            const S target = SOFT ? S(targets[i * K + k]) : k == known ? S(1) : S(0);
            const S d = weight * exp(S(logits[i * K + k]) - lse[i]) - mean * weight_of(weights, k) * (everywhere + rest * target);
            dlogits[i * K + k] = T(wrong ? S(nan("")) : d);
        }
    }
}
