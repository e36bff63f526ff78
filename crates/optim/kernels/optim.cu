// The optimizer step on the device: Lion8bit and Lion in one pass over parameter, gradient and momentum, and the sums of squares
// from which the gradient's norm follows. Launched by src/cuda.rs.
#include "lion8bit.h"

// A block of threads for each block of 256 elements. The largest magnitude is taken on the bits of the non-negative floats, whose
// order is that of the floats; a maximum does not depend on the order in which it is formed.
extern "C" __global__ void lion8bit(unsigned long long n, LionRule rule, const float *values, float *p, const float *g, unsigned char *codes, float *absmax) {
    __shared__ float map[256];
    __shared__ int largest[8];
    int t = threadIdx.x;
    map[t] = values[t];
    __syncthreads();
    unsigned long long start = (unsigned long long)blockIdx.x * LION_BLOCK, i = start + t;
    bool in = i < n;
    float before = absmax[blockIdx.x], m = 0.0f;
    if (in) {
        float value = p[i];
        m = map[codes[i]] * before;
        lion_element(rule, value, lion_gradient(rule, g[i]), m);
        p[i] = value;
    }
    int bits = __float_as_int(fabsf(m));
    for (int mask = 16; mask > 0; mask /= 2) bits = max(bits, __shfl_xor_sync(0xffffffff, bits, mask, 32));
    if (t % 32 == 0) largest[t / 32] = bits;
    __syncthreads();
    int length = n - start < LION_BLOCK ? (int)(n - start) : LION_BLOCK;
    int all = __float_as_int(lion_padding(rule, map, length, before));
    for (int w = 0; w < 8; w++) all = max(all, largest[w]);
    float after = __int_as_float(all);
    if (in) codes[i] = after == 0.0f ? 0 : dynamic_code(map, m / after);
    if (t == 0) absmax[blockIdx.x] = after;
}

// Tensors that keep their momentum in f32.
extern "C" __global__ void lion(unsigned long long n, LionRule rule, float *p, const float *g, float *m) {
    unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float value = p[i], momentum = m[i];
    lion_element(rule, value, lion_gradient(rule, g[i]), momentum);
    p[i] = value;
    m[i] = momentum;
}

// The sum of squares of each piece in f64, in the order of clip.rs: lanes that a thread each adds up, then the lanes in turn.
// A product of two f32 is exact in f64. 4 pieces for a block of 256 threads.
extern "C" __global__ void sum_of_squares(unsigned long long n, const float *g, double *sums) {
    __shared__ double lanes[256];
    int t = threadIdx.x, lane = t % LANES;
    unsigned long long piece = (unsigned long long)blockIdx.x * (256 / LANES) + t / LANES, start = piece * PIECE;
    unsigned long long end = start + PIECE < n ? start + PIECE : n;
    double sum = 0.0;
#pragma unroll 8
    for (unsigned long long i = start + lane; i < end; i += LANES) sum += (double)g[i] * (double)g[i];
    lanes[t] = sum;
    __syncthreads();
    if (lane != 0 || start >= n) return;
    sum = 0.0;
    for (int l = 0; l < LANES; l++) sum += lanes[t + l];
    sums[piece] = sum;
}
