// Attention of heads of 64 features in f16 or bf16 on the tensor cores, forward and backward, in tiles: no score leaves the chip (Dao 2023,
// FlashAttention-2). The backward pass takes two kernels, one by queries and one by keys, so that no sum is formed by atomics and the
// result does not depend on the order of blocks. Launched by src/gpu/attention.rs.
//
// q, k, v, their gradients and the output are (n, tokens, heads * 64). `lse` and `delta` are (n, heads, tq): for each query the base-2
// logarithm of the sum of its scaled exponentials, and the product of output and its gradient.
#include "common.h"

#define D 64
// Elements between the rows of a tile: 16 bytes more than a row, so that eight rows lie in different banks.
#define STRIDE 72
#define QUERIES 64
#define KEYS 64
// Of the backward pass.
#define TILE 32
#define LOG2E 1.44269504088896340736f

struct Attention {
    int heads, tq, tk, causal;
    float scale;
};

// `rows` rows of one head from `from` on into a tile; rows beyond the end are zero. 128 threads.
template <int rows, class T> __device__ inline void load_tile(T *tile, const T *head, long long inner, int from, int tokens) {
    for (int i = threadIdx.x; i < rows * D / 8; i += 128) {
        int row = i / (D / 8), at = i % (D / 8) * 8;
        uint4 *to = reinterpret_cast<uint4 *>(tile + row * STRIDE + at);
        if (from + row < tokens) {
            *to = *reinterpret_cast<const uint4 *>(head + (from + row) * inner + at);
        } else {
            *to = make_uint4(0, 0, 0, 0);
        }
    }
}

// The 16 rows from `row` on of a head as operands a, for the four steps of 16 over its 64 features.
template <class T> __device__ inline void load_a(unsigned (&a)[4][4], const T *head, long long inner, int row, int tokens) {
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    for (int step = 0; step < 4; step++)
        for (int i = 0; i < 4; i++) {
            int r = row + g + i % 2 * 8;
            a[step][i] = r < tokens ? word(head + r * inner + step * 16 + i / 2 * 8 + 2 * t) : 0;
        }
}

// s (16, 8 tiles) = a (16, 64) tile^T, the tile's rows being the columns of s.
template <int tiles, class T> __device__ inline void scores(float (&s)[tiles][4], const unsigned (&a)[4][4], const T *tile) {
    for (int i = 0; i < tiles; i++)
        for (int e = 0; e < 4; e++) s[i][e] = 0.0f;
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
        for (int i = 0; i < tiles; i += 2) {
            unsigned b[4];
            load_b<true>(b, tile, STRIDE, i * 8, step * 16);
            multiply<T>(s[i], a[step], b[0], b[1]);
            multiply<T>(s[i + 1], a[step], b[2], b[3]);
        }
}

// out (16, 64) += p (16, 8 tiles) tile, the tile's rows being the columns of p.
template <int tiles, class T> __device__ inline void gather(float (&out)[8][4], const float (&p)[tiles][4], const T *tile) {
#pragma unroll
    for (int step = 0; step < tiles / 2; step++) {
        const float(&left)[4] = p[2 * step], (&right)[4] = p[2 * step + 1];
        unsigned a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            unsigned b[4];
            load_b<false>(b, tile, STRIDE, i * 8, step * 16);
            multiply<T>(out[i], a, b[0], b[1]);
            multiply<T>(out[i + 1], a, b[2], b[3]);
        }
    }
}

// Writes rows `row + g` and `row + g + 8` of a product, each times its factor.
template <class T> __device__ inline void store(T *head, long long inner, int row, int tokens, const float (&out)[8][4], float first, float second) {
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    for (int e = 0; e < 4; e += 2) {
        int r = row + g + e / 2 * 8;
        float factor = e == 0 ? first : second;
        if (r >= tokens) continue;
        for (int i = 0; i < 8; i++)
            *reinterpret_cast<unsigned *>(head + r * inner + i * 8 + 2 * t) = pack<T>(out[i][e] * factor, out[i][e + 1] * factor);
    }
}

__device__ inline bool hidden(const Attention &s, int query, int key) { return key >= s.tk || query >= s.tq || (s.causal && key > query); }

// 2^x; below the smallest normal number, which no probability shows, 0.
__device__ inline float power_of_2(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// Grid (queries / 64, heads, n), 128 threads; each warp has 16 queries.
template <class T> __device__ void forward(Attention s, const T *q, const T *k, const T *v, T *out, float *lse) {
    __shared__ __align__(16) T keys[KEYS * STRIDE];
    __shared__ __align__(16) T values[KEYS * STRIDE];
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    long long inner = (long long)s.heads * D, queries_at = (long long)blockIdx.z * s.tq * inner + blockIdx.y * D;
    long long keys_at = (long long)blockIdx.z * s.tk * inner + blockIdx.y * D;
    int first = blockIdx.x * QUERIES, row = first + threadIdx.x / WARP * 16;
    unsigned a[4][4];
    load_a(a, q + queries_at, inner, row, s.tq);
    float o[8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, scale = s.scale * LOG2E;
    int end = s.causal ? min(s.tk, first + QUERIES) : s.tk;
    for (int from = 0; from < end; from += KEYS) {
        __syncthreads();
        load_tile<KEYS>(keys, k + keys_at, inner, from, s.tk);
        load_tile<KEYS>(values, v + keys_at, inner, from, s.tk);
        __syncthreads();
        float p[8][4];
        scores(p, a, keys);
        bool whole = from + KEYS <= s.tk && !s.causal;
        float most[2] = {top[0], top[1]};
        for (int i = 0; i < 8; i++)
            for (int e = 0; e < 4; e++) {
                p[i][e] *= scale;
                if (!whole && (from + i * 8 + 2 * t + e % 2 >= s.tk || (s.causal && from + i * 8 + 2 * t + e % 2 > row + g + e / 2 * 8))) p[i][e] = -INFINITY;
                most[e / 2] = fmaxf(most[e / 2], p[i][e]);
            }
        for (int r = 0; r < 2; r++) {
            most[r] = fmaxf(most[r], __shfl_xor_sync(FULL, most[r], 1));
            most[r] = fmaxf(most[r], __shfl_xor_sync(FULL, most[r], 2));
            float shrink = top[r] == -INFINITY ? 0.0f : power_of_2(top[r] - most[r]);
            sum[r] *= shrink;
            for (int i = 0; i < 8; i++) {
                o[i][2 * r] *= shrink;
                o[i][2 * r + 1] *= shrink;
            }
            top[r] = most[r];
        }
        for (int i = 0; i < 8; i++)
            for (int e = 0; e < 4; e++) {
                p[i][e] = power_of_2(p[i][e] - top[e / 2]);
                sum[e / 2] += p[i][e];
            }
        gather(o, p, values);
    }
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(FULL, sum[r], 1);
        sum[r] += __shfl_xor_sync(FULL, sum[r], 2);
        int query = row + g + r * 8;
        if (t == 0 && query < s.tq) lse[((long long)blockIdx.z * s.heads + blockIdx.y) * s.tq + query] = top[r] + log2f(sum[r]);
    }
    store(out + queries_at, inner, row, s.tq, o, 1.0f / sum[0], 1.0f / sum[1]);
}

// A warp for each query of each head.
template <class T> __device__ void products(Attention s, long long count, const T *out, const T *dy, float *delta) {
    long long i = (long long)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (i >= count) return;
    int lane = threadIdx.x % WARP;
    // (n, tq, heads) is how the tensors lie, (n, heads, tq) how the sums do.
    long long head = i % s.heads, query = i / s.heads % s.tq, item = i / s.heads / s.tq, at = i * D + 2 * lane;
    float sum = warp_sum(wide(out[at]) * wide(dy[at]) + wide(out[at + 1]) * wide(dy[at + 1]));
    if (lane == 0) delta[(item * s.heads + head) * s.tq + query] = sum;
}

// The gradient of q. Grid and warps as in `forward`.
template <class T>
__device__ void queries_grad(Attention s, const T *q, const T *k, const T *v, const T *dy, const float *lse, const float *delta, T *dq) {
    __shared__ __align__(16) T keys[TILE * STRIDE];
    __shared__ __align__(16) T values[TILE * STRIDE];
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    long long inner = (long long)s.heads * D, queries_at = (long long)blockIdx.z * s.tq * inner + blockIdx.y * D;
    long long keys_at = (long long)blockIdx.z * s.tk * inner + blockIdx.y * D, sums_at = ((long long)blockIdx.z * s.heads + blockIdx.y) * s.tq;
    int first = blockIdx.x * QUERIES, row = first + threadIdx.x / WARP * 16;
    unsigned a[4][4], da[4][4];
    load_a(a, q + queries_at, inner, row, s.tq);
    load_a(da, dy + queries_at, inner, row, s.tq);
    float l[2], d[2], scale = s.scale * LOG2E;
    for (int r = 0; r < 2; r++) {
        int query = row + g + r * 8;
        l[r] = query < s.tq ? lse[sums_at + query] : 0.0f;
        d[r] = query < s.tq ? delta[sums_at + query] : 0.0f;
    }
    float sum[8][4] = {};
    int end = s.causal ? min(s.tk, first + QUERIES) : s.tk;
    for (int from = 0; from < end; from += TILE) {
        __syncthreads();
        load_tile<TILE>(keys, k + keys_at, inner, from, s.tk);
        load_tile<TILE>(values, v + keys_at, inner, from, s.tk);
        __syncthreads();
        float p[TILE / 8][4], ds[TILE / 8][4];
        scores(p, a, keys);
        scores(ds, da, values);
        bool whole = from + TILE <= s.tk && first + QUERIES <= s.tq && !s.causal;
        for (int i = 0; i < TILE / 8; i++)
            for (int e = 0; e < 4; e++) {
                bool none = !whole && hidden(s, row + g + e / 2 * 8, from + i * 8 + 2 * t + e % 2);
                ds[i][e] = none ? 0.0f : power_of_2(p[i][e] * scale - l[e / 2]) * (ds[i][e] - d[e / 2]) * s.scale;
            }
        gather(sum, ds, keys);
    }
    store(dq + queries_at, inner, row, s.tq, sum, 1.0f, 1.0f);
}

// The gradients of k and v. Grid (keys / 64, heads, n), 128 threads; each warp has 16 keys.
template <class T>
__device__ void keys_grad(Attention s, const T *q, const T *k, const T *v, const T *dy, const float *lse, const float *delta, T *dk, T *dv) {
    __shared__ __align__(16) T queries[TILE * STRIDE];
    __shared__ __align__(16) T grads[TILE * STRIDE];
    __shared__ float l[TILE], d[TILE];
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    long long inner = (long long)s.heads * D, queries_at = (long long)blockIdx.z * s.tq * inner + blockIdx.y * D;
    long long keys_at = (long long)blockIdx.z * s.tk * inner + blockIdx.y * D, sums_at = ((long long)blockIdx.z * s.heads + blockIdx.y) * s.tq;
    int first = blockIdx.x * KEYS, row = first + threadIdx.x / WARP * 16;
    unsigned a[4][4], va[4][4];
    load_a(a, k + keys_at, inner, row, s.tk);
    load_a(va, v + keys_at, inner, row, s.tk);
    float dk_sum[8][4] = {}, dv_sum[8][4] = {}, scale = s.scale * LOG2E;
    for (int from = s.causal ? first : 0; from < s.tq; from += TILE) {
        __syncthreads();
        load_tile<TILE>(queries, q + queries_at, inner, from, s.tq);
        load_tile<TILE>(grads, dy + queries_at, inner, from, s.tq);
        if (threadIdx.x < TILE) {
            int query = from + threadIdx.x;
            l[threadIdx.x] = query < s.tq ? lse[sums_at + query] : 0.0f;
            d[threadIdx.x] = query < s.tq ? delta[sums_at + query] : 0.0f;
        }
        __syncthreads();
        // Transposed: rows are keys, columns queries.
        float p[TILE / 8][4], ds[TILE / 8][4];
        scores(p, a, queries);
        bool whole = from + TILE <= s.tq && first + KEYS <= s.tk && !s.causal;
        for (int i = 0; i < TILE / 8; i++)
            for (int e = 0; e < 4; e++) {
                int at = i * 8 + 2 * t + e % 2;
                bool none = !whole && hidden(s, from + at, row + g + e / 2 * 8);
                p[i][e] = none ? 0.0f : power_of_2(p[i][e] * scale - l[at]);
            }
        gather(dv_sum, p, grads);
        scores(ds, va, grads);
        for (int i = 0; i < TILE / 8; i++)
            for (int e = 0; e < 4; e++) ds[i][e] = p[i][e] * (ds[i][e] - d[i * 8 + 2 * t + e % 2]) * s.scale;
        gather(dk_sum, ds, queries);
    }
    store(dk + keys_at, inner, row, s.tk, dk_sum, 1.0f, 1.0f);
    store(dv + keys_at, inner, row, s.tk, dv_sum, 1.0f, 1.0f);
}

extern "C" __global__ void __launch_bounds__(128) attention_f16(Attention s, const f16 *q, const f16 *k, const f16 *v, f16 *out, float *lse) {
    forward(s, q, k, v, out, lse);
}
extern "C" __global__ void __launch_bounds__(128) attention_bf16(Attention s, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *lse) {
    forward(s, q, k, v, out, lse);
}
extern "C" __global__ void attention_products_f16(Attention s, long long count, const f16 *out, const f16 *dy, float *delta) {
    products(s, count, out, dy, delta);
}
extern "C" __global__ void attention_products_bf16(Attention s, long long count, const bf16 *out, const bf16 *dy, float *delta) {
    products(s, count, out, dy, delta);
}
extern "C" __global__ void __launch_bounds__(128)
    attention_queries_grad_f16(Attention s, const f16 *q, const f16 *k, const f16 *v, const f16 *dy, const float *lse, const float *delta, f16 *dq) {
    queries_grad(s, q, k, v, dy, lse, delta, dq);
}
extern "C" __global__ void __launch_bounds__(128)
    attention_queries_grad_bf16(Attention s, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dy, const float *lse, const float *delta, bf16 *dq) {
    queries_grad(s, q, k, v, dy, lse, delta, dq);
}
extern "C" __global__ void __launch_bounds__(128)
    attention_keys_grad_f16(Attention s, const f16 *q, const f16 *k, const f16 *v, const f16 *dy, const float *lse, const float *delta, f16 *dk, f16 *dv) {
    keys_grad(s, q, k, v, dy, lse, delta, dk, dv);
}
extern "C" __global__ void __launch_bounds__(128) attention_keys_grad_bf16(
    Attention s, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dy, const float *lse, const float *delta, bf16 *dk, bf16 *dv) {
    keys_grad(s, q, k, v, dy, lse, delta, dk, dv);
}
