//! A rank's own thread for its group: carries out what the trainer submits, in the order of submission, so that sums of
//! finished buckets travel while the backward pass goes on.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use crate::failure::{Failure, Peer, Silence};
use crate::mesh::{Broken, Mesh, SMALL, from_bytes, to_bytes};
#[cfg(any(test, feature = "nccl"))]
use crate::pending::{Pending, Start};
use crate::rendezvous::bind_address;
use crate::wire::{Event, Frame, Header, Link, Outgoing};
use crate::{Error, Operation, Result};

/// How soon a waiting thread sees that its group is being dropped.
const POLL: Duration = Duration::from_millis(50);
/// The hub hears of a lost rank at the same moment as we do; its verdict is the same for all ranks.
const VERDICT: Duration = Duration::from_secs(2);

/// What the trainer submits, and where the result goes. A receiver that is gone wants none.
pub(crate) enum Job {
    Sum {
        operation: Operation,
        values: Vec<f32>,
        limit: Duration,
        done: Sender<Result<Vec<f32>>>,
    },
    Exchange {
        operation: Operation,
        payload: Vec<u8>,
        limit: Duration,
        done: Sender<Result<Vec<Vec<u8>>>>,
    },
    /// When all ranks are about to do `operation`, `start` hands it to the device; `done` is told then, not when the device has done it.
    #[cfg(any(test, feature = "nccl"))]
    Start {
        operation: Operation,
        start: Start,
        limit: Duration,
        done: Sender<Result<()>>,
    },
}

/// State of the thread.
pub(crate) struct Worker {
    pub me: Peer,
    pub peers: Vec<Peer>,
    pub link: Link,
    pub events: Receiver<(usize, Event)>,
    /// Marks the group's connections.
    pub token: u64,
    /// Our address and rank 0's, as this rank uses them.
    pub own_ip: IpAddr,
    pub master_ip: IpAddr,
    pub one_machine: bool,
    pub closing: Arc<AtomicBool>,
    pub mesh: Option<Mesh>,
    pub broken: Option<Failure>,
    /// What devices have not ended.
    #[cfg(any(test, feature = "nccl"))]
    pub pending: Pending,
}

impl Worker {
    pub(crate) fn run(mut self, jobs: &Receiver<Job>) {
        while let Some(job) = self.next(jobs) {
            match job {
                Job::Sum { operation, values, limit, done } => {
                    let result = self.sum(&operation, values, limit);
                    let _ = done.send(result.map_err(|failure| Error::Failed { operation, failure: Box::new(failure) }));
                }
                Job::Exchange { operation, payload, limit, done } => {
                    let result = self.call(&operation, payload, limit);
                    let _ = done.send(result.map_err(|failure| Error::Failed { operation, failure: Box::new(failure) }));
                }
                #[cfg(any(test, feature = "nccl"))]
                Job::Start { operation, start, limit, done } => {
                    let _ = done.send(self.start(operation, start, limit));
                }
            }
        }
        self.link.send(Outgoing::new(&Header::Leave, Vec::new()));
    }

    /// The next job; `None` when the group is dropped.
    #[cfg(not(any(test, feature = "nccl")))]
    fn next(&mut self, jobs: &Receiver<Job>) -> Option<Job> {
        jobs.recv().ok()
    }

    /// The next job; `None` when the group is dropped. Meanwhile sees to it that no device waits for a rank that is lost: the trainer
    /// may be waiting for the device, and could then not be told.
    #[cfg(any(test, feature = "nccl"))]
    fn next(&mut self, jobs: &Receiver<Job>) -> Option<Job> {
        loop {
            let stalled = self.pending.look();
            if stalled.is_some() || !self.pending.is_empty() {
                _ = self.look();
            }
            if let Some((operation, limit)) = stalled.filter(|_| self.broken.is_none()) {
                let peers = self.peers.iter().filter(|peer| peer.rank != self.me.rank).cloned().collect();
                let failure = Failure::Stalled { operation, peers, millis: limit.as_millis() as u64 };
                self.link.send(Outgoing::new(&Header::Failed(failure.clone()), Vec::new()));
                self.verdict(failure);
            }
            if self.state().is_err() {
                self.give_up();
            }
            if self.pending.is_empty() {
                return jobs.recv().ok();
            }
            match jobs.recv_timeout(POLL) {
                Ok(job) => return Some(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    self.give_up();
                    return None;
                }
            }
        }
    }

    /// Comes to `operation` and starts it on the device.
    #[cfg(any(test, feature = "nccl"))]
    fn start(&mut self, operation: Operation, start: Start, limit: Duration) -> Result<()> {
        let failed = |failure| Error::Failed { operation: operation.clone(), failure: Box::new(failure) };
        self.call(&operation, Vec::new(), limit).map_err(failed)?;
        match start() {
            Ok(work) => self.pending.push(operation, limit, work),
            // The device's library says little of the ranks that it did not reach; the hub knows them.
            Err(error) => {
                let cause = self.heard();
                self.tell_others();
                return Err(cause.map_or(error, failed));
            }
        }
        Ok(())
    }

    #[cfg(any(test, feature = "nccl"))]
    fn give_up(&mut self) {
        if !self.pending.is_empty() {
            self.tell_others();
            self.pending.give_up();
        }
    }

    /// Tells the others that this rank does not take its part in what their devices wait for, unless that is known to be so for another
    /// reason. A farewell would not do: it breaks the group for those that call, and they wait for their devices.
    #[cfg(any(test, feature = "nccl"))]
    fn tell_others(&mut self) {
        if self.broken.is_none() {
            self.link.send(Outgoing::new(&Header::Failed(Failure::Left { peer: self.me.clone() }), Vec::new()));
        }
    }

    /// Comes to `operation` and returns the parts of the hub's reply.
    fn call(&mut self, operation: &Operation, payload: Vec<u8>, limit: Duration) -> std::result::Result<Vec<Vec<u8>>, Failure> {
        self.look()?;
        let millis = limit.as_millis() as u64;
        self.link.send(Outgoing::new(&Header::Call { operation: operation.clone(), millis }, payload));
        // No deadline here: the hub keeps it, and the silence of the hub is seen by the link.
        loop {
            match self.events.recv_timeout(POLL) {
                Ok((_, Event::Frame(Frame { header: Header::Reply { parts }, payload }))) => return self.split(&parts, payload),
                Ok((_, event)) => self.note(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.note(Event::Gone(Silence::Closed)),
            }
            self.state()?;
        }
    }

    fn split(&mut self, parts: &[u64], payload: Vec<u8>) -> std::result::Result<Vec<Vec<u8>>, Failure> {
        if let [_] = parts {
            return Ok(vec![payload]);
        }
        let mut rest = payload.as_slice();
        let mut split = Vec::with_capacity(parts.len());
        for &length in parts {
            let Some((part, after)) = usize::try_from(length).ok().and_then(|length| rest.split_at_checked(length)) else {
                self.note(Event::Gone(Silence::Closed));
                self.state()?;
                break;
            };
            split.push(part.to_vec());
            rest = after;
        }
        Ok(split)
    }

    fn sum(&mut self, operation: &Operation, mut values: Vec<f32>, limit: Duration) -> std::result::Result<Vec<f32>, Failure> {
        if values.len() as u64 <= SMALL {
            let parts = self.call(operation, to_bytes(&values), limit)?;
            return Ok(parts.first().map(|part| from_bytes(part)).unwrap_or_default());
        }
        self.call(operation, Vec::new(), limit)?;
        let mesh = match self.mesh.take() {
            Some(mesh) => mesh,
            None => self.connect(limit)?,
        };
        let result = mesh.sum(&mut values, limit, &mut || self.may_go_on());
        let failure = match result {
            Ok(()) => {
                self.mesh = Some(mesh);
                return Ok(values);
            }
            Err(Broken::Told) => Failure::Left { peer: self.me.clone() },
            Err(Broken::Closed(rank)) => Failure::Lost { peers: vec![self.peers[rank].clone()], silence: Silence::Closed },
            Err(Broken::Silent(rank)) => {
                let millis = limit.as_millis() as u64;
                let report = Header::Stuck { operation: operation.clone(), waiting_for: rank, millis };
                self.link.send(Outgoing::new(&report, Vec::new()));
                Failure::Stalled { operation: operation.clone(), peers: vec![self.peers[rank].clone()], millis }
            }
        };
        Err(self.verdict(failure))
    }

    /// Connects to all other ranks; all are here, since all have called.
    fn connect(&mut self, limit: Duration) -> std::result::Result<Mesh, Failure> {
        let operation = Operation::AllGather { name: "addresses of the ranks".into() };
        let place = SocketAddr::new(bind_address(self.own_ip.is_ipv6(), self.one_machine && self.own_ip.is_loopback()), 0);
        let listening = TcpListener::bind(place).and_then(|listener| Ok((listener.local_addr()?.port(), listener)));
        let (port, listener) = match listening {
            Ok(listening) => listening,
            Err(error) => return Err(self.no_route(self.me.rank, &place.to_string(), error.to_string())),
        };
        let gathered = self.call(&operation, SocketAddr::new(self.own_ip, port).to_string().into_bytes(), limit)?;
        let mut addresses = Vec::new();
        for (rank, text) in gathered.iter().enumerate() {
            let text = String::from_utf8_lossy(text);
            match text.parse::<SocketAddr>() {
                // Whoever reaches rank 0 over its loopback is on rank 0's machine.
                Ok(address) if rank == 0 || address.ip().is_loopback() => addresses.push(SocketAddr::new(self.master_ip, address.port())),
                Ok(address) => addresses.push(address),
                Err(error) => return Err(self.no_route(rank, &text, error.to_string())),
            }
        }
        let (rank, token) = (self.me.rank, self.token);
        match Mesh::connect(rank, &listener, &addresses, token, limit, &mut || self.look().is_ok()) {
            Ok(mesh) => Ok(mesh),
            Err((peer, Some(why))) => Err(self.no_route(peer, &addresses[peer].to_string(), why)),
            Err((peer, None)) => {
                let millis = limit.as_millis() as u64;
                Err(self.verdict(Failure::Stalled { operation, peers: vec![self.peers[peer].clone()], millis }))
            }
        }
    }

    /// Tells all ranks that this one cannot reach `to`.
    fn no_route(&mut self, to: usize, address: &str, why: String) -> Failure {
        let failure = Failure::NoRoute { from: self.me.clone(), to: self.peers[to].clone(), address: address.into(), why };
        self.link.send(Outgoing::new(&Header::Failed(failure.clone()), Vec::new()));
        self.verdict(failure)
    }

    /// The hub's verdict, which all ranks get; if none comes, what this rank saw itself.
    fn verdict(&mut self, seen: Failure) -> Failure {
        self.heard();
        self.broken.get_or_insert(seen).clone()
    }

    /// Why the group broke, if the hub says so within a moment.
    fn heard(&mut self) -> Option<Failure> {
        let start = Instant::now();
        while self.broken.is_none() && start.elapsed() < VERDICT && !self.closing.load(Ordering::Relaxed) {
            match self.events.recv_timeout(POLL) {
                Ok((_, event)) => self.note(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.broken.clone()
    }

    /// Takes in what has come meanwhile; an error if the group is broken or being dropped.
    fn look(&mut self) -> std::result::Result<(), Failure> {
        while let Ok((_, event)) = self.events.try_recv() {
            self.note(event);
        }
        self.state()
    }

    /// Whether a sum that is under way may still succeed. A rank that leaves may have its result already, and has then
    /// sent all that it owed; if it has not, its closed connection tells.
    fn may_go_on(&mut self) -> bool {
        self.look().is_ok() || (matches!(self.broken, Some(Failure::Left { .. })) && !self.closing.load(Ordering::Relaxed))
    }

    fn state(&self) -> std::result::Result<(), Failure> {
        match &self.broken {
            Some(failure) => Err(failure.clone()),
            None if self.closing.load(Ordering::Relaxed) => Err(Failure::Left { peer: self.me.clone() }),
            None => Ok(()),
        }
    }

    /// The first failure counts: what follows is its consequence.
    fn note(&mut self, event: Event) {
        let failure = match event {
            Event::Frame(Frame { header: Header::Failed(failure), .. }) => failure,
            Event::Gone(silence) => Failure::Lost { peers: vec![self.peers[0].clone()], silence },
            Event::Frame(_) => return,
        };
        self.broken.get_or_insert(failure);
    }
}
