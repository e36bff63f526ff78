// Lets a .cu file compile for the host: the keywords, the built-in variables, f16 with a rounding after every operation, and
// the intrinsics that the kernels use. A block's threads run one after another; where a kernel has barriers or shuffles they
// are fibers, switched at each of these (fiber.cpp). Blocks run one after another, so `__shared__` is plain static memory.
#pragma once
#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
// Below 800, so that kernels of bf16 and fp8, whose types are not modelled here, are left out.
#define __CUDA_ARCH__ 750
#define __host__
#define __device__
#define __global__ __attribute__((annotate_global))
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static
#define __constant__ static
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__

struct Dim3 {
    unsigned x, y, z;
};
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// fiber.cpp
void fiber_block_barrier();
// Exchanges a word between the threads of a warp: gives what the thread `lane ^ mask` of this warp has put in.
uint64_t fiber_shuffle_xor(uint64_t value, int mask);
// Gives all lanes of the warp what each has put in: `count` words of lane 0, then of lane 1, and so on.
void fiber_gather(const uint32_t *mine, int count, uint32_t *all);
inline void __syncthreads() { fiber_block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffff) { fiber_shuffle_xor(0, 0); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
    static_assert(sizeof(T) <= 8);
    uint64_t word = 0;
    memcpy(&word, &value, sizeof(T));
    word = fiber_shuffle_xor(word, mask);
    memcpy(&value, &word, sizeof(T));
    return value;
}

using std::isinf;
using std::isnan;
using std::max;
using std::min;
using std::signbit;
inline unsigned max(unsigned a, int b) { return std::max<unsigned>(a, b); }
inline unsigned long min(unsigned long a, unsigned b) { return std::min<unsigned long>(a, b); }
inline unsigned min(unsigned a, unsigned long b) { return unsigned(std::min<unsigned long>(a, b)); }
inline int64_t min(int64_t a, int b) { return std::min<int64_t>(a, b); }
inline unsigned long min(unsigned long a, int b) { return std::min<unsigned long>(a, b); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }
inline float normcdff(float a) { return 0.5f * erfcf(-a * 0.70710678118654752f); }
inline double normcdf(double a) { return 0.5 * erfc(-a * 0.70710678118654752); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
template <class To, class From> To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }
inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline int __float_as_int(float v) { return bits_as<int>(v); }
inline double __longlong_as_double(long long v) { return bits_as<double>(v); }
inline long long __double_as_longlong(double v) { return bits_as<long long>(v); }

template <class T, class V> T atomicAdd(T *to, V value) {
    T old = *to;
    *to = T(old + T(value));
    return old;
}
template <class T, class V> T atomicMin(T *to, V value) {
    T old = *to;
    *to = std::min(old, T(value));
    return old;
}
template <class T, class V> T atomicMax(T *to, V value) {
    T old = *to;
    *to = std::max(old, T(value));
    return old;
}
template <class T, class E, class V> T atomicCAS(T *to, E expected, V value) {
    T old = *to;
    if (old == T(expected)) *to = T(value);
    return old;
}
