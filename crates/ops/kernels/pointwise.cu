// Activations and GEGLU, forward and backward, and the small factor of a Kronecker product over groups with its gradient: arithmetic in
// f32 whatever the type of the data, rounded once. Launched by src/gpu/pointwise.rs and src/gpu/mix.rs.
#include "common.h"

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
__device__ inline float gelu_grad(float x) { return 0.5f * (1.0f + erff(x * 0.70710678118654752f)) + x * 0.3989422804014327f * expf(-0.5f * x * x); }

// `kind` 0: x sigmoid(x); 1: x sigmoid(1.702 x); 2: x Phi(x).
__device__ inline float activation(int kind, float x) { return kind == 2 ? gelu(x) : x * sigmoid(kind == 1 ? 1.702f * x : x); }
__device__ inline float activation_grad(int kind, float x) {
    if (kind == 2) return gelu_grad(x);
    float k = kind == 1 ? 1.702f : 1.0f, s = sigmoid(k * x);
    return s * (1.0f + k * x * (1.0f - s));
}

template <class T> __device__ void activate(long long n, int kind, const T *x, T *y) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = narrow<T>(activation(kind, wide(x[i])));
}

template <class T> __device__ void activate_grad(long long n, int kind, const T *x, const T *dy, T *dx) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) dx[i] = narrow<T>(wide(dy[i]) * activation_grad(kind, wide(x[i])));
}

// Two neighbours a thread; d is even. x is (rows, 2 d), y (rows, d): grid (rows, d / 512), 256 threads.
template <class T> __device__ void geglu(int d, const T *x, T *y) {
    int i = (blockIdx.y * blockDim.x + threadIdx.x) * 2;
    long long row = blockIdx.x;
    if (i >= d) return;
    const T *h = x + row * 2 * d + i, *gate = h + d;
    for (int e = 0; e < 2; e++) y[row * d + i + e] = narrow<T>(wide(h[e]) * gelu(wide(gate[e])));
}

template <class T> __device__ void geglu_grad(int d, const T *x, const T *dy, T *dx) {
    int i = (blockIdx.y * blockDim.x + threadIdx.x) * 2;
    long long row = blockIdx.x;
    if (i >= d) return;
    const T *h = x + row * 2 * d + i, *gate = h + d;
    T *dh = dx + row * 2 * d + i, *dgate = dh + d;
    for (int e = 0; e < 2; e++) {
        float g = wide(dy[row * d + i + e]), z = wide(gate[e]);
        dh[e] = narrow<T>(g * gelu(z));
        dgate[e] = narrow<T>(g * wide(h[e]) * gelu_grad(z));
    }
}

// Here and below a thread has N neighbours, whose number the sizes are multiples of.

// y = a + b.
template <int N, class T> __device__ void add(int n, const T *a, const T *b, T *y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n / N) return;
    auto left = reinterpret_cast<const Vector<T, N> *>(a)[i], right = reinterpret_cast<const Vector<T, N> *>(b)[i];
    for (int e = 0; e < N; e++) left.v[e] = narrow<T>(wide(left.v[e]) + wide(right.v[e]));
    reinterpret_cast<Vector<T, N> *>(y)[i] = left;
}

// Place i of x takes which place of a bias that has a value for each run of `run` elements and begins anew after `count` of them.
__device__ inline int place_in_bias(int i, int run, int count) { return (run == 1 ? i : i / run) % count; }

// y = x + b. A run is 1 or a multiple of N.
template <int N, class T> __device__ void add_over(int n, int run, int count, const T *x, const T *b, T *y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n / N) return;
    auto values = reinterpret_cast<const Vector<T, N> *>(x)[i];
    int first = place_in_bias(i * N, run, count);
    for (int e = 0; e < N; e++) values.v[e] = narrow<T>(wide(values.v[e]) + wide(b[run == 1 ? first + e : first]));
    reinterpret_cast<Vector<T, N> *>(y)[i] = values;
}

// The small factor w (p, q), its rows and columns `row` and `column` elements apart, times `scale`.
struct Factor {
    int p, q, row, column;
    float scale;
};

// y (n, p, rest) = w x for x (n, q, rest), Q at least q; added to `base` of y's shape if there is one, and to a bias over y's last two
// dimensions if there is one.
template <int Q, int N, class T>
__device__ void mix(int n, Factor f, int rest, int run, const float *w, const T *x, const T *base, const T *bias, T *y) {
    __shared__ float factor[16 * Q];
    for (int i = threadIdx.x; i < f.p * Q; i += blockDim.x) factor[i] = i % Q < f.q ? w[i / Q * f.row + i % Q * f.column] * f.scale : 0.0f;
    __syncthreads();
    int at = blockIdx.x * blockDim.x + threadIdx.x, places = rest / N;
    if (at >= n * places) return;
    int item = at / places, place = at % places * N;
    float values[Q][N];
#pragma unroll
    for (int j = 0; j < Q; j++) {
        if (j >= f.q) break;
        auto from = *reinterpret_cast<const Vector<T, N> *>(x + (item * f.q + j) * (long long)rest + place);
        for (int e = 0; e < N; e++) values[j][e] = wide(from.v[e]);
    }
    for (int i = 0; i < f.p; i++) {
        float sums[N] = {};
#pragma unroll
        for (int j = 0; j < Q; j++) {
            if (j >= f.q) break;
            for (int e = 0; e < N; e++) sums[e] += factor[i * Q + j] * values[j][e];
        }
        long long to = (item * f.p + i) * (long long)rest + place;
        if (base) {
            auto more = *reinterpret_cast<const Vector<T, N> *>(base + to);
            for (int e = 0; e < N; e++) sums[e] += wide(more.v[e]);
        }
        if (bias) {
            int first = i * rest + place;
            for (int e = 0; e < N; e++) sums[e] += wide(bias[run == 1 ? first + e : run % N == 0 ? first / run : (first + e) / run]);
        }
        Vector<T, N> out;
        for (int e = 0; e < N; e++) out.v[e] = narrow<T>(sums[e]);
        *reinterpret_cast<Vector<T, N> *>(y + to) = out;
    }
}

// Shares of dw (p, q) = sum over items and places of dy (n, p, rest) x (n, q, rest): `shares` is (blocks, p q). S at least p and q.
// 256 threads; the places are dealt to the threads of all blocks in turn.
template <int S, int N, class T> __device__ void mix_grad(int n, int p, int q, int rest, const T *dy, const T *x, float *shares) {
    __shared__ float room[8][S * S];
    float sums[S][S] = {};
    int places = rest / N;
    for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < n * places; at += gridDim.x * blockDim.x) {
        int item = at / places, place = at % places * N;
        Vector<T, N> values[S];
#pragma unroll
        for (int j = 0; j < S; j++)
            if (j < q) values[j] = *reinterpret_cast<const Vector<T, N> *>(x + (item * q + j) * (long long)rest + place);
#pragma unroll
        for (int i = 0; i < S; i++) {
            if (i >= p) break;
            auto g = *reinterpret_cast<const Vector<T, N> *>(dy + (item * p + i) * (long long)rest + place);
#pragma unroll
            for (int j = 0; j < S; j++)
                if (j < q)
                    for (int e = 0; e < N; e++) sums[i][j] += wide(g.v[e]) * wide(values[j].v[e]);
        }
    }
#pragma unroll
    for (int i = 0; i < S; i++)
#pragma unroll
        for (int j = 0; j < S; j++) {
            float sum = warp_sum(sums[i][j]);
            if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP][i * S + j] = sum;
        }
    __syncthreads();
    for (int at = threadIdx.x; at < p * q; at += blockDim.x) {
        float sum = 0.0f;
        for (unsigned w = 0; w < blockDim.x / WARP; w++) sum += room[w][at / q * S + at % q];
        shares[(long long)blockIdx.x * p * q + at] = sum;
    }
}

#define KERNELS(T, NAME)                                                                                                                            \
    extern "C" __global__ void activate_##NAME(long long n, int kind, const T *x, T *y) { activate(n, kind, x, y); }                                \
    extern "C" __global__ void activate_grad_##NAME(long long n, int kind, const T *x, const T *dy, T *dx) { activate_grad(n, kind, x, dy, dx); }   \
    extern "C" __global__ void geglu_##NAME(int d, const T *x, T *y) { geglu(d, x, y); }                                                            \
    extern "C" __global__ void geglu_grad_##NAME(int d, const T *x, const T *dy, T *dx) { geglu_grad(d, x, dy, dx); }                               \
    SIZED(1, 1, 1, T, NAME)                                                                                                                         \
    SIZED(16, 16 / sizeof(T), 8 / sizeof(T), T, NAME)

// For sizes that are multiples of 16 bytes, and for any. `mix_grad` holds many sums, and reads less at a time.
#define SIZED(BYTES, N, FEW, T, NAME)                                                                                                               \
    extern "C" __global__ void add_##BYTES##_##NAME(int n, const T *a, const T *b, T *y) { add<N>(n, a, b, y); }                                    \
    extern "C" __global__ void add_over_##BYTES##_##NAME(int n, int run, int count, const T *x, const T *b, T *y) {                                 \
        add_over<N>(n, run, count, x, b, y);                                                                                                        \
    }                                                                                                                                               \
    MIX(4, BYTES, N, FEW, T, NAME)                                                                                                                  \
    MIX(8, BYTES, N, FEW, T, NAME)                                                                                                                  \
    extern "C" __global__ void mix_16_##BYTES##_##NAME(int n, Factor f, int rest, int run, const float *w, const T *x, const T *base, const T *bias, \
                                                       T *y) {                                                                                      \
        mix<16, FEW>(n, f, rest, run, w, x, base, bias, y);                                                                                         \
    }

#define MIX(SIDE, BYTES, N, FEW, T, NAME)                                                                                                                  \
    extern "C" __global__ void mix_##SIDE##_##BYTES##_##NAME(int n, Factor f, int rest, int run, const float *w, const T *x, const T *base, const T *bias, \
                                                             T *y) {                                                                                       \
        mix<SIDE, N>(n, f, rest, run, w, x, base, bias, y);                                                                                                \
    }                                                                                                                                                      \
    extern "C" __global__ void mix_grad_##SIDE##_##BYTES##_##NAME(int n, int p, int q, int rest, const T *dy, const T *x, float *shares) {                 \
        mix_grad<SIDE, FEW>(n, p, q, rest, dy, x, shares);                                                                                                 \
    }

KERNELS(float, f32)
KERNELS(f16, f16)
KERNELS(bf16, bf16)
