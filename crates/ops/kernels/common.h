// What the kernels share: conversions, sums over a warp and over a block, and the tensor cores' 16x8x16 product with the loads that
// feed it. Without nvcc (tools/dry-gpu) the product and the loads are done by exchange between the lanes, in the same layouts.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef __half f16;
typedef __nv_bfloat16 bf16;
#define WARP 32
#define FULL 0xffffffffu

template <class T> __device__ inline T narrow(float v) { return T(v); }
__device__ inline float wide(float v) { return v; }
__device__ inline float wide(f16 v) { return float(v); }
__device__ inline float wide(bf16 v) { return float(v); }

// Neighbours that are read and written as one: 16 bytes.
template <class T, int N = 16 / sizeof(T)> struct alignas(sizeof(T) * N) Vector {
    T v[N];
};

// Two values in one word, the first in the low half.
template <class T> __device__ inline unsigned pack(T low, T high) {
    T both[2] = {low, high};
    unsigned word;
    memcpy(&word, both, 4);
    return word;
}
template <class T> __device__ inline unsigned pack(float low, float high) { return pack<T>(narrow<T>(low), narrow<T>(high)); }
template <class T> __device__ inline unsigned word(const T *at) { return *reinterpret_cast<const unsigned *>(at); }

__device__ inline float warp_sum(float v) {
    for (int mask = WARP / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(FULL, v, mask);
    return v;
}

// The sum over a block of at most 1024 threads, whole warps; the same on all of them. `room` holds 32 floats.
__device__ inline float block_sum(float v, float *room) {
    v = warp_sum(v);
    __syncthreads();
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = v;
    __syncthreads();
    float sum = 0.0f;
    for (unsigned w = 0; w < blockDim.x / WARP; w++) sum += room[w];
    return sum;
}

// c (16, 8) += a (16, 16) b (16, 8), f32 sums (PTX ISA, mma.m16n8k16). With g = lane / 4 and t = lane % 4:
// c: rows g, g, g + 8, g + 8, columns 2t, 2t + 1, 2t, 2t + 1; a: words at (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); b: words of
// rows 2t and 2t + 8, column g.
template <class T> __device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
#ifdef __CUDACC__
template <> __device__ inline void multiply<f16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ inline void multiply<bf16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
template <class T> inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1}, all[WARP * 6];
    fiber_gather(mine, 6, all);
    auto half_of = [](unsigned word, int high) {
        T both[2];
        memcpy(both, &word, 4);
        return float(both[high]);
    };
    int lane = threadIdx.x % WARP;
    for (int e = 0; e < 4; e++) {
        int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 16; k++) {
            const unsigned *of_a = all + (row % 8 * 4 + k % 8 / 2) * 6, *of_b = all + (column * 4 + k % 8 / 2) * 6;
            c[e] += half_of(of_a[row / 8 + k / 8 * 2], k % 2) * half_of(of_b[4 + k / 8], k % 2);
        }
    }
}
#endif

// Operands b of two products side by side: columns n0.. and n0 + 8.. over k0..k0 + 16, from a tile in shared memory with `stride`
// elements between its rows: b[0], b[1] for the first, b[2], b[3] for the second. `by_rows`: column n is row n of the tile; otherwise row k
// of b is row k of the tile.
template <bool by_rows, class T> __device__ inline void load_b(unsigned (&b)[4], const T *tile, int stride, int n0, int k0) {
    int lane = threadIdx.x % WARP;
#ifdef __CUDACC__
    if (by_rows) {
        unsigned at = (unsigned)__cvta_generic_to_shared(tile + (n0 + lane / 16 * 8 + lane % 8) * stride + k0 + lane / 8 % 2 * 8);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at));
    } else {
        unsigned at = (unsigned)__cvta_generic_to_shared(tile + (k0 + lane % 16) * stride + n0 + lane / 16 * 8);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(at));
    }
#else
    int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        int n = n0 + i / 2 * 8 + g, k = k0 + i % 2 * 8 + 2 * t;
        b[i] = by_rows ? pack<T>(tile[n * stride + k], tile[n * stride + k + 1]) : pack<T>(tile[k * stride + n], tile[(k + 1) * stride + n]);
    }
#endif
}
