// What the stand-in libraries share: one record of what the program asked of its GPU, kept by the driver's stand-in.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {
// Counts a call under a name that the report shows ("gemm f16", "copy to host").
void dry_count(const char *what, size_t bytes);
// Whether results are computed (1) or left as they are (0).
int dry_computes();
// The program asked for what no real library would do, or for what the stand-in does not know: says so and ends the program.
[[noreturn]] void dry_refuse(const char *what);
}

// The element types of cuBLAS, cuDNN and NCCL that training uses.
enum class Type { F32, F64, F16, BF16, U8 };

inline size_t size_of(Type t) {
    return t == Type::F64 ? 8 : t == Type::F32 ? 4 : t == Type::U8 ? 1 : 2;
}

inline float load(const void *p, Type t, size_t i) {
    switch (t) {
    case Type::F32: return static_cast<const float *>(p)[i];
    case Type::F64: return static_cast<float>(static_cast<const double *>(p)[i]);
    case Type::F16: return static_cast<float>(static_cast<const _Float16 *>(p)[i]);
    case Type::U8: return static_cast<const uint8_t *>(p)[i];
    case Type::BF16: {
        uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t *>(p)[i]) << 16;
        float f;
        __builtin_memcpy(&f, &bits, 4);
        return f;
    }
    }
    return 0;
}

inline void store(void *p, Type t, size_t i, float v) {
    switch (t) {
    case Type::F32: static_cast<float *>(p)[i] = v; break;
    case Type::F64: static_cast<double *>(p)[i] = v; break;
    case Type::F16: static_cast<_Float16 *>(p)[i] = static_cast<_Float16>(v); break;
    case Type::U8: static_cast<uint8_t *>(p)[i] = static_cast<uint8_t>(v); break;
    case Type::BF16: {
        uint32_t bits;
        __builtin_memcpy(&bits, &v, 4);
        if (v == v) bits += 0x7fff + ((bits >> 16) & 1); // to nearest, ties to even
        static_cast<uint16_t *>(p)[i] = static_cast<uint16_t>(bits >> 16);
        break;
    }
    }
}
