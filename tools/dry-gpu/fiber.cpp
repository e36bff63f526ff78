// The built-in variables, and a block's threads as fibers for kernels with barriers: each has a small stack of its own, and is
// left at a barrier until all threads that still run have come to it. x86-64 only.
#include "cuda_host.h"
#include "kernels.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {
constexpr size_t STACK = 16 << 10;
enum Wait { READY, AT_BLOCK, AT_WARP, DONE };

struct Fiber {
    void *stack_pointer;
    Dim3 thread;
    Wait wait;
};
std::vector<Fiber> fibers;
std::vector<char> stacks;
std::vector<uint64_t> slots;
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

void leave(Wait why) {
    fibers[now].wait = why;
    dry_switch(&fibers[now].stack_pointer, scheduler);
}

void start() {
    body(argument);
    leave(DONE);
    abort();
}

// Lets go whom all others of the group that still run wait for as well.
void release(size_t from, size_t to, Wait at) {
    bool all = false;
    for (size_t i = from; i < to; i++) {
        if (fibers[i].wait == DONE) continue;
        if (fibers[i].wait != at) return;
        all = true;
    }
    if (!all) return;
    for (size_t i = from; i < to; i++)
        if (fibers[i].wait == at) fibers[i].wait = READY;
}

void run_block(size_t threads) {
    fibers.resize(threads);
    slots.resize(threads);
    stacks.resize(threads * STACK);
    for (size_t i = 0; i < threads; i++) {
        // The frame that dry_switch pops: six registers, then where to go. At a function's entry the stack is 8 off a multiple of 16.
        auto top = reinterpret_cast<uintptr_t>(&stacks[(i + 1) * STACK - 16]) & ~uintptr_t(15);
        auto frame = reinterpret_cast<void **>(top - 8);
        *frame = nullptr;
        *--frame = reinterpret_cast<void *>(&start);
        for (int r = 0; r < 6; r++) *--frame = nullptr;
        unsigned x = unsigned(i % blockDim.x), y = unsigned(i / blockDim.x % blockDim.y), z = unsigned(i / blockDim.x / blockDim.y);
        fibers[i] = {frame, {x, y, z}, READY};
    }
    running = true;
    for (;;) {
        bool moved = false, alive = false;
        for (now = 0; now < threads; now++) {
            if (fibers[now].wait != READY) continue;
            threadIdx = fibers[now].thread;
            dry_switch(&scheduler, fibers[now].stack_pointer);
            moved = true;
        }
        for (size_t w = 0; w < threads; w += 32) release(w, std::min(threads, w + 32), AT_WARP);
        release(0, threads, AT_BLOCK);
        for (auto &f : fibers) alive |= f.wait != DONE;
        if (!alive) break;
        if (!moved) {
            fprintf(stderr, "dry-gpu: threads of a block wait at different barriers\n");
            abort();
        }
    }
    running = false;
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
    slots[now] = value;
    leave(AT_WARP);
    size_t other = (now & ~size_t(31)) | ((now & 31) ^ size_t(mask));
    // A lane beyond the block or that has returned gives what is undefined on a device; here the thread's own value.
    uint64_t got = other < fibers.size() && fibers[other].wait != DONE ? slots[other] : value;
    leave(AT_WARP);
    return got;
}

void fiber_gather(const uint32_t *mine, int count, uint32_t *all) {
    if (!running) {
        fprintf(stderr, "dry-gpu: a warp's product in a kernel that is not listed with barriers\n");
        abort();
    }
    slots[now] = reinterpret_cast<uint64_t>(mine);
    leave(AT_WARP);
    size_t first = now & ~size_t(31);
    for (size_t lane = 0; lane < 32; lane++)
        if (first + lane < fibers.size() && fibers[first + lane].wait != DONE)
            memcpy(all + lane * count, reinterpret_cast<const uint32_t *>(slots[first + lane]), count * sizeof(uint32_t));
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
