// A stand-in for libcurand: creation only. Random numbers of a run are made on the host, so drawing any is a mistake.
#include "dry.h"

extern "C" {
int curandCreateGenerator(void **generator, int) { return *generator = new char, 0; }
int curandDestroyGenerator(void *generator) { return delete static_cast<char *>(generator), 0; }
int curandSetStream(void *, void *) { return 0; }
int curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { return 0; }
int curandGenerateNormal(void *, float *, size_t, float, float) { dry_refuse("random numbers of the device"); }
int curandGenerateNormalDouble(void *, double *, size_t, double, double) { dry_refuse("random numbers of the device"); }
int curandGenerateUniform(void *, float *, size_t) { dry_refuse("random numbers of the device"); }
int curandGenerateUniformDouble(void *, double *, size_t) { dry_refuse("random numbers of the device"); }
int curandGenerateLogNormal(void *, float *, size_t, float, float) { dry_refuse("random numbers of the device"); }
int curandGenerateLogNormalDouble(void *, double *, size_t, double, double) { dry_refuse("random numbers of the device"); }
}
