// A stand-in for libcublas: the products that candle asks for, with f32 sums for f16, bf16 and f32, f64 sums for f64.
#include "dry.h"

#include <string>
#include <vector>

namespace {
Type type_of(int cuda) {
    switch (cuda) {
    case 0: return Type::F32;
    case 1: return Type::F64;
    case 2: return Type::F16;
    case 14: return Type::BF16;
    }
    dry_refuse(("cuBLAS element type " + std::to_string(cuda)).c_str());
}

const char *label(Type t) {
    return t == Type::F16 ? "gemm f16" : t == Type::BF16 ? "gemm bf16" : t == Type::F64 ? "gemm f64" : "gemm f32";
}

// Row-major copy of op(A) (rows x cols) of a column-major matrix with leading dimension ld.
template <class T> std::vector<T> take(const void *data, Type t, bool transposed, size_t rows, size_t cols, size_t ld, size_t offset) {
    std::vector<T> out(rows * cols);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++) {
            size_t at = offset + (transposed ? i * ld + j : j * ld + i);
            out[i * cols + j] = t == Type::F64 ? T(static_cast<const double *>(data)[at]) : T(load(data, t, at));
        }
    return out;
}

template <class T>
void product(int ta, int tb, size_t m, size_t n, size_t k, T alpha, const void *a, Type at, size_t lda, long long sa, const void *b, Type bt, size_t ldb,
             long long sb, T beta, void *c, Type ct, size_t ldc, long long sc, int batch) {
    for (int i = 0; i < batch; i++) {
        auto left = take<T>(a, at, ta != 0, m, k, lda, size_t(i * sa));
        // b transposed, so that the inner loop runs along rows of C's transpose.
        auto right = take<T>(b, bt, tb == 0, n, k, ldb, size_t(i * sb));
        std::vector<T> column(m), lt(m * k);
        for (size_t r = 0; r < m; r++)
            for (size_t x = 0; x < k; x++) lt[x * m + r] = left[r * k + x];
        for (size_t j = 0; j < n; j++) {
            std::fill(column.begin(), column.end(), T(0));
            for (size_t x = 0; x < k; x++) {
                T factor = right[j * k + x];
                const T *row = &lt[x * m];
                for (size_t r = 0; r < m; r++) column[r] += factor * row[r];
            }
            for (size_t r = 0; r < m; r++) {
                size_t place = size_t(i * sc) + j * ldc + r;
                if (ct == Type::F64) {
                    auto &d = static_cast<double *>(c)[place];
                    d = alpha * column[r] + (beta != 0 ? beta * d : 0);
                } else {
                    store(c, ct, place, float(alpha * column[r]) + (beta != 0 ? float(beta) * load(c, ct, place) : 0.0f));
                }
            }
        }
    }
}
} // namespace

extern "C" {
int cublasCreate_v2(void **handle) { return *handle = new char, 0; }
int cublasDestroy_v2(void *handle) { return delete static_cast<char *>(handle), 0; }
int cublasSetStream_v2(void *, void *) { return 0; }
int cublasSetMathMode(void *, int) { return 0; }
int cublasSetWorkspace_v2(void *, void *, size_t) { return 0; }

int cublasGemmStridedBatchedEx(void *, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int at, int lda, long long sa, const void *b,
                               int bt, int ldb, long long sb, const void *beta, void *c, int ct, int ldc, long long sc, int batch, int compute, int) {
    // What the real library refuses.
    if (m < 0 || n < 0 || k < 0 || batch < 0 || lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m) return 7;
    dry_count(label(type_of(at)), size_t(2) * m * n * k * batch);
    if (!dry_computes()) return 0;
    // 64: f16 scalars, 70: f64, all others f32.
    float al = compute == 64 ? load(alpha, Type::F16, 0) : compute == 70 ? 0 : load(alpha, Type::F32, 0);
    float be = compute == 64 ? load(beta, Type::F16, 0) : compute == 70 ? 0 : load(beta, Type::F32, 0);
    if (compute == 70) dry_refuse("a product with f64 sums through cublasGemmStridedBatchedEx");
    product<float>(ta, tb, m, n, k, al, a, type_of(at), lda, sa, b, type_of(bt), ldb, sb, be, c, type_of(ct), ldc, sc, batch);
    return 0;
}

int cublasDgemmStridedBatched(void *, int ta, int tb, int m, int n, int k, const double *alpha, const double *a, int lda, long long sa, const double *b, int ldb,
                              long long sb, const double *beta, double *c, int ldc, long long sc, int batch) {
    if (lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m) return 7;
    dry_count(label(Type::F64), size_t(2) * m * n * k * batch);
    if (dry_computes())
        product<double>(ta, tb, m, n, k, *alpha, a, Type::F64, lda, sa, b, Type::F64, ldb, sb, *beta, c, Type::F64, ldc, sc, batch);
    return 0;
}
}
