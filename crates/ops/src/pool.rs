//! What a run's steps share: the pool of threads, in which work goes on beside other work and threads stay awake, and freed memory, which the
//! next step takes again.

use crate::gemm::{bf16, with_bf16};
use candle_core::Tensor;
// Linked for the functions below: the allocator is a program's to choose.
use libmimalloc_sys as _;
use std::ffi::{c_int, c_long};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Runs both, on the CPU at the same time: what is too small for all threads need not wait for what keeps them busy. `like` tells where; on
/// other devices `b` runs first, so that what it needs is given back before `a` makes the larger tensors.
pub fn together<A: Send, B: Send>(like: &Tensor, a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
    if !like.device().is_cpu() {
        let b = b();
        return (a(), b);
    }
    let on = bf16();
    rayon::join(|| with_bf16(on, a), || with_bf16(on, b))
}

unsafe extern "C" {
    fn mi_option_get(option: c_int) -> c_long;
    fn mi_option_set(option: c_int, value: c_long);
    fn mi_collect(force: bool);
}

/// `mi_option_purge_delay` (mimalloc 3, include/mimalloc.h): milliseconds after which freed memory goes back to the system, and its default.
const PURGE_DELAY: (c_int, c_long) = (15, 1000);
/// What it is set to: memory that a step frees and the next one takes would be cleared by the system each time.
const KEPT_FOR: c_long = 10_000;

/// Has mimalloc keep freed memory for ten seconds in place of one, unless `MIMALLOC_PURGE_DELAY` sets another time. Without effect in
/// programs with another allocator.
pub fn keep_freed_memory() {
    if std::env::var_os("MIMALLOC_PURGE_DELAY").is_some() {
        return;
    }
    let (option, default) = PURGE_DELAY;
    // SAFETY: both take any option's number and read or write an entry of a table of theirs, at any time. Another version of the library,
    // in which the number may mean something else, would hardly have this default there, and is left as it is.
    unsafe {
        if mi_option_get(option) == default {
            mi_option_set(option, KEPT_FOR);
        }
    }
}

/// Gives freed memory back to the system now: behind work that took much and is not done again soon.
pub fn give_back_freed_memory() {
    // SAFETY: it may be called at any time; what is in use stays.
    unsafe { mi_collect(true) }
}

/// For how long an idle thread looks for work before it begins to sleep in between. Time and not looks: where the system put it on the core of
/// a busy thread, each look takes that one's time slice, and only when it wakes from sleep it is put elsewhere.
const LOOKS: Duration = Duration::from_micros(200);
/// How long it sleeps then.
const NAP: Duration = Duration::from_micros(100);

/// Runs `f` while the pool's other threads look for work instead of sleeping: a step is a thousand short parallel loops, and waking a thread
/// for each costs as much as many of them take. They give way to any thread that wants their core.
pub fn awake<R>(f: impl FnOnce() -> R) -> R {
    /// Set when `f` ends, or panics.
    struct Ended<'a>(&'a AtomicBool);
    impl Drop for Ended<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let Some(own) = rayon::current_thread_index().filter(|_| rayon::current_num_threads() > 1) else { return f() };
    let ended = AtomicBool::new(false);
    rayon::in_place_scope(|scope| {
        let _ended = Ended(&ended);
        scope.spawn_broadcast(|_, context| {
            let mut idle = None;
            while context.index() != own && !ended.load(Ordering::Acquire) {
                if rayon::yield_now() == Some(rayon::Yield::Executed) {
                    idle = None;
                } else if idle.get_or_insert_with(Instant::now).elapsed() < LOOKS {
                    std::thread::yield_now();
                } else {
                    std::thread::sleep(NAP);
                }
            }
        });
        f()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    #[test]
    fn freed_memory_is_kept_unless_the_user_says_otherwise() {
        let (option, default) = PURGE_DELAY;
        // SAFETY: as in `keep_freed_memory`.
        let (get, set) = (|| unsafe { mi_option_get(option) }, |value| unsafe { mi_option_set(option, value) });
        // What the environment or the library says.
        let found = get();
        assert!(found == default || std::env::var_os("MIMALLOC_PURGE_DELAY").is_some(), "{found}: another version of mimalloc?");
        for (before, after) in [(default, KEPT_FOR), (0, 0), (-1, -1)] {
            set(before);
            keep_freed_memory();
            assert_eq!(get(), after);
        }
    }

    #[test]
    fn awake_threads_do_the_work_and_end_with_it() -> Result<(), rayon::ThreadPoolBuildError> {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let sum =
                || pool.install(|| awake(|| (0..100u64).map(|i| (0..1000u64).into_par_iter().map(|j| i * j).sum::<u64>()).sum::<u64>()));
            assert_eq!(sum(), 4950 * 499_500);
            let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.install(|| awake(|| panic!("as it should")))));
            assert!(panics.is_err());
            assert_eq!(sum(), 4950 * 499_500, "the pool is of use after a panic");
        }
        assert_eq!(awake(|| 1), 1, "outside a pool");
        Ok(())
    }
}
