//! A process group over TCP. It serves CPU runs and tests, and stands beside NCCL on GPUs for the checks at the start
//! and for naming ranks; for gradients of a large model between machines it is not meant.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::failure::{Failure, Peer};
use crate::gather::Settings;
use crate::group::{Handle, Options};
use crate::rendezvous::{find, listen};
use crate::wire::{Event, Frame, Header, Hello, Link, Outgoing};
use crate::worker::{Job, Worker};
use crate::{Error, Operation, Result, World, hub};

/// This process's membership in a group of several. Dropping it says farewell to the others; what was submitted and not
/// waited for is then given up.
pub struct TcpGroup {
    rank: usize,
    peers: Vec<Peer>,
    deadline: Duration,
    jobs: Option<Sender<Job>>,
    worker: Option<JoinHandle<()>>,
    hub: Option<HubThread>,
    closing: Arc<AtomicBool>,
}

/// The hub's thread, in rank 0's process. Waits for it when dropped: its last words to the others are under way.
struct HubThread {
    thread: Option<JoinHandle<()>>,
    closing: Arc<AtomicBool>,
}

impl Drop for HubThread {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl TcpGroup {
    /// Meets the other ranks of `world`. Returns on all ranks when all have come and agree, or with the same error on
    /// all that came.
    ///
    /// # Errors
    /// [`Error::PortInUse`] and [`Error::Listen`] on rank 0, [`Error::Unreachable`] on the others; [`Error::Refused`]
    /// with what differs; [`Error::Failed`] in [`Operation::Rendezvous`] if ranks do not come or die meanwhile.
    pub fn join(world: &World, options: &Options) -> Result<Self> {
        options.check()?;
        if world.rank >= world.world_size {
            let what = format!("rank {} does not exist in a world of {}", world.rank, world.world_size);
            return Err(Error::Option { what, way_out: "ranks count from 0".into() });
        }
        let closing = Arc::new(AtomicBool::new(false));
        let (hub, own) = if world.rank == 0 {
            let (hub, address) = host(world, options, &closing)?;
            (Some(hub), Some(address))
        } else {
            (None, None)
        };
        let me = Peer { rank: world.rank, host: host_name() };
        let mut stream = find(world, options, &me.host, own)?;
        let hello = Hello {
            rank: me.rank,
            world_size: world.world_size,
            host: me.host.clone(),
            pid: std::process::id(),
            fingerprint: options.fingerprint.clone(),
        };
        let talk = Error::system("talk to rank 0");
        let (own_ip, master_ip) = Outgoing::new(&Header::Hello(hello), Vec::new())
            .write_to(&mut stream)
            .and_then(|()| Ok((stream.local_addr()?.ip(), stream.peer_addr()?.ip())))
            .map_err(talk)?;
        let (sender, events) = channel();
        let link = Link::start(stream, 0, options.pulse(), sender)?;
        let (hosts, token) = welcome(&events, &world.master_addr)?;
        let peers: Vec<Peer> = hosts.into_iter().enumerate().map(|(rank, host)| Peer { rank, host }).collect();
        let worker = Worker {
            me,
            peers: peers.clone(),
            link,
            events,
            token,
            own_ip,
            master_ip,
            one_machine: world.local_world_size == world.world_size,
            closing: closing.clone(),
            mesh: None,
            broken: None,
            #[cfg(any(test, feature = "nccl"))]
            pending: crate::pending::Pending::default(),
        };
        let (jobs, submitted) = channel();
        let worker = std::thread::Builder::new()
            .name("dist-worker".into())
            .spawn(move || worker.run(&submitted))
            .map_err(Error::system("start a thread for the process group"))?;
        Ok(Self { rank: world.rank, peers, deadline: options.deadline, jobs: Some(jobs), worker: Some(worker), hub, closing })
    }

    /// This process's rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// All ranks with their machines, in rank order.
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// The sum over ranks of each of `values`, served in the background.
    pub(crate) fn sum(&self, name: &str, values: Vec<f32>) -> Handle {
        let (done, result) = channel();
        let operation = Operation::AllReduceSum { name: name.into(), elements: values.len() as u64 };
        self.submit(Job::Sum { operation: operation.clone(), values, limit: self.deadline, done });
        Handle::waiting(operation, self.peers[self.rank].clone(), result)
    }

    /// Comes to `operation` with `payload` and waits for the hub's reply.
    pub(crate) fn exchange(&self, operation: Operation, payload: Vec<u8>, limit: Option<Duration>) -> Result<Vec<Vec<u8>>> {
        let (done, result) = channel();
        let limit = limit.unwrap_or(self.deadline);
        self.submit(Job::Exchange { operation: operation.clone(), payload, limit, done });
        let gone = || Error::Failed { operation, failure: Box::new(Failure::Left { peer: self.peers[self.rank].clone() }) };
        result.recv().unwrap_or_else(|_| Err(gone()))
    }

    /// Comes to `operation` in the background, and when all ranks have come hands it to the device by `start`. The receiver is told when
    /// that is done; one without a word means that the group was dropped.
    #[cfg(any(test, feature = "nccl"))]
    pub(crate) fn start(&self, operation: Operation, start: crate::pending::Start) -> Receiver<Result<()>> {
        let (done, told) = channel();
        self.submit(Job::Start { operation, start, limit: self.deadline, done });
        told
    }

    /// A worker that has ended drops the job, and its result's channel with it: the waiting side sees that.
    fn submit(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job);
        }
    }
}

impl Drop for TcpGroup {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
        // After the worker's farewell, which is what ends the hub.
        self.hub = None;
    }
}

fn host(world: &World, options: &Options, closing: &Arc<AtomicBool>) -> Result<(HubThread, SocketAddr)> {
    let listener = listen(world)?;
    let address = listener.local_addr().map_err(Error::system("read the address of rank 0's socket"))?;
    let settings =
        Settings { world_size: world.world_size, run_id: world.run_id.clone(), options: options.clone(), closing: closing.clone() };
    let thread = hub::start(listener, settings)?;
    Ok((HubThread { thread: Some(thread), closing: closing.clone() }, address))
}

/// Waits until the group is whole: each rank's machine, and the token of the group's connections.
fn welcome(events: &Receiver<(usize, Event)>, master: &str) -> Result<(Vec<String>, u64)> {
    let failure = loop {
        match events.recv() {
            Ok((_, Event::Frame(Frame { header, .. }))) => match header {
                Header::Welcome { hosts, token } => return Ok((hosts, token)),
                Header::Refused(refusal) => return Err(Error::Refused(refusal)),
                Header::Failed(failure) => break failure,
                _ => {}
            },
            Ok((_, Event::Gone(silence))) => break Failure::Lost { peers: vec![Peer { rank: 0, host: master.into() }], silence },
            Err(_) => break Failure::Left { peer: Peer { rank: 0, host: master.into() } },
        }
    };
    Err(Error::Failed { operation: Operation::Rendezvous, failure: Box::new(failure) })
}

fn host_name() -> String {
    #[cfg(unix)]
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    #[cfg(not(unix))]
    let name = std::env::var("COMPUTERNAME").unwrap_or_default();
    name
}
