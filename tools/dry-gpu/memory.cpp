// Memory, copies, streams and events of the driver's stand-in. All work runs when it is submitted; what of it the host may know to be
// done is another matter (DRY_GPU_LATE, driver.cpp).
#include "state.h"

#include <cstdlib>
#include <cstring>
#include <string_view>
#include <sys/mman.h>

namespace {
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

Stream *stream_of(void *stream) { return stream ? static_cast<Stream *>(stream) : state().streams[0]; }

// Whether the range lies inside one piece of page-locked memory; the caller holds the lock.
bool locked(const void *p, size_t bytes) {
    auto &s = state();
    auto at = reinterpret_cast<uintptr_t>(p);
    auto found = s.locked.upper_bound(at);
    return found != s.locked.begin() && at + bytes <= (--found)->first + found->second;
}

size_t hash(const char *p, size_t bytes) { return std::hash<std::string_view>()({p, bytes}); }

// The host has waited for the first `turn` turns of a stream; the caller holds the lock.
void waited(Stream *stream, size_t turn) {
    if (turn > stream->done) stream->done = turn;
    std::erase_if(stream->readings, [&](const Reading &r) {
        if (r.turn > stream->done) return false;
        if (hash(r.from, r.bytes) != r.hash) dry_refuse("page-locked memory was changed before its copy was done");
        return true;
    });
}

bool passed(const Event *event) { return !state().late || !event->stream || event->stream->done >= event->turn; }

// What makes the host wait for a stream.
void waits(const char *what, size_t bytes, Stream *stream) {
    auto &s = state();
    std::lock_guard hold(s.lock);
    auto &count = s.counts[what];
    count.calls++, count.bytes += bytes;
    waited(stream, stream->given);
}
} // namespace

extern "C" {
int cuStreamCreate(void **stream, unsigned) {
    auto &s = state();
    std::lock_guard hold(s.lock);
    return s.streams.push_back(new Stream), *stream = s.streams.back(), OK;
}
// It stays: events may still name it.
int cuStreamDestroy_v2(void *) { return OK; }
int cuStreamSynchronize(void *stream) { return waits("synchronise stream", 0, stream_of(stream)), OK; }
int cuCtxSynchronize() {
    auto &s = state();
    std::lock_guard hold(s.lock);
    s.counts["synchronise context"].calls++;
    for (auto stream : s.streams) waited(stream, stream->given);
    return OK;
}
int cuStreamWaitEvent(void *, void *, unsigned) { return dry_count("wait for event", 0), OK; }
int cuStreamIsCapturing(void *, int *status) { return *status = 0, OK; }
int cuEventCreate(void **event, unsigned) { return *event = new Event, OK; }
int cuEventDestroy_v2(void *event) { return delete static_cast<Event *>(event), OK; }
int cuEventRecord(void *event, void *stream) {
    dry_count("record event", 0);
    std::lock_guard hold(state().lock);
    *static_cast<Event *>(event) = {stream_of(stream), ++stream_of(stream)->given};
    return OK;
}
int cuEventSynchronize(void *event) {
    auto e = static_cast<Event *>(event);
    std::lock_guard hold(state().lock);
    // One that is passed, or was never recorded, makes nobody wait.
    if (state().late && passed(e)) return OK;
    state().counts["synchronise event"].calls++;
    if (e->stream) waited(e->stream, e->turn);
    return OK;
}
int cuEventQuery(void *event) {
    std::lock_guard hold(state().lock);
    return passed(static_cast<Event *>(event)) ? OK : NOT_READY;
}
int cuEventElapsedTime_v2(float *ms, void *, void *) { return *ms = 0, OK; }
int cuEventElapsedTime(float *ms, void *, void *) { return *ms = 0, OK; }

int cuMemAllocAsync(void **out, size_t bytes, void *) { return allocate(out, bytes); }
int cuMemAlloc_v2(void **out, size_t bytes) { return allocate(out, bytes); }
int cuMemFreeAsync(void *p, void *) { return release(p); }
int cuMemFree_v2(void *p) { return release(p); }
int cuMemHostAlloc(void **out, size_t bytes, unsigned) {
    auto &s = state();
    std::lock_guard hold(s.lock);
    if (s.fail_host && ++s.host_allocations >= s.fail_host) return OUT_OF_MEMORY;
    auto &count = s.counts["page-locked memory"];
    count.calls++, count.bytes += bytes;
    if (!(*out = aligned_alloc(512, (bytes + 511) / 512 * 512))) return OUT_OF_MEMORY;
    s.locked[reinterpret_cast<uintptr_t>(*out)] = bytes;
    return OK;
}
int cuMemFreeHost(void *p) {
    auto &s = state();
    std::lock_guard hold(s.lock);
    auto found = s.locked.find(reinterpret_cast<uintptr_t>(p));
    if (found == s.locked.end()) return INVALID_VALUE;
    auto from = static_cast<const char *>(p), to = from + found->second;
    for (auto stream : s.streams)
        for (auto &r : stream->readings)
            if (r.from >= from && r.from < to) dry_refuse("page-locked memory was given back before its copy was done");
    s.locked.erase(found);
    return free(p), OK;
}

int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    if (!inside(to, bytes)) return INVALID_VALUE;
    dry_count("copy to device", bytes);
    memcpy(to, from, bytes);
    auto &s = state();
    std::unique_lock hold(s.lock);
    auto of = stream_of(stream);
    if (locked(from, bytes)) {
        auto &count = s.counts["page-locked copy to device"];
        count.calls++, count.bytes += bytes;
        auto start = static_cast<const char *>(from);
        if (s.late) of->readings.push_back({start, bytes, ++of->given, hash(start, bytes)});
        return OK;
    }
    hold.unlock();
    // The programming guide lists copies of up to 64 KiB among what returns at once; beyond it the driver may wait for the stream.
    if (bytes > (64 << 10)) waits("synchronise copy", bytes, of);
    return OK;
}
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    if (!inside(from, bytes)) return INVALID_VALUE;
    waits("copy to host", bytes, stream_of(stream));
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
}
