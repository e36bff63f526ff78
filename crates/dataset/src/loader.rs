//! Work done ahead of its use: threads prepare items k, k+1, .. and hand them over in order through bounded queues.
//!
//! Thread `j` of `n` prepares every n-th item and has a queue of its own; the reader takes from the queues in turn. So
//! the order never depends on who was faster, and what waits in memory is bounded.
//!
//! Left to others: what an item is. It need not be images.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use crossbeam_channel::{Receiver, bounded};

/// Results of `prepare(k)` for each index of a range, in order, computed ahead by threads.
///
/// An error is delivered in its place and does not end the rest: what follows from it is the reader's choice. A panic
/// in `prepare` is passed on to the reader. Dropping it stops the threads after the item each is at and waits for them.
#[derive(Debug)]
pub struct Prefetcher<T> {
    workers: Vec<Worker<T>>,
    next: u64,
    end: u64,
    start: u64,
}

#[derive(Debug)]
struct Worker<T> {
    queue: Option<Receiver<T>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Prefetcher<T> {
    /// Starts preparing the items of `range`.
    ///
    /// `threads` and `ahead` are at least 1. At most `ahead` items (rounded up to a multiple of `threads`) wait finished,
    /// and each thread may hold one more. `prepare` is usually of type `Fn(u64) -> Result<..>`.
    ///
    /// # Errors
    /// The system's, if a thread cannot be started.
    pub fn new<F>(range: std::ops::Range<u64>, threads: usize, ahead: usize, prepare: F) -> std::io::Result<Self>
    where
        F: Fn(u64) -> T + Send + Sync + 'static,
    {
        let prepare = Arc::new(prepare);
        let threads = (threads.max(1) as u64).min(range.end.saturating_sub(range.start).max(1));
        let depth = ahead.max(1).div_ceil(threads as usize);
        let mut workers = Vec::with_capacity(threads as usize);
        for j in 0..threads {
            let (sender, queue) = bounded(depth);
            let (prepare, indices) = (prepare.clone(), (range.start + j..range.end).step_by(threads as usize));
            let thread = Builder::new().name(format!("prefetch-{j}")).spawn(move || {
                for k in indices {
                    // The reader is gone: so is the purpose.
                    if sender.send(prepare(k)).is_err() {
                        return;
                    }
                }
            })?;
            workers.push(Worker { queue: Some(queue), thread: Some(thread) });
        }
        Ok(Self { workers, next: range.start, end: range.end, start: range.start })
    }

    /// Index of the item that [`Iterator::next`] gives next.
    pub fn position(&self) -> u64 {
        self.next
    }
}

impl<T> Iterator for Prefetcher<T> {
    type Item = T;

    /// Waits for the next item; `None` after the last.
    fn next(&mut self) -> Option<T> {
        if self.next >= self.end {
            return None;
        }
        let count = self.workers.len() as u64;
        let worker = &mut self.workers[((self.next - self.start) % count) as usize];
        match worker.queue.as_ref()?.recv() {
            Ok(item) => {
                self.next += 1;
                Some(item)
            }
            // A worker ends before its last item only by a panic.
            Err(_) => {
                self.next = self.end;
                match worker.thread.take().map(JoinHandle::join) {
                    Some(Err(panic)) => resume_unwind(panic),
                    _ => None,
                }
            }
        }
    }
}

impl<T> Drop for Prefetcher<T> {
    fn drop(&mut self) {
        // All queues are closed before any thread is waited for.
        for worker in &mut self.workers {
            worker.queue = None;
        }
        for thread in self.workers.iter_mut().filter_map(|w| w.thread.take()) {
            // A panic that the reader did not come to see must not turn a drop into an abort.
            let _ = thread.join();
        }
    }
}
