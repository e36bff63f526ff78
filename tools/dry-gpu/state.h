// What the driver's stand-in knows: devices, memory, streams, and the counts of the report.
#pragma once
#include "dry.h"

#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_IMAGE = 200, NOT_FOUND = 500, NOT_READY = 600, LAUNCH_FAILED = 719 };

struct Count {
    size_t calls = 0, bytes = 0;
};

struct Dim {
    unsigned x, y, z;
};
using Run = void (*)(Dim grid, Dim block, void **arguments);
struct Function {
    std::string name;
    // In each copy of the kernels' library.
    std::vector<Run> runs;
};

// The kernels of a module's PTX, by name.
struct Module {
    std::unordered_map<std::string, Function> functions;
};

// A copy out of page-locked memory that is under way, and what was to be copied.
struct Reading {
    const char *from;
    size_t bytes, turn, hash;
};
// Turns of a stream: how many were given out, and how many the host has waited for.
struct Stream {
    size_t given = 0, done = 0;
    std::vector<Reading> readings;
};
struct Event {
    Stream *stream = nullptr;
    size_t turn = 0;
};

struct State {
    std::mutex lock;
    std::map<std::string, Count> counts;
    // Bytes of each piece of the device's memory, and of page-locked memory.
    std::map<uintptr_t, size_t> blocks, locked;
    // The default stream is the first.
    std::vector<Stream *> streams = {new Stream};
    size_t used = 0, peak = 0, allocations = 0, launches = 0, fail_alloc = 0, fail_launch = 0, fail_host = 0, host_allocations = 0;
    size_t memory = size_t(24) << 30;
    int devices = 1;
    bool computes = true, late = false;
    std::vector<void *> kernels;

    State();
    ~State();
};

// The one of this process.
State &state();
