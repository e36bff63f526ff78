// f16 as the device computes it: every operation rounds to f16.
#pragma once
#include "cuda_host.h"

struct __half {
    _Float16 v;
    __half() = default;
    __half(float f) : v(static_cast<_Float16>(f)) {}
    __half(double f) : v(static_cast<_Float16>(f)) {}
    __half(int i) : v(static_cast<_Float16>(static_cast<float>(i))) {}
    __half(unsigned i) : v(static_cast<_Float16>(static_cast<float>(i))) {}
    __half(long i) : v(static_cast<_Float16>(static_cast<float>(i))) {}
    __half(unsigned long i) : v(static_cast<_Float16>(static_cast<float>(i))) {}
    __half(unsigned char i) : v(static_cast<_Float16>(static_cast<float>(i))) {}
    __half(short i) : v(static_cast<_Float16>(static_cast<float>(i))) {}
    operator float() const { return static_cast<float>(v); }
    __half &operator+=(__half b) { return *this = __half(float(v) + float(b.v)); }
    __half &operator-=(__half b) { return *this = __half(float(v) - float(b.v)); }
    __half &operator*=(__half b) { return *this = __half(float(v) * float(b.v)); }
    __half &operator/=(__half b) { return *this = __half(float(v) / float(b.v)); }
};
using half = __half;
inline __half operator+(__half a, __half b) { return a += b; }
inline __half operator-(__half a, __half b) { return a -= b; }
inline __half operator*(__half a, __half b) { return a *= b; }
inline __half operator/(__half a, __half b) { return a /= b; }
inline __half operator-(__half a) { return __half(-float(a)); }
inline bool operator<(__half a, __half b) { return float(a) < float(b); }
inline bool operator>(__half a, __half b) { return float(a) > float(b); }
inline bool operator<=(__half a, __half b) { return float(a) <= float(b); }
inline bool operator>=(__half a, __half b) { return float(a) >= float(b); }
inline bool operator==(__half a, __half b) { return float(a) == float(b); }
inline bool operator!=(__half a, __half b) { return float(a) != float(b); }
struct __half2 {
    __half x, y;
};
using half2 = __half2;

inline float __half2float(__half a) { return a; }
inline __half __float2half(float a) { return a; }
inline __half __float2half_rn(float a) { return a; }
inline unsigned short __half_as_ushort(__half a) { return bits_as<unsigned short>(a.v); }
inline __half __ushort_as_half(unsigned short a) { __half h; h.v = bits_as<_Float16>(a); return h; }
inline bool __hisnan(__half a) { return std::isnan(float(a)); }
inline __half __hmax(__half a, __half b) { return fmaxf(a, b); }
inline __half __hmin(__half a, __half b) { return fminf(a, b); }
inline __half __hmax_nan(__half a, __half b) { return __hisnan(a) ? a : __hisnan(b) ? b : __hmax(a, b); }
inline __half __hmin_nan(__half a, __half b) { return __hisnan(a) ? a : __hisnan(b) ? b : __hmin(a, b); }
inline __half __habs(__half a) { return fabsf(a); }
inline __half hcos(__half a) { return cosf(a); }
inline __half hsin(__half a) { return sinf(a); }
inline __half hsqrt(__half a) { return sqrtf(a); }
inline __half hrcp(__half a) { return 1.0f / float(a); }
inline __half hlog(__half a) { return logf(a); }
inline __half hexp(__half a) { return expf(a); }
inline __half hceil(__half a) { return ceilf(a); }
inline __half hfloor(__half a) { return floorf(a); }
inline __half hrint(__half a) { return rintf(a); }
inline __half2 __hadd2(__half2 a, __half2 b) { return {a.x + b.x, a.y + b.y}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {a.x * b.x, a.y * b.y}; }
