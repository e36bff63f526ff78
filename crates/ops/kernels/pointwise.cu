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

// Two neighbours a thread; d is even. x is (rows, 2 d), y (rows, d): grid (d / 512, rows), 256 threads.
template <class T> __device__ void geglu(int d, const T *x, T *y) {
    int i = (blockIdx.x * blockDim.x + threadIdx.x) * 2;
    long long row = blockIdx.y;
    if (i >= d) return;
    const T *h = x + row * 2 * d + i, *gate = h + d;
    for (int e = 0; e < 2; e++) y[row * d + i + e] = narrow<T>(wide(h[e]) * gelu(wide(gate[e])));
}

template <class T> __device__ void geglu_grad(int d, const T *x, const T *dy, T *dx) {
    int i = (blockIdx.x * blockDim.x + threadIdx.x) * 2;
    long long row = blockIdx.y;
    if (i >= d) return;
    const T *h = x + row * 2 * d + i, *gate = h + d;
    T *dh = dx + row * 2 * d + i, *dgate = dh + d;
    for (int e = 0; e < 2; e++) {
        float g = wide(dy[row * d + i + e]), z = wide(gate[e]);
        dh[e] = narrow<T>(g * gelu(z));
        dgate[e] = narrow<T>(g * wide(h[e]) * gelu_grad(z));
    }
}

// y = x + b, where b has a value for each run of `run` elements and begins anew after `count` of them.
template <class T> __device__ void add_over(long long n, int run, int count, const T *x, const T *b, T *y) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = narrow<T>(wide(x[i]) + wide(b[i / run % count]));
}

// Groups of the small factor at most.
#define SIDE 16

// y (n, p, rest) = w (p, q) x (n, q, rest), added to `base` of y's shape if there is one. A thread for each item and place.
template <class T> __device__ void mix(long long n, int p, int q, long long rest, const float *w, const T *x, const T *base, T *y) {
    __shared__ float factor[SIDE * SIDE];
    for (int i = threadIdx.x; i < p * q; i += blockDim.x) factor[i] = w[i];
    __syncthreads();
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n * rest) return;
    long long item = at / rest, place = at % rest;
    float values[SIDE];
#pragma unroll
    for (int j = 0; j < SIDE; j++) values[j] = j < q ? wide(x[(item * q + j) * rest + place]) : 0.0f;
    for (int i = 0; i < p; i++) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < SIDE; j++)
            if (j < q) sum += factor[i * q + j] * values[j];
        long long to = (item * p + i) * rest + place;
        if (base) sum += wide(base[to]);
        y[to] = narrow<T>(sum);
    }
}

// Shares of dw (p, q) = sum over items and places of dy (n, p, rest) x (n, q, rest): `shares` is (blocks, p q). P and Q at least p and q.
// 256 threads; the places are dealt to the threads of all blocks in turn.
template <int P, int Q, class T> __device__ void mix_grad(long long n, int p, int q, long long rest, const T *dy, const T *x, float *shares) {
    __shared__ float room[8][P * Q];
    float sums[P][Q] = {};
    for (long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x; at < n * rest; at += (long long)gridDim.x * blockDim.x) {
        long long item = at / rest, place = at % rest;
        float values[Q];
#pragma unroll
        for (int j = 0; j < Q; j++) values[j] = j < q ? wide(x[(item * q + j) * rest + place]) : 0.0f;
#pragma unroll
        for (int i = 0; i < P; i++) {
            float g = i < p ? wide(dy[(item * p + i) * rest + place]) : 0.0f;
#pragma unroll
            for (int j = 0; j < Q; j++) sums[i][j] += g * values[j];
        }
    }
#pragma unroll
    for (int i = 0; i < P; i++)
#pragma unroll
        for (int j = 0; j < Q; j++) {
            float sum = warp_sum(sums[i][j]);
            if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP][i * Q + j] = sum;
        }
    __syncthreads();
    for (int at = threadIdx.x; at < p * q; at += blockDim.x) {
        float sum = 0.0f;
        for (unsigned w = 0; w < blockDim.x / WARP; w++) sum += room[w][at / q * Q + at % q];
        shares[(long long)blockIdx.x * p * q + at] = sum;
    }
}

#define KERNELS(T, NAME)                                                                                                                                       \
    extern "C" __global__ void activate_##NAME(long long n, int kind, const T *x, T *y) { activate(n, kind, x, y); }                                           \
    extern "C" __global__ void activate_grad_##NAME(long long n, int kind, const T *x, const T *dy, T *dx) { activate_grad(n, kind, x, dy, dx); }              \
    extern "C" __global__ void geglu_##NAME(int d, const T *x, T *y) { geglu(d, x, y); }                                                                       \
    extern "C" __global__ void geglu_grad_##NAME(int d, const T *x, const T *dy, T *dx) { geglu_grad(d, x, dy, dx); }                                          \
    extern "C" __global__ void add_over_##NAME(long long n, int run, int count, const T *x, const T *b, T *y) { add_over(n, run, count, x, b, y); }             \
    extern "C" __global__ void mix_##NAME(long long n, int p, int q, long long rest, const float *w, const T *x, const T *base, T *y) {                        \
        mix(n, p, q, rest, w, x, base, y);                                                                                                                     \
    }                                                                                                                                                          \
    extern "C" __global__ void mix_grad_4_##NAME(long long n, int p, int q, long long rest, const T *dy, const T *x, float *shares) {                          \
        mix_grad<4, 4>(n, p, q, rest, dy, x, shares);                                                                                                          \
    }                                                                                                                                                          \
    extern "C" __global__ void mix_grad_8_##NAME(long long n, int p, int q, long long rest, const T *dy, const T *x, float *shares) {                          \
        mix_grad<8, 8>(n, p, q, rest, dy, x, shares);                                                                                                          \
    }
KERNELS(float, f32)
KERNELS(f16, f16)
KERNELS(bf16, bf16)
