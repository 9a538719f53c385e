// cuBLASLt on a CPU: what of it `kernels/cuda/cublaslt.py` calls, with the types and numbers of NVIDIA's cublasLt.h.
//
// A product has several algorithms, which all compute the same. Each takes a time of its own, which only a clock here counts; some do
// not run. What is called wrongly is refused with a status, as cuBLASLt does.

#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

namespace {

enum Status { FINE = 0, NOT_INITIALISED = 1, INVALID = 7, UNSUPPORTED = 15 };
enum { REAL_32 = 0, REAL_64 = 1, BFLOAT16 = 14, COMPUTE_32 = 68, COMPUTE_64 = 70 };
enum { EPILOGUE_NONE = 1, EPILOGUE_BIAS = 4, EPILOGUE_SUMS = 512 };
constexpr int ALGORITHMS = 12;
constexpr uint64_t MAGIC = 0xc0b1a51700000000;

struct Layout { int type; uint64_t rows, columns; int64_t leading, step = 0; int32_t batch = 1; };
struct Description { int compute, scale; int32_t transpose_a = 0, transpose_b = 0; uint32_t epilogue = EPILOGUE_NONE; uint64_t bias = 0; };
struct Preference { uint64_t workspace = 0; uint32_t reductions = 7, alignments[4] = {256, 256, 256, 256}; };
struct Algorithm { uint64_t data[8]; };
struct Result { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; };

struct Behaviour {
    double seconds;         // of a product
    int reduction = 0;      // cublasLtReductionScheme_t
    uint64_t workspace = 0;  // that it needs
    uint32_t alignment = 2;  // of all matrices
    int state = FINE;       // what the heuristic says of it
    int status = FINE;      // what running it returns
    int check = FINE;       // what cublasLtMatmulAlgoCheck returns
};

std::mutex state;
Behaviour behaviours[ALGORITHMS];
long runs[ALGORITHMS], asked, checked;  // how often each ran, the heuristic was asked, and an algorithm was checked
double clock_seconds;
int sums_split = 1;  // whether products with sums split K

int number_of(const Algorithm& algorithm) {
    const uint64_t number = algorithm.data[0] ^ MAGIC;
    for (int i = 2; i < 8; i++)
        if (algorithm.data[i]) return -1;
    return number < ALGORITHMS && algorithm.data[1] == number * number ? int(number) : -1;
}

Algorithm numbered(int number) { return {{MAGIC ^ uint64_t(number), uint64_t(number) * number}}; }

size_t size_of(int type) { return type == REAL_64 ? 8 : type == REAL_32 ? 4 : type == BFLOAT16 ? 2 : 0; }

double get(const void* array, int type, int64_t i) {
    if (type == REAL_64) return static_cast<const double*>(array)[i];
    if (type == REAL_32) return static_cast<const float*>(array)[i];
    const uint32_t bits = uint32_t(static_cast<const uint16_t*>(array)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <typename T> void put(void* array, int type, int64_t i, T value) {
    if (type == REAL_64) static_cast<double*>(array)[i] = value;
    else if (type == REAL_32) static_cast<float*>(array)[i] = float(value);
    else {
        const float narrow = float(value);
        uint32_t bits;
        std::memcpy(&bits, &narrow, 4);
        const bool number = narrow == narrow;
        static_cast<uint16_t*>(array)[i] = number ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;  // to the nearest, ties to even
    }
}

// Whether the shapes, the types and the algorithm of a product fit together.
int fit(const Description& d, const Layout& a, const Layout& b, const Layout& c, const Layout& out) {
    const uint64_t rows = d.transpose_a ? a.columns : a.rows, depth = d.transpose_a ? a.rows : a.columns;
    const uint64_t columns = d.transpose_b ? b.rows : b.columns;
    if (depth != (d.transpose_b ? b.columns : b.rows) || rows != out.rows || columns != out.columns) return INVALID;
    if (c.rows != out.rows || c.columns != out.columns || c.type != out.type || a.type != b.type) return INVALID;
    for (const Layout* m : {&a, &b, &c, &out})
        if (m->leading < int64_t(m->rows) || m->batch != out.batch || !size_of(m->type)) return INVALID;
    const bool wide = a.type == REAL_64;
    if (d.compute != (wide ? COMPUTE_64 : COMPUTE_32) || d.scale != (wide ? REAL_64 : REAL_32)) return UNSUPPORTED;
    if (wide ? out.type != REAL_64 : out.type != REAL_32 && out.type != a.type) return UNSUPPORTED;
    if (d.epilogue == EPILOGUE_NONE) return FINE;
    if (wide || (d.epilogue != EPILOGUE_BIAS && (d.epilogue != EPILOGUE_SUMS || out.batch > 1))) return UNSUPPORTED;
    return d.bias ? FINE : INVALID;
}

template <typename T>
void multiply(
    const Description& d, T alpha, const char* a, const Layout& la, const char* b, const Layout& lb, T beta, const char* c,
    const Layout& lc, char* out, const Layout& lo
) {
    const int64_t M = lo.rows, N = lo.columns, K = d.transpose_a ? la.rows : la.columns;
    std::vector<T> left(M * K), sums(M), part(M);
    for (int64_t n = 0; n < lo.batch; n++) {
        const char *an = a + n * la.step * size_of(la.type), *bn = b + n * lb.step * size_of(lb.type);
        const char* cn = c + n * lc.step * size_of(lc.type);
        char* on = out + n * lo.step * size_of(lo.type);
        const int64_t down = d.transpose_a ? la.leading : 1, along = d.transpose_a ? 1 : la.leading;
        for (int64_t k = 0; k < K; k++)
            for (int64_t i = 0; i < M; i++) left[k * M + i] = T(get(an, la.type, i * down + k * along));
        for (int64_t j = 0; j < N; j++) {
            std::fill(sums.begin(), sums.end(), T(0));
            for (int64_t start = 0; start < K; start += 16) {  // which tensor cores sum at a time
                std::fill(part.begin(), part.end(), T(0));
                for (int64_t k = start; k < K && k < start + 16; k++) {
                    const T right = T(get(bn, lb.type, d.transpose_b ? j + k * lb.leading : k + j * lb.leading));
                    const T* column = &left[k * M];
                    for (int64_t i = 0; i < M; i++) part[i] += column[i] * right;
                }
                for (int64_t i = 0; i < M; i++) sums[i] += part[i];
            }
            for (int64_t i = 0; i < M; i++) {
                T value = alpha * sums[i];
                if (beta != 0) value += beta * T(get(cn, lc.type, i + j * lc.leading));
                if (d.epilogue == EPILOGUE_BIAS) value += T(get(reinterpret_cast<const void*>(d.bias), lo.type, i));
                put(on, lo.type, i + j * lo.leading, value);
            }
            if (d.epilogue == EPILOGUE_SUMS) {  // of B over K, one for each column of D
                double sum = 0;
                for (int64_t k = 0; k < K; k++) sum += get(bn, lb.type, d.transpose_b ? j + k * lb.leading : k + j * lb.leading);
                put(reinterpret_cast<void*>(d.bias), lo.type, j, sum);
            }
        }
    }
}

// Of tiles of 128 x 128 on 132 multiprocessors, where K is split as long as its parts are 512 or longer.
float waves(const Description& d, const Layout& a, const Layout& out) {
    const int64_t depth = d.transpose_a ? a.rows : a.columns, tiles = (out.rows + 127) / 128 * ((out.columns + 127) / 128) * out.batch;
    int64_t splits = 1;
    while (tiles * splits * 2 <= 132 && depth / (splits * 2) >= 512 && (sums_split || d.epilogue != EPILOGUE_SUMS)) splits *= 2;
    return float(tiles * splits) / 132;
}

template <typename T> int set(T& field, const void* value, size_t size) {
    if (size != sizeof(T)) return INVALID;
    std::memcpy(&field, value, size);
    return FINE;
}

template <typename T> int destroyed(T* object) {
    delete object;
    return FINE;
}

}  // namespace

extern "C" {

size_t cublasLtGetVersion() { return 130000; }

int cublasLtCreate(void** handle) {
    *handle = behaviours;
    return FINE;
}

int cublasLtMatmulDescCreate(Description** made, int compute, int scale) {
    *made = new Description{compute, scale};
    return FINE;
}

int cublasLtMatmulDescSetAttribute(Description* d, int attribute, const void* value, size_t size) {
    switch (attribute) {
        case 3: return set(d->transpose_a, value, size);
        case 4: return set(d->transpose_b, value, size);
        case 7: return set(d->epilogue, value, size);
        case 8: return set(d->bias, value, size);
    }
    return INVALID;
}

int cublasLtMatrixLayoutCreate(Layout** made, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    *made = new Layout{type, rows, columns, leading};
    return FINE;
}

int cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t size) {
    return attribute == 5 ? set(layout->batch, value, size) : attribute == 6 ? set(layout->step, value, size) : int(INVALID);
}

int cublasLtMatmulPreferenceCreate(Preference** made) {
    *made = new Preference;
    return FINE;
}

int cublasLtMatmulPreferenceDestroy(Preference* preference) { return destroyed(preference); }

int cublasLtMatmulPreferenceSetAttribute(Preference* p, int attribute, const void* value, size_t size) {
    if (attribute == 1) return set(p->workspace, value, size);
    if (attribute == 3) return set(p->reductions, value, size);
    return attribute >= 5 && attribute <= 8 ? set(p->alignments[attribute - 5], value, size) : int(INVALID);
}

int cublasLtMatmulAlgoGetHeuristic(
    void* handle, Description* d, Layout* a, Layout* b, Layout* c, Layout* out, Preference* p, int wanted, Result* results, int* count
) {
    if (handle != behaviours || wanted < 1) return INVALID;
    const int status = fit(*d, *a, *b, *c, *out);
    if (status) return status;
    const std::lock_guard<std::mutex> guard(state);
    asked++;
    *count = 0;
    for (int i = 0; i < ALGORITHMS && *count < wanted; i++) {
        const Behaviour& known = behaviours[i];
        bool usable = known.workspace <= p->workspace && (!known.reduction || known.reduction & p->reductions);
        for (uint32_t alignment : p->alignments) usable = usable && known.alignment <= alignment;
        if (usable) results[(*count)++] = {numbered(i), known.workspace, known.state, waves(*d, *a, *out)};
    }
    return *count ? FINE : UNSUPPORTED;
}

int cublasLtMatmulAlgoCheck(
    void* handle, Description* d, Layout* a, Layout* b, Layout* c, Layout* out, const Algorithm* algorithm, Result* result
) {
    const int number = number_of(*algorithm);
    if (handle != behaviours || number < 0) return INVALID;
    const int status = fit(*d, *a, *b, *c, *out);
    const std::lock_guard<std::mutex> guard(state);
    checked++;
    result->workspace = behaviours[number].workspace;
    result->state = FINE;
    return status ? status : behaviours[number].check;
}

int cublasLtMatmul(
    void* handle, Description* d, const void* alpha, const char* a, Layout* la, const char* b, Layout* lb, const void* beta, const char* c,
    Layout* lc, char* out, Layout* lo, const Algorithm* algorithm, void* workspace, size_t size, void*
) {
    const int number = number_of(*algorithm);
    if (handle != behaviours || number < 0) return INVALID;
    int status = fit(*d, *la, *lb, *lc, *lo);
    if (status) return status;
    {
        const std::lock_guard<std::mutex> guard(state);
        const Behaviour& known = behaviours[number];
        for (const char* m : {a, b, c, static_cast<const char*>(out)})
            if (reinterpret_cast<uintptr_t>(m) % known.alignment) return INVALID;
        if (known.workspace > size || (size && !workspace)) return INVALID;
        if (known.status) return known.status;
        runs[number]++;
        clock_seconds += known.seconds;
    }
    if (d->compute == COMPUTE_64)
        multiply(*d, *static_cast<const double*>(alpha), a, *la, b, *lb, *static_cast<const double*>(beta), c, *lc, out, *lo);
    else
        multiply(*d, *static_cast<const float*>(alpha), a, *la, b, *lb, *static_cast<const float*>(beta), c, *lc, out, *lo);
    return FINE;
}

// ------------------------------------------------------------------------------------------------------------------- for the tests
void emulated_reset() {  // the last three of twelve lie beyond the first eight that the heuristic gives for any product
    const std::lock_guard<std::mutex> guard(state);
    for (int i = 0; i < ALGORITHMS; i++) behaviours[i] = Behaviour{1e-6 * (12 - i)};
    behaviours[1].state = UNSUPPORTED;
    behaviours[2].status = UNSUPPORTED;
    behaviours[3] = {1e-8, 1};                   // the fastest of all, in an order of its own every time
    behaviours[4] = {4e-6, 2, 1 << 20};          // parts of K
    behaviours[5] = {3e-6, 4, 1 << 20};          // parts of K, rounded to the type of the result
    behaviours[6] = {2e-6, 0, uint64_t(1) << 40};  // more workspace than there is
    behaviours[7].alignment = 16;
    std::memset(runs, 0, sizeof runs);
    asked = checked = 0;
    clock_seconds = 0;
}

void emulated_set(int i, double seconds, int status, int check) {
    const std::lock_guard<std::mutex> guard(state);
    behaviours[i].seconds = seconds;
    behaviours[i].status = status;
    behaviours[i].check = check;
}

void emulated_split_sums(int splits) { sums_split = splits; }

long emulated_runs(int i) { return runs[i]; }
long emulated_asked() { return asked; }
long emulated_checked() { return checked; }
double emulated_clock() { return clock_seconds; }

}  // extern "C"

namespace {
const bool ready = (emulated_reset(), true);
}
