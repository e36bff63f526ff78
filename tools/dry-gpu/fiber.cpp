// The built-in variables, and a block's threads as fibers for kernels with barriers: each has a small stack of its own, and is
// left at a barrier until all threads that still run have come to it. x86-64 only.
#include "cuda_host.h"
#include "kernels.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {
// Not a multiple of a page: what the threads of a warp use of their stacks would fall into the same few lines of the cache.
constexpr size_t STACK = (16 << 10) + 576;
constexpr size_t WARP = 32;
enum Wait { NEW, READY, AT_BLOCK, AT_WARP, DONE };

struct Fiber {
    void *stack_pointer;
    Dim3 thread;
    Wait wait;
    char *stack;
    // Number of its last exchange, never used before in its place.
    uint64_t exchange;
};
// What a thread has put in, in which of its exchanges.
struct Slot {
    uint64_t exchange, value;
};
std::vector<Fiber> fibers;
// Of threads that have ended, or not begun.
std::vector<char *> stacks;
// No thread is more than one exchange ahead of another of its warp: with two slots none writes what another has still to read.
std::vector<Slot> slots[2];
uint64_t exchanges = 0;
void *scheduler;
size_t now;
bool running = false;
void (*body)(void *);
void *argument;

extern "C" void dry_switch(void **save, void *load);
asm(R"(
.text
.globl dry_switch
.hidden dry_switch
dry_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

// Goes on with the next thread of the warp that can, else with the scheduler.
void leave(Wait why) {
    size_t me = now, end = std::min(fibers.size(), (me | (WARP - 1)) + 1);
    fibers[me].wait = why;
    for (size_t next = me + 1; next < end; next++)
        if (fibers[next].wait == READY) {
            now = next;
            threadIdx = fibers[next].thread;
            dry_switch(&fibers[me].stack_pointer, fibers[next].stack_pointer);
            return;
        }
    dry_switch(&fibers[me].stack_pointer, scheduler);
}

void start() {
    body(argument);
    // Taken again when this thread has left it: only the scheduler begins threads.
    stacks.push_back(fibers[now].stack);
    leave(DONE);
    abort();
}

void begin(Fiber &fiber) {
    if (stacks.empty()) stacks.push_back(new char[STACK]);
    fiber.stack = stacks.back();
    stacks.pop_back();
    // The frame that dry_switch pops: six registers, then where to go. At a function's entry the stack is 8 off a multiple of 16.
    auto top = reinterpret_cast<uintptr_t>(fiber.stack + STACK - 16) & ~uintptr_t(15);
    auto frame = reinterpret_cast<void **>(top - 8);
    *frame = nullptr;
    *--frame = reinterpret_cast<void *>(&start);
    for (int r = 0; r < 6; r++) *--frame = nullptr;
    fiber.stack_pointer = frame;
}

// Lets go whom all others of the group that still run wait for as well; gives whether there was any.
bool release(size_t from, size_t to, Wait at) {
    bool all = false;
    for (size_t i = from; i < to; i++) {
        if (fibers[i].wait == DONE) continue;
        if (fibers[i].wait != at) return false;
        all = true;
    }
    for (size_t i = from; all && i < to; i++)
        if (fibers[i].wait == at) fibers[i].wait = READY;
    return all;
}

void run_block(size_t threads) {
    fibers.resize(threads);
    slots[0].resize(threads);
    slots[1].resize(threads);
    for (size_t i = 0; i < threads; i++) {
        unsigned x = unsigned(i % blockDim.x), y = unsigned(i / blockDim.x % blockDim.y), z = unsigned(i / blockDim.x / blockDim.y);
        fibers[i] = {nullptr, {x, y, z}, NEW, nullptr, exchanges};
    }
    exchanges += uint64_t(1) << 32;
    running = true;
    do {
        // A warp as far as it comes: its stacks stay in the cache, and a thread that meets no barrier leaves its own to the next.
        for (size_t warp = 0; warp < threads; warp += WARP) {
            size_t end = std::min(threads, warp + WARP);
            do
                for (size_t i = warp; i < end; i++) {
                    if (fibers[i].wait != NEW && fibers[i].wait != READY) continue;
                    if (fibers[i].wait == NEW) begin(fibers[i]);
                    now = i;
                    threadIdx = fibers[i].thread;
                    dry_switch(&scheduler, fibers[i].stack_pointer);
                }
            while (release(warp, end, AT_WARP));
        }
    } while (release(0, threads, AT_BLOCK));
    for (auto &f : fibers)
        if (f.wait != DONE) {
            fprintf(stderr, "dry-gpu: threads of a block wait at different barriers\n");
            abort();
        }
    running = false;
}

// Puts a word in and waits until all of the warp have; gives the slots of all threads.
const Slot *exchange(uint64_t word) {
    uint64_t number = ++fibers[now].exchange;
    auto &own = slots[number & 1];
    own[now] = {number, word};
    leave(AT_WARP);
    return own.data();
}
} // namespace

void fiber_block_barrier() {
    if (!running) {
        fprintf(stderr, "dry-gpu: a barrier in a kernel that is not listed with barriers\n");
        abort();
    }
    leave(AT_BLOCK);
}

uint64_t fiber_shuffle_xor(uint64_t value, int mask) {
    if (!running) {
        fprintf(stderr, "dry-gpu: a shuffle in a kernel that is not listed with barriers\n");
        abort();
    }
    auto put = exchange(value);
    size_t other = (now & ~(WARP - 1)) | ((now & (WARP - 1)) ^ size_t(mask));
    // A lane beyond the block or that has returned gives what is undefined on a device; here the thread's own value.
    return other < fibers.size() && put[other].exchange == put[now].exchange ? put[other].value : value;
}

void fiber_gather(const uint32_t *mine, int count, uint32_t *all) {
    if (!running) {
        fprintf(stderr, "dry-gpu: a warp's product in a kernel that is not listed with barriers\n");
        abort();
    }
    auto put = exchange(reinterpret_cast<uint64_t>(mine));
    size_t first = now & ~(WARP - 1);
    for (size_t lane = 0; lane < WARP; lane++)
        if (first + lane < fibers.size() && put[first + lane].exchange == put[now].exchange)
            memcpy(all + lane * count, reinterpret_cast<const uint32_t *>(put[first + lane].value), count * sizeof(uint32_t));
    // What the slots point at is the threads' own.
    leave(AT_WARP);
}

void run_grid(Dim3 grid, Dim3 block, bool barriers, void (*f)(void *), void *a) {
    gridDim = grid;
    blockDim = block;
    body = f;
    argument = a;
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
                if (barriers) {
                    run_block(size_t(block.x) * block.y * block.z);
                    continue;
                }
                for (threadIdx.z = 0; threadIdx.z < block.z; threadIdx.z++)
                    for (threadIdx.y = 0; threadIdx.y < block.y; threadIdx.y++)
                        for (threadIdx.x = 0; threadIdx.x < block.x; threadIdx.x++) f(a);
            }
}
