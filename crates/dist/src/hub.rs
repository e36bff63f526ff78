//! The hub: a thread of rank 0's process that every rank, rank 0 too, is connected to. A collective starts when all
//! ranks have called it with the same description. The hub therefore knows who is late, who called something else and
//! who is gone, and tells all ranks the same verdict; short messages also travel through it.
//!
//! It works while rank 0's main thread computes, so a lost rank is noticed at once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::failure::{Failure, Peer, Silence};
use crate::gather::{Gathered, Settings, gather};
use crate::group::{Options, Wait};
use crate::mesh::{SMALL, from_bytes, to_bytes};
use crate::wire::{Event, Frame, Header, Link, Outgoing};
use crate::{Error, Operation, Result};

/// After the first rank says that data does not come, the others get this long to say the same.
const REPORTS: Duration = Duration::from_millis(500);

/// Starts the hub on `listener`.
///
/// # Errors
/// [`Error::System`] if the thread cannot be started.
pub(crate) fn start(listener: TcpListener, settings: Settings) -> Result<JoinHandle<()>> {
    let work = move || {
        let (events, received) = channel();
        let Some(Gathered { links, peers }) = gather(&listener, &settings, &events, &received) else { return };
        // Closed first: whoever knocks now belongs to another group.
        drop(listener);
        let hosts = peers.iter().map(|peer| peer.host.clone()).collect();
        let welcome = Outgoing::new(&Header::Welcome { hosts, token: token() }, Vec::new());
        links.iter().for_each(|link| link.send(welcome.clone()));
        let mut hub = Hub { links, peers, options: settings.options, pending: None, left: BTreeSet::new(), stuck: None, quiet: None };
        while !hub.done() {
            match received.recv_timeout(hub.due()) {
                Ok((rank, event)) => hub.event(rank, event),
                Err(RecvTimeoutError::Timeout) => hub.time(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    };
    std::thread::Builder::new().name("dist-hub".into()).spawn(work).map_err(Error::system("start a thread for the process group"))
}

/// Marks the connections of one group, so that a stray one is not taken for a rank. It keeps no secret.
fn token() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    (now.as_nanos() as u64) ^ (u64::from(std::process::id()) << 32)
}

struct Hub {
    /// By rank; empty once the verdict is out.
    links: Vec<Link>,
    peers: Vec<Peer>,
    options: Options,
    pending: Option<Pending>,
    left: BTreeSet<usize>,
    stuck: Option<Stuck>,
    /// Ranks that fell silent, and when the verdict is due.
    quiet: Option<(Instant, Silence, BTreeSet<usize>)>,
}

/// The collective that ranks are coming to. There is never a second one: a rank calls again only after the reply, and
/// the reply goes out only after all have called.
struct Pending {
    operation: Operation,
    since: Instant,
    limit: Duration,
    notices: u32,
    calls: Vec<Option<Vec<u8>>>,
}

struct Stuck {
    operation: Operation,
    millis: u64,
    until: Instant,
    /// Who waits for whom.
    reports: BTreeMap<usize, usize>,
}

impl Hub {
    fn done(&self) -> bool {
        self.links.is_empty() || self.left.len() == self.links.len()
    }

    /// How long until a deadline or a notice falls due.
    fn due(&self) -> Duration {
        let pending = self.pending.iter().flat_map(|pending| [pending.since + pending.limit, pending.next_notice(&self.options)]);
        let stuck = self.stuck.iter().map(|stuck| stuck.until);
        let next = pending.chain(stuck).chain(self.quiet.iter().map(|(until, ..)| *until)).min();
        next.map_or(Duration::from_secs(3600), |next| next.saturating_duration_since(Instant::now()))
    }

    fn time(&mut self) {
        let now = Instant::now();
        if self.quiet.as_ref().is_some_and(|(until, ..)| *until <= now) {
            return self.lose_the_quiet();
        }
        if let Some(Stuck { operation, millis, reports, .. }) = self.stuck.take_if(|stuck| stuck.until <= now) {
            let peers = blamed(&reports).into_iter().map(|rank| self.peers[rank].clone()).collect();
            return self.fail(&Failure::Stalled { operation, peers, millis });
        }
        let Some(pending) = &mut self.pending else { return };
        let waited = now.saturating_duration_since(pending.since);
        let missing: Vec<Peer> =
            pending.calls.iter().zip(&self.peers).filter(|(call, _)| call.is_none()).map(|(_, peer)| peer.clone()).collect();
        if waited >= pending.limit {
            let operation = pending.operation.clone();
            self.fail(&Failure::Missing { operation, peers: missing, millis: waited.as_millis() as u64 });
        } else if now >= pending.next_notice(&self.options) {
            pending.notices += 1;
            self.options.tell(&Wait { operation: pending.operation.clone(), missing, waited });
        }
    }

    fn event(&mut self, rank: usize, event: Event) {
        if self.left.contains(&rank) {
            return;
        }
        let peer = self.peers[rank].clone();
        match event {
            Event::Gone(Silence::Closed) => self.fail(&Failure::Lost { peers: vec![peer], silence: Silence::Closed }),
            Event::Gone(silence) => {
                // What is cut off with it falls silent within a heartbeat, and belongs into the same verdict.
                let until = Instant::now() + self.options.heartbeat + REPORTS;
                self.quiet.get_or_insert((until, silence, BTreeSet::new())).2.insert(rank);
            }
            Event::Frame(Frame { header, payload }) => match header {
                Header::Call { operation, millis } => self.call(rank, operation, Duration::from_millis(millis), payload),
                Header::Failed(failure) => self.fail(&failure),
                Header::Stuck { operation, waiting_for, millis } => {
                    let until = Instant::now() + REPORTS;
                    let stuck = self.stuck.get_or_insert_with(|| Stuck { operation, millis, until, reports: BTreeMap::new() });
                    stuck.reports.insert(rank, waiting_for);
                }
                // Without rank 0 there is no hub, and without one that others wait for there is no group.
                Header::Leave if rank == 0 || self.pending.is_some() => self.fail(&Failure::Left { peer }),
                Header::Leave => {
                    self.left.insert(rank);
                }
                Header::Hello(_) | Header::Welcome { .. } | Header::Refused(_) | Header::Reply { .. } | Header::Ping => {}
            },
        }
    }

    fn lose_the_quiet(&mut self) {
        if let Some((_, silence, ranks)) = self.quiet.take() {
            let peers = ranks.into_iter().map(|rank| self.peers[rank].clone()).collect();
            self.fail(&Failure::Lost { peers, silence });
        }
    }

    fn call(&mut self, rank: usize, operation: Operation, limit: Duration, payload: Vec<u8>) {
        if let Some(&gone) = self.left.first() {
            return self.fail(&Failure::Left { peer: self.peers[gone].clone() });
        }
        let world_size = self.peers.len();
        let pending = self.pending.get_or_insert_with(|| Pending {
            operation: operation.clone(),
            since: Instant::now(),
            limit,
            notices: 0,
            calls: vec![None; world_size],
        });
        if pending.operation != operation {
            let came = pending.calls.iter().zip(&self.peers).filter(|(call, _)| call.is_some());
            let mut calls: Vec<_> = came.map(|(_, peer)| (peer.clone(), pending.operation.clone())).collect();
            calls.push((self.peers[rank].clone(), operation));
            calls.sort_by_key(|(peer, _)| peer.rank);
            return self.fail(&Failure::Mismatch { calls });
        }
        pending.limit = pending.limit.max(limit);
        pending.calls[rank] = Some(payload);
        if pending.calls.iter().all(Option::is_some)
            && let Some(Pending { operation, calls, .. }) = self.pending.take()
        {
            let reply = answer(&operation, calls.into_iter().flatten().collect());
            self.links.iter().for_each(|link| link.send(reply.clone()));
        }
    }

    /// The last words to all; dropping the links sends them off.
    fn fail(&mut self, failure: &Failure) {
        let farewell = Outgoing::new(&Header::Failed(failure.clone()), Vec::new());
        self.links.iter().for_each(|link| link.send(farewell.clone()));
        self.links.clear();
    }
}

impl Pending {
    fn next_notice(&self, options: &Options) -> Instant {
        self.since + options.notice_after(self.notices)
    }
}

/// What all ranks get back, from what each brought, in rank order.
fn answer(operation: &Operation, mut calls: Vec<Vec<u8>>) -> Outgoing {
    let parts = match operation {
        Operation::Barrier { .. } | Operation::Rendezvous => Vec::new(),
        Operation::AllReduceSum { elements, .. } if *elements > SMALL => Vec::new(),
        Operation::AllReduceSum { .. } => vec![sum(&calls)],
        Operation::Broadcast { root, .. } => vec![calls.swap_remove(*root)],
        Operation::AllReduceMax { .. } | Operation::AnyTrue { .. } | Operation::AllGather { .. } => calls,
    };
    let lengths = parts.iter().map(|part| part.len() as u64).collect();
    Outgoing::new(&Header::Reply { parts: lengths }, parts.concat())
}

fn sum(calls: &[Vec<u8>]) -> Vec<u8> {
    let mut ranks = calls.iter().map(|call| from_bytes(call));
    let mut total = ranks.next().unwrap_or_default();
    for rank in ranks {
        total.iter_mut().zip(rank).for_each(|(total, value)| *total += value);
    }
    to_bytes(&total)
}

/// Whose fault it is, from who waits for whom: a rank that is waited for and does not itself wait. Where all of them
/// wait, the links between them are to blame, and all that are waited for are named.
fn blamed(reports: &BTreeMap<usize, usize>) -> BTreeSet<usize> {
    let waited_for: BTreeSet<usize> = reports.values().copied().collect();
    let quiet: BTreeSet<usize> = waited_for.iter().copied().filter(|rank| !reports.contains_key(rank)).collect();
    if quiet.is_empty() { waited_for } else { quiet }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_that_waits_for_nobody_is_blamed() {
        let blame = |pairs: &[(usize, usize)]| blamed(&pairs.iter().copied().collect()).into_iter().collect::<Vec<_>>();
        // Rank 2 waits for 1 only because 1 waits for 3.
        assert_eq!(blame(&[(0, 3), (1, 3), (2, 1)]), [3]);
        assert_eq!(blame(&[(1, 3), (3, 1)]), [1, 3], "a cut link between two that are alive");
    }
}
