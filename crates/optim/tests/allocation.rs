//! A step allocates nothing: counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use optim::{Hyper, Optimizer, OptimizerKind};

struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_step_allocates_nothing() {
    for kind in [OptimizerKind::Lion, OptimizerKind::Lion8bit] {
        for n in [1000, 10_000, 1_000_000] {
            let mut optimizer = Optimizer::new(kind, Hyper::defaults(kind), &[n]);
            let (mut p, g) = (vec![1.0; n], vec![0.5; n]);
            // The first step makes the state, and starts the threads.
            optimizer.step(0, &mut p, &g, 1e-4);
            let before = BYTES.load(Ordering::Relaxed);
            for _ in 0..10 {
                optimizer.step(0, &mut p, &g, 1e-4);
            }
            let used = BYTES.load(Ordering::Relaxed) - before;
            // Handing work to the threads takes rayon a queue segment now and then, whatever the size.
            let allowed = if n < 16_384 { 0 } else { 16_384 };
            assert!(used <= allowed, "{} of {n}: {used} bytes in ten steps", kind.name());
        }
    }
}
