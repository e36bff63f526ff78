//! The pool of threads: work that goes on beside other work, and threads that stay awake.

use crate::gemm::{bf16, with_bf16};
use candle_core::Tensor;
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
