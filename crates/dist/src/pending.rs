//! Collectives that run on a device, beside the hosts that started them. A device waits for its peers for ever, and its host for the
//! device; so the group's thread keeps a list of them, and gives them up when a rank is lost or nothing moves for too long.

use std::time::{Duration, Instant};

use crate::{Operation, Result};

/// A collective on its way through the device.
pub(crate) trait Work: Send {
    /// Whether the device has come to it: what the device does before is this rank's own.
    fn has_begun(&self) -> bool;
    /// Whether the device is through with it. A device that failed is through with everything.
    fn is_done(&self) -> bool;
    /// Makes the device let go of it, whatever its buffer then holds. The group is of no more use afterwards.
    fn give_up(&self);
}

/// Hands a collective to the device; returns at once.
pub(crate) type Start = Box<dyn FnOnce() -> Result<Box<dyn Work>> + Send>;

/// The collectives that a device has not ended, in the order in which they were started.
#[derive(Default)]
pub(crate) struct Pending(Vec<Item>);

struct Item {
    operation: Operation,
    limit: Duration,
    work: Box<dyn Work>,
    begun: Option<Instant>,
}

impl Pending {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Keeps an eye on `work`, which may take `limit` from the moment at which the device has come to it.
    pub(crate) fn push(&mut self, operation: Operation, limit: Duration, work: Box<dyn Work>) {
        self.0.push(Item { operation, limit, work, begun: None });
    }

    /// Forgets what has ended. Gives the first that has taken longer than its limit, with that limit.
    pub(crate) fn look(&mut self) -> Option<(Operation, Duration)> {
        self.0.retain(|item| !item.work.is_done());
        // One stream: what stands behind another has not begun, whatever it waits for besides.
        let first = self.0.first_mut()?;
        if first.begun.is_none() && first.work.has_begun() {
            first.begun = Some(Instant::now());
        }
        let late = first.begun.is_some_and(|begun| begun.elapsed() >= first.limit);
        late.then(|| (first.operation.clone(), first.limit))
    }

    /// Gives up everything.
    pub(crate) fn give_up(&mut self) {
        self.0.drain(..).for_each(|item| item.work.give_up());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU8, Ordering};

    use super::*;
    use crate::group::Options;
    use crate::launch::free_port;
    use crate::{Launcher, TcpGroup, World};

    const WAITS: u8 = 0;
    const BEGUN: u8 = 1;
    const DONE: u8 = 2;
    const GIVEN_UP: u8 = 3;

    /// A device that does what the test says.
    struct Device(Arc<AtomicU8>);

    impl Work for Device {
        fn has_begun(&self) -> bool {
            self.0.load(Ordering::SeqCst) >= BEGUN
        }

        fn is_done(&self) -> bool {
            self.0.load(Ordering::SeqCst) == DONE
        }

        fn give_up(&self) {
            self.0.store(GIVEN_UP, Ordering::SeqCst);
        }
    }

    fn operation(number: usize) -> Operation {
        Operation::AllReduceSum { name: format!("bucket {number}"), elements: 10 }
    }

    #[test]
    fn time_counts_from_when_the_device_comes_to_it() {
        let states = [WAITS, WAITS].map(|s| Arc::new(AtomicU8::new(s)));
        let mut pending = Pending::default();
        for (number, state) in states.iter().enumerate() {
            pending.push(operation(number), Duration::ZERO, Box::new(Device(state.clone())));
        }
        assert_eq!(pending.look(), None, "the device is busy with what comes before");
        states[0].store(DONE, Ordering::SeqCst);
        assert_eq!(pending.look(), None);
        states[1].store(BEGUN, Ordering::SeqCst);
        assert_eq!(pending.look().map(|(o, _)| o), Some(operation(1)));
        states[1].store(DONE, Ordering::SeqCst);
        assert_eq!(pending.look(), None);
        assert!(pending.is_empty());
    }

    /// Rank 0 of two, whose device works on a sum, and rank 1 as `other` has it. Gives what rank 0's device and next call came to.
    fn with_work_on_the_device(deadline: Duration, other: impl FnOnce(TcpGroup) + Send) -> (u8, String) {
        let port = free_port().unwrap();
        let options =
            Options { heartbeat: Duration::from_millis(100), silence: Duration::from_millis(500), deadline, ..Options::default() };
        let join = |rank| TcpGroup::join(&World::on_this_machine(rank, 2, port, Launcher::None), &options).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let group = join(1);
                let begun: Start = Box::new(|| Ok(Box::new(Device(Arc::new(AtomicU8::new(BEGUN))))));
                group.start(operation(0), begun).recv().unwrap().unwrap();
                other(group);
            });
            let group = join(0);
            let state = Arc::new(AtomicU8::new(BEGUN));
            let device = Device(state.clone());
            group.start(operation(0), Box::new(move || Ok(Box::new(device)))).recv().unwrap().unwrap();
            // The host waits for its device, as in a synchronisation of its stream.
            let start = Instant::now();
            while state.load(Ordering::SeqCst) == BEGUN && start.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_millis(5));
            }
            let next = group.start(operation(1), Box::new(|| panic!("the group is broken"))).recv().unwrap();
            (state.load(Ordering::SeqCst), next.unwrap_err().to_string())
        })
    }

    #[test]
    fn a_rank_that_leaves_frees_the_device_that_waits_for_it_and_is_named() {
        let start = Instant::now();
        let (state, error) = with_work_on_the_device(Duration::from_secs(600), drop);
        assert_eq!(state, GIVEN_UP);
        assert!(start.elapsed() < Duration::from_secs(60), "it was told, and did not find out by the deadline");
        assert!(error.contains("rank 1"), "{error}");
    }

    #[test]
    fn a_device_that_does_not_get_on_is_given_up_after_the_deadline() {
        let waits = |group: TcpGroup| _ = group.start(operation(1), Box::new(|| panic!("rank 0 does not come"))).recv();
        let (state, error) = with_work_on_the_device(Duration::from_millis(700), waits);
        assert_eq!(state, GIVEN_UP);
        assert!(error.contains("bucket 0") || error.contains("did not come"), "{error}");
    }
}
