// What minivit calls of cuBLASLt, on a CPU and as NVIDIA documents it: column-major matrices, epilogues, and what is not supported.
#include <cstdint>
#include <cstring>
#include <cmath>

typedef long long i64;
enum { SUCCESS = 0, INVALID = 7, UNSUPPORTED = 15 };
enum { F32 = 0, F64 = 1, BF16 = 14, COMPUTE_32F = 68, COMPUTE_64F = 70 };
enum { DEFAULT = 1, BIAS = 4, BGRADB = 512 };

struct Matmul { int compute, scale, transpose_a = 0, transpose_b = 0, epilogue = DEFAULT; void* bias = nullptr; };
struct Layout { int type; i64 rows, columns, step; int batch = 1; i64 batch_step = 0; };
struct Result { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; };

static double get(const void* p, int type, i64 i) {
    if (type == F64) return static_cast<const double*>(p)[i];
    if (type == F32) return static_cast<const float*>(p)[i];
    const uint32_t bits = uint32_t(static_cast<const uint16_t*>(p)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static void set(void* p, int type, i64 i, double x) {
    if (type == F64) static_cast<double*>(p)[i] = x;
    else if (type == F32) static_cast<float*>(p)[i] = float(x);
    else {
        const float value = float(x);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        static_cast<uint16_t*>(p)[i] = uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
}

// The documented combinations of types; a bias has D's type here, as no other is asked for.
static int supported(const Matmul* m, const Layout* a, const Layout* b, const Layout* c, const Layout* d) {
    const bool wide = m->compute == COMPUTE_64F;
    if (a->type != b->type || c->type != d->type || m->scale != (wide ? F64 : F32)) return UNSUPPORTED;
    if (wide ? a->type != F64 || d->type != F64 : a->type == F64 || (d->type != F32 && d->type != a->type)) return UNSUPPORTED;
    if (m->epilogue != DEFAULT && (wide || !m->bias)) return UNSUPPORTED;
    return m->epilogue == BGRADB && d->batch > 1 ? UNSUPPORTED : SUCCESS;
}

extern "C" {
int sums_split = 1;                                                     // whether products with sums split K

int cublasLtCreate(void** handle) { *handle = &sums_split; return SUCCESS; }
int cublasLtMatmulDescCreate(Matmul** m, int compute, int scale) { *m = new Matmul{compute, scale}; return SUCCESS; }
int cublasLtMatmulDescSetAttribute(Matmul* m, int attribute, const void* value, size_t size) {
    if (size != (attribute == 8 ? 8 : 4)) return INVALID;
    void* to = attribute == 3 ? static_cast<void*>(&m->transpose_a) : attribute == 4 ? static_cast<void*>(&m->transpose_b)
             : attribute == 7 ? static_cast<void*>(&m->epilogue) : attribute == 8 ? static_cast<void*>(&m->bias) : nullptr;
    if (!to) return INVALID;
    std::memcpy(to, value, size);
    return SUCCESS;
}
int cublasLtMatrixLayoutCreate(Layout** l, int type, uint64_t rows, uint64_t columns, int64_t step) {
    *l = new Layout{type, i64(rows), i64(columns), step};
    return step < i64(rows) ? INVALID : SUCCESS;
}
int cublasLtMatrixLayoutSetAttribute(Layout* l, int attribute, const void* value, size_t size) {
    if (attribute == 5 && size == 4) std::memcpy(&l->batch, value, 4);
    else if (attribute == 6 && size == 8) std::memcpy(&l->batch_step, value, 8);
    else return INVALID;
    return SUCCESS;
}
int cublasLtMatmulPreferenceCreate(void** p) { *p = &sums_split; return SUCCESS; }
int cublasLtMatmulPreferenceSetAttribute(void*, int attribute, const void*, size_t size) {
    return attribute == 1 ? (size == 8 ? SUCCESS : INVALID) : attribute >= 5 && attribute <= 8 && size == 4 ? SUCCESS : INVALID;
}
int cublasLtMatmulPreferenceDestroy(void*) { return SUCCESS; }

// Tiles of 128 x 128 on 132 multiprocessors; K is split as long as it stays 512 or more.
int cublasLtMatmulAlgoGetHeuristic(void*, Matmul* m, Layout* a, Layout* b, Layout* c, Layout* d, void*, int most, Result* results, int* count) {
    *count = 0;
    if (const int status = supported(m, a, b, c, d)) return status;
    const i64 K = m->transpose_a ? a->rows : a->columns, tiles = (d->rows + 127) / 128 * ((d->columns + 127) / 128) * d->batch;
    i64 splits = 1;
    while (tiles * splits * 2 <= 132 && K / (splits * 2) >= 512 && (sums_split || m->epilogue != BGRADB)) splits *= 2;
    for (; *count < most && *count < 3; ++*count) results[*count].waves = float(tiles * splits) / 132;
    return SUCCESS;
}

int cublasLtMatmul(void*, Matmul* m, const void* alpha, const void* a, Layout* la, const void* b, Layout* lb, const void* beta, const void* c,
                   Layout* lc, void* d, Layout* ld, void*, void*, size_t, void*) {
    if (const int status = supported(m, la, lb, lc, ld)) return status;
    const i64 M = ld->rows, N = ld->columns, K = m->transpose_a ? la->rows : la->columns;
    if ((m->transpose_a ? la->columns : la->rows) != M || (m->transpose_b ? lb->rows : lb->columns) != N) return INVALID;
    if ((m->transpose_b ? lb->columns : lb->rows) != K || lc->rows != M || lc->columns != N) return INVALID;
    const double by = get(alpha, m->scale, 0), keep = get(beta, m->scale, 0);
    for (i64 batch = 0; batch < ld->batch; batch++) {
        const i64 in_a = batch * la->batch_step, in_b = batch * lb->batch_step, in_c = batch * lc->batch_step, in_d = batch * ld->batch_step;
        for (i64 n = 0; n < N; n++)
            for (i64 i = 0; i < M; i++) {
                double sum = 0;
                for (i64 k = 0; k < K; k++)
                    sum += get(a, la->type, in_a + (m->transpose_a ? k + i * la->step : i + k * la->step)) *
                           get(b, lb->type, in_b + (m->transpose_b ? n + k * lb->step : k + n * lb->step));
                sum *= by;
                if (keep != 0) sum += keep * get(c, lc->type, in_c + i + n * lc->step);
                if (m->epilogue == BIAS) sum += get(m->bias, ld->type, i);
                set(d, ld->type, in_d + i + n * ld->step, sum);
            }
    }
    for (i64 n = 0; m->epilogue == BGRADB && n < N; n++) {              // one number per column of D: op(B) summed over K
        double sum = 0;
        for (i64 k = 0; k < K; k++) sum += get(b, lb->type, m->transpose_b ? n + k * lb->step : k + n * lb->step);
        set(m->bias, ld->type, n, sum);
    }
    return SUCCESS;
}
}
