// The arithmetic of the optimizer's kernels, element by element: compiled by nvcc into optim.cu, and by the host's compiler into
// host.cpp, by which the tests hold it against the Rust code bit for bit. Neither compiler may contract a product and a sum
// into one operation (nvcc -fmad=false, g++ -ffp-contract=off), and both divide exactly, as they do by default.
#pragma once

#ifdef __CUDACC__
#define BOTH __host__ __device__ inline
#else
#include <math.h>
#include <string.h>
#define BOTH inline
#endif

// `LionRule` of src/lion.rs, and what gradients are multiplied by first (unscaling and clipping in one).
struct LionRule {
    float beta1, beta2, gradient1, gradient2, lr, decay, factor;
};

// Elements that share one absmax.
#define LION_BLOCK 256
// Elements of a piece in clip.rs, and the lanes in which its squares are summed.
#define PIECE (16 * LION_BLOCK)
#define LANES 64

// Scaled as candle's affine does it: the added zero makes -0 a 0.
BOTH float lion_gradient(const LionRule &rule, float g) { return rule.factor == 1.0f ? g : g * rule.factor + 0.0f; }

// One element: the parameter and the momentum after the step.
BOTH void lion_element(const LionRule &rule, float &p, float g, float &m) {
    float update = rule.beta1 * m + rule.gradient1 * g;
    float sign = (update > 0.0f ? 1.0f : 0.0f) - (update < 0.0f ? 1.0f : 0.0f);
    p = p * rule.decay - rule.lr * sign;
    m = rule.beta2 * m + rule.gradient2 * g;
}

// What the elements that a short last block lacks count for its absmax.
BOTH float lion_padding(const LionRule &rule, const float *values, int length, float absmax) {
    return length < LION_BLOCK ? rule.beta2 * (values[128] * absmax) : 0.0f;
}

BOTH bool sign_bit(float x) {
#ifdef __CUDACC__
    return signbit(x);
#else
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits >> 31;
#endif
}

// The code of x in -1..=1: `reference` of src/map.rs. `values` ascend.
BOTH unsigned char dynamic_code(const float *values, float x) {
    int below = 0, above = 255, pivot = 127;
    for (int stride = 64; stride > 0; stride /= 2) {
        if (x > values[pivot]) {
            below = pivot;
            pivot += stride;
        } else {
            above = pivot;
            pivot -= stride;
        }
    }
    float value = values[pivot];
    int code = pivot;
    if (x > value) {
        if (x > (values[above] + value) * 0.5f) code = above;
    } else if (x < (values[below] + value) * 0.5f) {
        code = below;
    }
    if (sign_bit(values[code]) == sign_bit(x)) return (unsigned char)code;
    return (unsigned char)(x > 0.0f ? code + 1 : code - 1);
}
