//! The collectives that training needs, the same for one process and for many: a world of one is a group too, so the
//! training loop has no second form.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use crate::failure::{Failure, Peer, named, seconds};
#[cfg(feature = "nccl")]
use crate::nccl::NcclGroup;
use crate::tcp::TcpGroup;
use crate::wire::Pulse;
use crate::{Error, Operation, Result, World};

/// Ranks that others have been waiting for, for a while; no error yet.
#[derive(Clone, Debug)]
pub struct Wait {
    /// What is waited in.
    pub operation: Operation,
    /// Who has not come.
    pub missing: Vec<Peer>,
    /// Since the first rank came.
    pub waited: Duration,
}

impl std::fmt::Display for Wait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let waited = seconds(self.waited.as_millis() as u64);
        write!(f, "waiting for {} in {} since {waited}", named(&self.missing), self.operation)
    }
}

/// Receives [`Wait`]s: on rank 0, which knows who is missing, and in the rendezvous on the others while they look for
/// rank 0. It must return soon, since the group's thread calls it.
pub type OnWait = Arc<dyn Fn(&Wait) + Send + Sync>;

/// What a group checks when it forms and how long it waits. Give the same on all ranks.
#[derive(Clone)]
pub struct Options {
    /// Named values that must be equal on all ranks: hashes of the recipe, of the data index, of the base model.
    pub fingerprint: Vec<(String, String)>,
    /// How long ranks may take to come to the start. Default: 10 minutes.
    pub rendezvous: Duration,
    /// How long ranks that have come to an operation wait for the last one. Default: 10 minutes.
    pub deadline: Duration,
    /// How often an idle connection carries a sign of life. Default: 3 s.
    pub heartbeat: Duration,
    /// After how long without a sign of life a rank counts as lost. Default: 15 s.
    pub silence: Duration,
    /// After how long a wait is reported to `on_wait`; each further report of it comes after twice the time of the one before, up to 64
    /// times this. Default: 10 s.
    pub notice: Duration,
    /// Told about slow ranks.
    pub on_wait: Option<OnWait>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            fingerprint: Vec::new(),
            rendezvous: Duration::from_secs(600),
            deadline: Duration::from_secs(600),
            heartbeat: Duration::from_secs(3),
            silence: Duration::from_secs(15),
            notice: Duration::from_secs(10),
            on_wait: None,
        }
    }
}

impl Options {
    pub(crate) fn pulse(&self) -> Pulse {
        Pulse { heartbeat: self.heartbeat, silence: self.silence }
    }

    /// How long after a wait's start it is reported when it was `told` times.
    pub(crate) fn notice_after(&self, told: u32) -> Duration {
        let (doubled, same) = (told.min(6), told.saturating_sub(6));
        self.notice.saturating_mul((2 << doubled) - 1 + 64 * same)
    }

    pub(crate) fn tell(&self, wait: &Wait) {
        if let Some(on_wait) = &self.on_wait {
            on_wait(wait);
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let bad = |what: String, way_out: &str| Err(Error::Option { what, way_out: way_out.into() });
        for (name, value) in [("heartbeat", self.heartbeat), ("notice", self.notice), ("deadline", self.deadline)] {
            if value < Duration::from_millis(1) {
                return bad(format!("the {name} of a process group is {value:?}"), "give at least a millisecond");
            }
        }
        if self.silence < self.heartbeat * 2 {
            let what = format!("a rank would count as lost after {:?}, with a heartbeat every {:?}", self.silence, self.heartbeat);
            return bad(what, "give at least two heartbeats");
        }
        Ok(())
    }
}

/// The result of a sum that is under way.
pub struct Handle(Inner);

enum Inner {
    Ready(Result<Vec<f32>>),
    Waiting { operation: Operation, me: Peer, result: Receiver<Result<Vec<f32>>> },
}

impl Handle {
    pub(crate) fn waiting(operation: Operation, me: Peer, result: Receiver<Result<Vec<f32>>>) -> Self {
        Self(Inner::Waiting { operation, me, result })
    }

    /// Waits for the sum: as many numbers as were given, in their order.
    ///
    /// # Errors
    /// [`Error::Failed`], as for [`ProcessGroup::all_reduce_sum`]; also if the group was dropped meanwhile.
    pub fn wait(self) -> Result<Vec<f32>> {
        match self.0 {
            Inner::Ready(done) => done,
            Inner::Waiting { operation, me, result } => {
                result.recv().unwrap_or_else(|_| Err(Error::Failed { operation, failure: Box::new(Failure::Left { peer: me }) }))
            }
        }
    }
}

/// All processes of a run, as one of them sees them.
///
/// Every rank must make the same calls in the same order, with the same names: calls that differ are an error that says
/// who called what. The name stands in errors and nothing else depends on it. After an error the group is of no more use
/// and every call returns that error.
///
/// # Determinism
/// See the crate's page: sums are taken in rank order, so their bits depend on the values and the world size alone.
///
/// # Errors
/// All calls return [`Error::Failed`] if a rank is lost, leaves, does not come within the deadline, or calls something
/// else; it names the operation and the ranks, and is the same on all ranks.
pub enum ProcessGroup {
    /// A world of one: every call returns at once with this rank's own data.
    Single,
    /// Several processes over TCP.
    Tcp(TcpGroup),
    /// Several processes with a GPU each: sums go over NCCL, all else over TCP.
    #[cfg(feature = "nccl")]
    Nccl(NcclGroup),
}

impl ProcessGroup {
    /// Meets the other ranks of `world`.
    ///
    /// # Errors
    /// As [`TcpGroup::join`]; a world of one cannot fail.
    pub fn join(world: &World, options: &Options) -> Result<Self> {
        if world.world_size == 1 { Ok(Self::Single) } else { TcpGroup::join(world, options).map(Self::Tcp) }
    }

    /// The connections to the others; `None` in a world of one.
    fn tcp(&self) -> Option<&TcpGroup> {
        match self {
            Self::Single => None,
            Self::Tcp(group) => Some(group),
            #[cfg(feature = "nccl")]
            Self::Nccl(group) => Some(group.tcp()),
        }
    }

    /// This process's rank, from 0.
    pub fn rank(&self) -> usize {
        self.tcp().map_or(0, TcpGroup::rank)
    }

    /// The number of processes.
    pub fn world_size(&self) -> usize {
        self.tcp().map_or(1, |group| group.peers().len())
    }

    /// Replaces each of `values` by its sum over ranks.
    ///
    /// # Errors
    /// See [`ProcessGroup`].
    pub fn all_reduce_sum(&self, name: &str, values: &mut [f32]) -> Result<()> {
        match self {
            Self::Single => {}
            Self::Tcp(group) => values.copy_from_slice(&group.sum(name, values.to_vec()).wait()?),
            #[cfg(feature = "nccl")]
            Self::Nccl(group) => values.copy_from_slice(&group.sum_of_host(name, values)?),
        }
        Ok(())
    }

    /// Begins a sum and returns: sums are served in the order in which they were submitted, while the caller computes.
    /// Other calls queue behind them.
    pub fn all_reduce_async(&self, name: &str, bucket: Vec<f32>) -> Handle {
        match self {
            Self::Single => Handle(Inner::Ready(Ok(bucket))),
            Self::Tcp(group) => group.sum(name, bucket),
            #[cfg(feature = "nccl")]
            Self::Nccl(group) => Handle(Inner::Ready(group.sum_of_host(name, &bucket))),
        }
    }

    /// The largest of the ranks' values; NaN if any is NaN.
    ///
    /// # Errors
    /// See [`ProcessGroup`].
    pub fn all_reduce_max(&self, name: &str, value: f32) -> Result<f32> {
        let Some(group) = self.tcp() else { return Ok(value) };
        let all = group.exchange(Operation::AllReduceMax { name: name.into() }, value.to_le_bytes().to_vec(), None)?;
        let larger = |a: f32, b: f32| if a.is_nan() || a > b { a } else { b };
        Ok(all.iter().flat_map(|part| crate::mesh::from_bytes(part)).fold(f32::NEG_INFINITY, larger))
    }

    /// Whether any rank says yes: an overflow, a request to stop.
    ///
    /// # Errors
    /// See [`ProcessGroup`].
    pub fn any(&self, name: &str, value: bool) -> Result<bool> {
        let Some(group) = self.tcp() else { return Ok(value) };
        let all = group.exchange(Operation::AnyTrue { name: name.into() }, vec![value.into()], None)?;
        Ok(all.concat().contains(&1))
    }

    /// Overwrites `bytes` with those of rank `root`. All ranks give a buffer of the same length.
    ///
    /// # Errors
    /// See [`ProcessGroup`]; [`Error::Option`] if there is no rank `root`.
    pub fn broadcast(&self, name: &str, bytes: &mut [u8], root: usize) -> Result<()> {
        if root >= self.world_size() {
            let what = format!("broadcast \"{name}\": rank {root} does not exist in a world of {}", self.world_size());
            return Err(Error::Option { what, way_out: "ranks count from 0".into() });
        }
        let Some(group) = self.tcp() else { return Ok(()) };
        let operation = Operation::Broadcast { name: name.into(), bytes: bytes.len() as u64, root };
        let payload = if group.rank() == root { bytes.to_vec() } else { Vec::new() };
        // The length is part of what all ranks agreed on before the root's bytes were sent.
        if let Some(part) = group.exchange(operation, payload, None)?.first().filter(|part| part.len() == bytes.len()) {
            bytes.copy_from_slice(part);
        }
        Ok(())
    }

    /// Every rank's bytes, in rank order; lengths may differ.
    ///
    /// # Errors
    /// See [`ProcessGroup`].
    pub fn all_gather(&self, name: &str, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        match self.tcp() {
            None => Ok(vec![bytes.to_vec()]),
            Some(group) => group.exchange(Operation::AllGather { name: name.into() }, bytes.to_vec(), None),
        }
    }

    /// Waits until all ranks are here.
    ///
    /// # Errors
    /// See [`ProcessGroup`].
    pub fn barrier(&self, name: &str) -> Result<()> {
        self.wait_for_all(name, None)
    }

    /// [`ProcessGroup::barrier`] with a deadline of its own, for work that takes one rank longer than the others. The
    /// longest that any rank gives counts.
    ///
    /// # Errors
    /// See [`ProcessGroup`].
    pub fn barrier_within(&self, name: &str, deadline: Duration) -> Result<()> {
        self.wait_for_all(name, Some(deadline))
    }

    fn wait_for_all(&self, name: &str, deadline: Option<Duration>) -> Result<()> {
        if let Some(group) = self.tcp() {
            group.exchange(Operation::Barrier { name: name.into() }, Vec::new(), deadline)?;
        }
        Ok(())
    }
}
