// bf16 as far as casts need it; arithmetic in it is not modelled (see cuda_host.h, __CUDA_ARCH__).
#pragma once
#include "cuda_fp16.h"

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f) {
        uint32_t u = bits_as<uint32_t>(f);
        if (f == f) u += 0x7fff + ((u >> 16) & 1);
        bits = uint16_t(u >> 16);
    }
    operator float() const { return bits_as<float>(uint32_t(bits) << 16); }
};
