// A stand-in for libnccl between processes of one machine: ranks meet in a piece of shared memory named by the unique id,
// put their part into their own slot, and add up all slots in the order of ranks. A rank that does not come within
// DRY_GPU_NCCL_SECONDS (10) makes the others fail with ncclRemoteError. DRY_GPU_NCCL_DEATH=RANK:N kills that rank's process in its N-th
// all-reduce, counted from 1.
#include "dry.h"

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {
enum { OK = 0, SYSTEM = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE = 6 };
constexpr size_t SLOT = 1 << 20;

struct Id {
    char name[128];
};
struct Meeting {
    std::atomic<unsigned> arrived, turn, failed;
};
struct Comm {
    int rank, count;
    Meeting *meeting;
    char *slots;
    size_t mapped;
};

Type type_of(int t) {
    switch (t) {
    case 0: case 1: return Type::U8;
    case 6: return Type::F16;
    case 7: return Type::F32;
    case 8: return Type::F64;
    case 9: return Type::BF16;
    }
    dry_refuse(("NCCL element type " + std::to_string(t)).c_str());
}

// All ranks are here, or one is missing.
bool meet(Comm *c) {
    auto m = c->meeting;
    unsigned turn = m->turn.load();
    if (m->arrived.fetch_add(1) + 1 == unsigned(c->count)) {
        m->arrived = 0;
        m->turn = turn + 1;
        return !m->failed;
    }
    auto text = getenv("DRY_GPU_NCCL_SECONDS");
    auto end = std::chrono::steady_clock::now() + std::chrono::seconds(text ? atoi(text) : 10);
    while (m->turn.load() == turn && !m->failed) {
        if (std::chrono::steady_clock::now() > end) m->failed = 1;
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    return !m->failed;
}

char *slot(Comm *c, int rank) { return c->slots + size_t(rank) * SLOT; }
} // namespace

extern "C" {
int ncclGetVersion(int *version) { return *version = 22700, OK; }
const char *ncclGetErrorString(int e) {
    return e == REMOTE ? "remote process exited or there was a network error" : e == INVALID_ARGUMENT ? "invalid argument" : e ? "system error" : "no error";
}
int ncclGetUniqueId(Id *id) {
    static std::atomic<int> next;
    memset(id, 0, sizeof *id);
    snprintf(id->name, sizeof id->name, "/dry-gpu-%d-%d-%lld", int(getpid()), next++, (long long)std::chrono::steady_clock::now().time_since_epoch().count());
    return OK;
}
int ncclCommInitRank(void **out, int count, Id id, int rank) {
    if (rank < 0 || rank >= count || id.name[0] != '/') return INVALID_ARGUMENT;
    size_t bytes = 4096 + size_t(count) * SLOT;
    int file = shm_open(id.name, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, off_t(bytes))) return SYSTEM;
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (p == MAP_FAILED) return SYSTEM;
    auto c = new Comm{rank, count, static_cast<Meeting *>(p), static_cast<char *>(p) + 4096, bytes};
    bool all = meet(c);
    if (rank == 0) shm_unlink(id.name);
    if (!all) return REMOTE;
    return *out = c, OK;
}
int ncclCommAbort(void *comm) {
    auto c = static_cast<Comm *>(comm);
    munmap(c->meeting, c->mapped);
    return delete c, OK;
}
int ncclCommDestroy(void *comm) { return ncclCommAbort(comm); }
int ncclCommFinalize(void *) { return OK; }
int ncclGroupStart() { return OK; }
int ncclGroupEnd() { return OK; }

int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, void *comm, void *) {
    auto c = static_cast<Comm *>(comm);
    Type t = type_of(type);
    // ncclSum, ncclMax
    if (op != 0 && op != 2) return INVALID_USAGE;
    dry_count("all-reduce", count * size_of(t));
    static std::atomic<int> calls;
    int rank, n;
    auto death = getenv("DRY_GPU_NCCL_DEATH");
    calls++;
    if (death && sscanf(death, "%d:%d", &rank, &n) == 2 && rank == c->rank && n == calls) raise(SIGKILL);
    size_t step = SLOT / size_of(t);
    for (size_t at = 0; at < count; at += step) {
        size_t n = std::min(step, count - at), offset = at * size_of(t);
        memcpy(slot(c, c->rank), static_cast<const char *>(from) + offset, n * size_of(t));
        if (!meet(c)) return REMOTE;
        for (size_t i = 0; i < n; i++) {
            float sum = load(slot(c, 0), t, i);
            for (int r = 1; r < c->count; r++) {
                float v = load(slot(c, r), t, i);
                sum = op == 0 ? sum + v : v > sum ? v : sum;
            }
            store(static_cast<char *>(to) + offset, t, i, sum);
        }
        if (!meet(c)) return REMOTE;
    }
    return OK;
}

int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, void *comm, void *) {
    auto c = static_cast<Comm *>(comm);
    if (root < 0 || root >= c->count) return INVALID_ARGUMENT;
    size_t bytes = count * size_of(type_of(type));
    dry_count("broadcast", bytes);
    for (size_t at = 0; at < bytes; at += SLOT) {
        size_t n = std::min(SLOT, bytes - at);
        if (c->rank == root) memcpy(slot(c, root), static_cast<const char *>(from) + at, n);
        if (!meet(c)) return REMOTE;
        memcpy(static_cast<char *>(to) + at, slot(c, root), n);
        if (!meet(c)) return REMOTE;
    }
    return OK;
}
int ncclBcast(void *buffer, size_t count, int type, int root, void *comm, void *stream) { return ncclBroadcast(buffer, buffer, count, type, root, comm, stream); }

int ncclAllGather(const void *from, void *to, size_t count, int type, void *comm, void *) {
    auto c = static_cast<Comm *>(comm);
    size_t bytes = count * size_of(type_of(type));
    dry_count("all-gather", bytes);
    for (size_t at = 0; at < bytes; at += SLOT) {
        size_t n = std::min(SLOT, bytes - at);
        memcpy(slot(c, c->rank), static_cast<const char *>(from) + at, n);
        if (!meet(c)) return REMOTE;
        for (int r = 0; r < c->count; r++) memcpy(static_cast<char *>(to) + size_t(r) * bytes + at, slot(c, r), n);
        if (!meet(c)) return REMOTE;
    }
    return OK;
}
}
