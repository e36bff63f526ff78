// How the driver's stand-in runs a kernel: `dry_run_NAME(grid, block, arguments)`, made from the kernel's own signature.
#pragma once
#include "cuda_host.h"
#include <utility>

void run_grid(Dim3 grid, Dim3 block, bool barriers, void (*f)(void *), void *a);

template <auto kernel> struct Kernel;
template <class... A, void (*kernel)(A...)> struct Kernel<kernel> {
    template <size_t... I> static void call(void **arguments, std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_const_t<A> *>(arguments[I])...);
    }
    static void run(Dim3 grid, Dim3 block, bool barriers, void **arguments) {
        run_grid(grid, block, barriers, [](void *a) { call(static_cast<void **>(a), std::index_sequence_for<A...>()); }, arguments);
    }
};
#define DRY_RUN(name, barriers) \
    extern "C" void dry_run_##name(Dim3 grid, Dim3 block, void **arguments) { Kernel<name>::run(grid, block, barriers, arguments); }
