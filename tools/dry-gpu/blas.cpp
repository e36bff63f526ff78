// A stand-in for libcublas: the products that candle asks for, with f32 sums for f16, bf16 and f32, f64 sums for f64.
#include "dry.h"
#include "gemm.h"

#include <string>

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

template <class T, class E> T number(const void *data, size_t at) { return T(static_cast<const E *>(data)[at]); }
template <class T> T (*reader(Type t))(const void *, size_t) {
    if (t == Type::F16) return number<T, _Float16>;
    if (t == Type::F32) return number<T, float>;
    if (t == Type::F64) return number<T, double>;
    return [](const void *data, size_t at) { return T(load(data, Type::BF16, at)); };
}

template <class T>
void product(int ta, int tb, size_t m, size_t n, size_t k, T alpha, const void *a, Type at, size_t lda, long long sa, const void *b, Type bt, size_t ldb,
             long long sb, T beta, void *c, Type ct, size_t ldc, long long sc, int batch) {
    auto left = reader<T>(at), right = reader<T>(bt);
    for (size_t i = 0; i < size_t(batch); i++) {
        auto in_a = [&](size_t r, size_t x) { return left(a, i * sa + (ta ? r * lda + x : x * lda + r)); };
        auto in_b = [&](size_t x, size_t j) { return right(b, i * sb + (tb ? x * ldb + j : j * ldb + x)); };
        auto out = [&](size_t r, size_t j, T sum) {
            size_t place = i * sc + j * ldc + r;
            if (ct == Type::F64) {
                auto &d = static_cast<double *>(c)[place];
                d = alpha * sum + (beta != 0 ? beta * d : 0);
            } else {
                store(c, ct, place, float(alpha * sum) + (beta != 0 ? float(beta) * load(c, ct, place) : 0.0f));
            }
        };
        // The longer side is the one whose sums stand side by side.
        if (m >= n) gemm<T>(m, n, k, in_a, in_b, out);
        else gemm<T>(n, m, k, [&](size_t j, size_t x) { return in_b(x, j); }, [&](size_t x, size_t r) { return in_a(r, x); }, [&](size_t j, size_t r, T sum) { out(r, j, sum); });
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
