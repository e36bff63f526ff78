// A stand-in for libcuda on host memory: device memory is host memory, streams run at once, kernels are found by name in
// libdrykernels.so (the .cu sources built for the host). Everything is counted; the report is written when the program ends.
//
//   DRY_GPU_DEPTH   "walk": launches and library calls are recorded and compute nothing; copies to the host give 1.0 in every
//                   f32. "compute" (default): everything is computed.
//   DRY_GPU_REPORT  file for the report; without it there is none. Where the variable RANK is set and not 0, it is appended.
//   DRY_GPU_MEMORY  bytes of the device, by default 24 GiB. An allocation beyond them fails as on a real one.
//   DRY_GPU_COUNT   number of devices, by default 1.
//   DRY_GPU_FAIL    "alloc:N" or "launch:N": that call, counted from 1, fails.
#include "dry.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <unordered_map>
#include <vector>

namespace {
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_IMAGE = 200, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

struct Count {
    size_t calls = 0, bytes = 0;
};

struct Dim {
    unsigned x, y, z;
};
using Run = void (*)(Dim grid, Dim block, void **arguments);
struct Function {
    std::string name;
    Run run = nullptr;
};

// The kernels of a module's PTX, by name.
struct Module {
    std::unordered_map<std::string, Function> functions;
};

struct State {
    std::mutex lock;
    std::map<std::string, Count> counts;
    std::map<uintptr_t, size_t> blocks;
    size_t used = 0, peak = 0, allocations = 0, launches = 0, fail_alloc = 0, fail_launch = 0;
    size_t memory = size_t(24) << 30;
    int devices = 1;
    bool computes = true;
    void *kernels = nullptr;

    State() {
        if (auto text = getenv("DRY_GPU_MEMORY")) memory = strtoull(text, nullptr, 10);
        if (auto text = getenv("DRY_GPU_COUNT")) devices = atoi(text);
        if (auto text = getenv("DRY_GPU_DEPTH")) computes = strcmp(text, "walk") != 0;
        if (auto text = getenv("DRY_GPU_FAIL")) {
            if (!strncmp(text, "alloc:", 6)) fail_alloc = strtoull(text + 6, nullptr, 10);
            if (!strncmp(text, "launch:", 7)) fail_launch = strtoull(text + 7, nullptr, 10);
        }
        Dl_info self;
        if (computes && dladdr(reinterpret_cast<void *>(&dry_count), &self)) {
            std::string path = self.dli_fname;
            path = path.substr(0, path.rfind('/') + 1) + "libdrykernels.so";
            kernels = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
            if (!kernels) dry_refuse(dlerror());
        }
    }

    ~State() {
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
};

State &state() {
    static State s;
    return s;
}

int allocate(void **out, size_t bytes) {
    auto &s = state();
    std::lock_guard hold(s.lock);
    s.allocations++;
    // The granularity of the real pool's smallest pieces.
    size_t rounded = (bytes + 511) / 512 * 512;
    if (s.allocations == s.fail_alloc || s.used + rounded > s.memory) return OUT_OF_MEMORY;
    // Untouched pages of a mapping cost nothing; small blocks come from the heap, zeroed so that a walk reads numbers.
    void *p = bytes >= (1 << 20) ? mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                                 : aligned_alloc(512, rounded ? rounded : 512);
    if (!p || p == MAP_FAILED) return OUT_OF_MEMORY;
    if (bytes < (1 << 20)) memset(p, 0, rounded ? rounded : 512);
    s.blocks[reinterpret_cast<uintptr_t>(p)] = bytes;
    s.used += rounded;
    if (s.used > s.peak) s.peak = s.used;
    *out = p;
    return OK;
}

int release(void *p) {
    auto &s = state();
    std::lock_guard hold(s.lock);
    auto found = s.blocks.find(reinterpret_cast<uintptr_t>(p));
    if (found == s.blocks.end()) return INVALID_VALUE;
    size_t bytes = found->second, rounded = (bytes + 511) / 512 * 512;
    s.blocks.erase(found);
    s.used -= rounded;
    if (bytes >= (1 << 20)) munmap(p, rounded);
    else free(p);
    return OK;
}

// Whether the range lies inside one allocation: a copy that does not would be a crash on a real device.
bool inside(const void *p, size_t bytes) {
    auto &s = state();
    std::lock_guard hold(s.lock);
    auto at = reinterpret_cast<uintptr_t>(p);
    auto found = s.blocks.upper_bound(at);
    if (found == s.blocks.begin()) return bytes == 0;
    --found;
    return at + bytes <= found->first + found->second;
}
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
int cuCtxSynchronize() { return dry_count("synchronise context", 0), OK; }

// Work runs at once, so a stream and an event are names only.
int cuStreamCreate(void **stream, unsigned) { return *stream = malloc(1), OK; }
int cuStreamDestroy_v2(void *stream) { return free(stream), OK; }
int cuStreamSynchronize(void *) { return dry_count("synchronise stream", 0), OK; }
int cuStreamWaitEvent(void *, void *, unsigned) { return dry_count("wait for event", 0), OK; }
int cuStreamIsCapturing(void *, int *status) { return *status = 0, OK; }
int cuEventCreate(void **event, unsigned) { return *event = malloc(1), OK; }
int cuEventDestroy_v2(void *event) { return free(event), OK; }
int cuEventRecord(void *, void *) { return dry_count("record event", 0), OK; }
int cuEventSynchronize(void *) { return dry_count("synchronise event", 0), OK; }
int cuEventQuery(void *) { return OK; }
int cuEventElapsedTime_v2(float *ms, void *, void *) { return *ms = 0, OK; }
int cuEventElapsedTime(float *ms, void *, void *) { return *ms = 0, OK; }

int cuMemAllocAsync(void **out, size_t bytes, void *) { return allocate(out, bytes); }
int cuMemAlloc_v2(void **out, size_t bytes) { return allocate(out, bytes); }
int cuMemFreeAsync(void *p, void *) { return release(p); }
int cuMemFree_v2(void *p) { return release(p); }
int cuMemHostAlloc(void **out, size_t bytes, unsigned) { return (*out = aligned_alloc(512, (bytes + 511) / 512 * 512)) ? OK : OUT_OF_MEMORY; }
int cuMemFreeHost(void *p) { return free(p), OK; }

int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *) {
    if (!inside(to, bytes)) return INVALID_VALUE;
    dry_count("copy to device", bytes);
    memcpy(to, from, bytes);
    return OK;
}
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *) {
    if (!inside(from, bytes)) return INVALID_VALUE;
    dry_count("copy to host", bytes);
    if (dry_computes()) memcpy(to, from, bytes);
    else for (size_t i = 0; i + 4 <= bytes; i += 4) memcpy(static_cast<char *>(to) + i, "\0\0\x80\x3f", 4);
    return OK;
}
int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes, void *) {
    if (!inside(to, bytes) || !inside(from, bytes)) return INVALID_VALUE;
    dry_count("copy on device", bytes);
    if (dry_computes()) memmove(to, from, bytes);
    return OK;
}
int cuMemcpyPeerAsync(void *, void *, const void *, void *, size_t, void *) { dry_refuse("a copy between two GPUs of one process"); }
int cuMemsetD8Async(void *p, unsigned char value, size_t bytes, void *) {
    if (!inside(p, bytes)) return INVALID_VALUE;
    dry_count("set", bytes);
    if (dry_computes()) memset(p, value, bytes);
    return OK;
}

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
        auto run = s.kernels ? reinterpret_cast<Run>(dlsym(s.kernels, ("dry_run_" + name).c_str())) : nullptr;
        loaded->functions[name] = Function{name, run};
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
    if (!function->run) dry_refuse(("the kernel " + function->name + " has no host build").c_str());
    static std::mutex one;
    std::lock_guard hold(one);
    function->run({gx, gy, gz}, {bx, by, bz}, arguments);
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
