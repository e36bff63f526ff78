// A stand-in for libcuda on host memory: device memory is host memory, streams run at once, kernels are found by name in
// libdrykernels.so (the .cu sources built for the host). Everything is counted; the report is written when the program ends.
//
//   DRY_GPU_DEPTH   "walk": launches and library calls are recorded and compute nothing; copies to the host give 1.0 in every
//                   f32. "compute" (default): everything is computed.
//   DRY_GPU_REPORT  file for the report; without it there is none. Where the variable RANK is set and not 0, it is appended.
//   DRY_GPU_MEMORY  bytes of the device, by default 24 GiB. An allocation beyond them fails as on a real one.
//   DRY_GPU_COUNT   number of devices, by default 1.
//   DRY_GPU_FAIL    "alloc:N" or "launch:N": that call, counted from 1, fails; "host:N": page-locked memory ends with that call.
//   DRY_GPU_LATE    "1": what was submitted to a stream counts as done only when the host has waited for it, as on a GPU that is
//                   infinitely slow. Page-locked memory that is changed or given back before its copy is done ends the program.
#include "state.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <unistd.h>

State::State() {
    if (auto text = getenv("DRY_GPU_MEMORY")) memory = strtoull(text, nullptr, 10);
    if (auto text = getenv("DRY_GPU_COUNT")) devices = atoi(text);
    if (auto text = getenv("DRY_GPU_DEPTH")) computes = strcmp(text, "walk") != 0;
    if (auto text = getenv("DRY_GPU_FAIL")) {
        if (!strncmp(text, "alloc:", 6)) fail_alloc = strtoull(text + 6, nullptr, 10);
        if (!strncmp(text, "launch:", 7)) fail_launch = strtoull(text + 7, nullptr, 10);
        if (!strncmp(text, "host:", 5)) fail_host = strtoull(text + 5, nullptr, 10);
    }
    if (auto text = getenv("DRY_GPU_LATE")) late = strcmp(text, "0") != 0;
    Dl_info self;
    if (computes && dladdr(reinterpret_cast<void *>(&dry_count), &self)) {
        std::string path = self.dli_fname;
        path = path.substr(0, path.rfind('/') + 1);
        for (auto name : {"libdrykernels.so", "libdrykernels-2.so"}) {
            kernels.push_back(dlopen((path + name).c_str(), RTLD_NOW | RTLD_LOCAL));
            if (!kernels.back()) dry_refuse(dlerror());
        }
    }
}

State::~State() {
    auto path = getenv("DRY_GPU_REPORT"), rank = getenv("RANK");
    bool first = !rank || !strcmp(rank, "0");
    char name[4096];
    snprintf(name, sizeof name, "%s%s%s", path ? path : "", first ? "" : ".", first ? "" : rank);
    FILE *out = path ? fopen(name, "w") : nullptr;
    if (!out) return;
    fprintf(out, "memory peak\t%zu\nmemory left\t%zu\nallocations\t%zu\nlaunches\t%zu\n", peak, used, allocations, launches);
    for (auto &[name, count] : counts) fprintf(out, "%s\t%zu\t%zu\n", name.c_str(), count.calls, count.bytes);
    fclose(out);
}

State &state() {
    static State s;
    return s;
}

namespace {
thread_local void *current = nullptr;
} // namespace

extern "C" {
void dry_count(const char *what, size_t bytes) {
    auto &s = state();
    std::lock_guard hold(s.lock);
    auto &count = s.counts[what];
    count.calls++;
    count.bytes += bytes;
}
int dry_computes() { return state().computes; }
void dry_refuse(const char *what) {
    fprintf(stderr, "dry-gpu: %s\n", what);
    _exit(70);
}

int cuInit(unsigned) { return state().devices > 0 ? OK : 100; }
int cuDriverGetVersion(int *version) { return *version = 13000, OK; }
int cuDeviceGetCount(int *count) { return *count = state().devices, OK; }
int cuDeviceGet(int *device, int ordinal) {
    if (ordinal < 0 || ordinal >= state().devices) return INVALID_DEVICE;
    return *device = ordinal, OK;
}
int cuDeviceGetDefaultMemPool(void **pool, int) { return *pool = nullptr, OK; }
int cuMemPoolSetAttribute(void *, int, void *) { return OK; }
int cuMemPoolGetAttribute(void *, int, void *value) { return *static_cast<uint64_t *>(value) = state().peak, OK; }
int cuDeviceGetName(char *name, int length, int) { return snprintf(name, length, "Dry GPU"), OK; }
// The same in every process of this machine, another for each device and machine.
int cuDeviceGetUuid_v2(char *uuid, int device) {
    memset(uuid, 0, 16);
    gethostname(uuid + 1, 14);
    return uuid[0] = char(device), OK;
}
int cuDeviceGetUuid(char *uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
int cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = state().memory, OK; }
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    auto &s = state();
    std::lock_guard hold(s.lock);
    return *free = s.memory - s.used, *total = s.memory, OK;
}
int cuDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
    case 1: *value = 1024; break;                                 // threads per block
    case 2: case 3: *value = 1024; break;                         // block sides
    case 4: *value = 64; break;
    case 5: *value = 0x7fffffff; break;                           // grid sides
    case 6: case 7: *value = 65535; break;
    case 8: *value = 49152; break;                                // shared memory per block
    case 10: *value = 32; break;                                  // warp
    case 16: *value = 82; break;                                  // multiprocessors of an RTX 3090
    case 75: *value = 8; break;                                   // compute capability 8.6
    case 76: *value = 6; break;
    case 115: *value = 1; break;                                  // memory pools
    default: *value = 0;
    }
    return OK;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = reinterpret_cast<void *>(uintptr_t(device + 1)), OK; }
int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
int cuCtxGetCurrent(void **context) { return *context = current, OK; }
int cuCtxSetCurrent(void *context) { return current = context, OK; }
int cuCtxDestroy_v2(void *) { return OK; }

int cuModuleLoadData(void **module, const void *image) {
    auto text = static_cast<const char *>(image);
    if (!strstr(text, ".version") || !strstr(text, ".target")) return INVALID_IMAGE;
    auto loaded = new Module;
    for (auto at = text; (at = strstr(at, ".entry "));) {
        at += strlen(".entry ");
        auto end = strchr(at, '(');
        if (!end) break;
        std::string name(at, end);
        auto &s = state();
        auto &function = loaded->functions[name] = Function{name, {}};
        for (auto library : s.kernels)
            if (auto run = dlsym(library, ("dry_run_" + name).c_str())) function.runs.push_back(reinterpret_cast<Run>(run));
    }
    return *module = loaded, OK;
}
int cuModuleLoad(void **, const char *) { return NOT_FOUND; }
int cuModuleUnload(void *module) { return delete static_cast<Module *>(module), OK; }
int cuModuleGetFunction(void **out, void *module, const char *name) {
    // The module's own PTX is the measure of which kernels exist: a name that is not in it fails as on a real device.
    auto &functions = static_cast<Module *>(module)->functions;
    auto found = functions.find(name);
    if (found == functions.end()) {
        fprintf(stderr, "dry-gpu: the module has no kernel %s\n", name);
        return NOT_FOUND;
    }
    return *out = &found->second, OK;
}
int cuFuncSetAttribute(void *, int, int) { return OK; }
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned, void *, void **arguments, void **) {
    auto function = static_cast<Function *>(f);
    auto &s = state();
    {
        std::lock_guard hold(s.lock);
        s.launches++;
        s.counts["kernel " + function->name].calls++;
        if (s.launches == s.fail_launch) return LAUNCH_FAILED;
    }
    if (!gx || !gy || !gz || !bx || !by || !bz || size_t(bx) * by * bz > 1024 || gy > 65535 || gz > 65535) return INVALID_VALUE;
    if (!s.computes) return OK;
    if (function->runs.empty()) dry_refuse(("the kernel " + function->name + " has no host build").c_str());
    // A copy's variables (threadIdx, shared memory) are those of one launch.
    static std::mutex busy[2];
    std::unique_lock first(busy[0], std::try_to_lock), second(busy[1], std::defer_lock);
    if (!first) second.lock();
    function->runs[first ? 0 : 1]({gx, gy, gz}, {bx, by, bz}, arguments);
    return OK;
}

int cuGetErrorName(int error, const char **text) {
    static const std::map<int, const char *> names = {{1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"}, {100, "CUDA_ERROR_NO_DEVICE"},
        {101, "CUDA_ERROR_INVALID_DEVICE"}, {200, "CUDA_ERROR_INVALID_IMAGE"}, {500, "CUDA_ERROR_NOT_FOUND"}, {719, "CUDA_ERROR_LAUNCH_FAILED"}};
    auto found = names.find(error);
    return *text = found == names.end() ? "CUDA_ERROR_UNKNOWN" : found->second, OK;
}
int cuGetErrorString(int error, const char **text) {
    static const std::map<int, const char *> texts = {{1, "invalid argument"}, {2, "out of memory"}, {100, "no CUDA-capable device is detected"},
        {101, "invalid device ordinal"}, {200, "device kernel image is invalid"}, {500, "named symbol not found"}, {719, "unspecified launch failure"}};
    auto found = texts.find(error);
    return *text = found == texts.end() ? "unknown error" : found->second, OK;
}
}
