// A stand-in for libcudart: the entry points by which candle's library of quantised kernels registers itself when the program
// starts. Training calls none of those kernels.
#include "dry.h"

extern "C" {
void **__cudaRegisterFatBinary(void *) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *, char *, const char *, int, void *, void *, void *, void *, int *) {}
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
int __cudaPushCallConfiguration(unsigned long long, unsigned, unsigned long long, unsigned, size_t, void *) { dry_refuse("a kernel of libcudart"); }
int __cudaPopCallConfiguration(void *, void *, size_t *, void *) { dry_refuse("a kernel of libcudart"); }
int cudaLaunchKernel(const void *, unsigned long long, unsigned, unsigned long long, unsigned, void **, size_t, void *) { dry_refuse("a kernel of libcudart"); }
int __cudaLaunchKernel(const void *, unsigned long long, unsigned, unsigned long long, unsigned, void **, size_t, void *) { dry_refuse("a kernel of libcudart"); }
int __cudaLaunchKernel_ptsz(const void *, unsigned long long, unsigned, unsigned long long, unsigned, void **, size_t, void *) { dry_refuse("a kernel of libcudart"); }
int __cudaGetKernel(void **, const void *) { return 0; }
int __cudaInitModule(void **) { return 0; }
int cudaGetDevice(int *device) { return *device = 0, 0; }
int cudaGetLastError() { return 0; }
const char *cudaGetErrorString(int) { return "an error of libcudart"; }
int cudaFuncSetAttribute(const void *, int, int) { return 0; }
int cudaDeviceGetAttribute(int *value, int, int) { return *value = 0, 0; }
int cudaGetDeviceProperties_v2(void *, int) { return 0; }
int cudaMemcpyAsync(void *, const void *, size_t, int, void *) { dry_refuse("a copy of libcudart"); }
int cudaMallocAsync(void **, size_t, void *) { dry_refuse("an allocation of libcudart"); }
int cudaFreeAsync(void *, void *) { dry_refuse("an allocation of libcudart"); }
int cudaMemsetAsync(void *, int, size_t, void *) { dry_refuse("a memset of libcudart"); }
int cudaStreamSynchronize(void *) { return 0; }
}
