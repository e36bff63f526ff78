//! The crate's error: which variable, address, rank or operation it is about, and, where one exists, the way out.
//! Messages do not repeat their cause; the caller prints the chain of sources once.

use std::io;

use crate::Operation;
#[cfg(feature = "nccl")]
use crate::failure::Peer;
use crate::failure::{Failure, Refusal, Silence, named, seconds};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between processes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A variable that says who this process is cannot be used.
    #[error("{}: {what}", variable(name, value.as_deref()))]
    Variable {
        /// The variable.
        name: &'static str,
        /// Its value; `None` where it is not set.
        value: Option<String>,
        /// What is wrong with it, with the other value where two contradict.
        what: String,
        /// What to do about it.
        way_out: String,
    },
    /// An option of the group or the launcher cannot be used.
    #[error("{what}")]
    Option {
        /// What is wrong, with the values.
        what: String,
        /// What to do about it.
        way_out: String,
    },
    /// Rank 0 cannot listen: another process holds the port.
    #[error("rank 0 cannot listen on {address}: {}", if *span == 1 { "the port is in use".into() } else { format!("this port and the {} after it are in use", span - 1) })]
    PortInUse {
        /// Address and (first) port.
        address: String,
        /// How many ports were tried.
        span: u16,
    },
    /// Rank 0 cannot listen for another reason.
    #[error("rank 0 cannot listen on {address}")]
    Listen {
        /// Address and port.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// Rank 0 was not found at the address where it should listen.
    #[error("rank {rank} did not find rank 0 at {address} within {}: {last}", seconds(*millis))]
    Unreachable {
        /// This process's rank.
        rank: usize,
        /// Address and port.
        address: String,
        /// How long it was tried, in milliseconds.
        millis: u64,
        /// What the last attempt met.
        last: String,
        /// Whether torchrun chose the address.
        torchrun: bool,
    },
    /// Rank 0 turned the group down; all ranks get the same reason.
    #[error("{0}")]
    Refused(Refusal),
    /// The group broke; all ranks that live get the same failure.
    #[error("{}", failed(operation, failure))]
    Failed {
        /// What this rank was in.
        operation: Operation,
        /// What happened.
        failure: Box<Failure>,
    },
    /// NCCL, or the GPU's driver under it, refused a collective.
    #[cfg(feature = "nccl")]
    #[error("NCCL failed in {operation}: {what}")]
    Nccl {
        /// What this rank was in.
        operation: Operation,
        /// NCCL's own word for it.
        what: String,
    },
    /// Several ranks were started on one GPU, of which NCCL needs one for each.
    #[cfg(feature = "nccl")]
    #[error("{} use the same GPU ({gpu})", named(peers))]
    SharedGpu {
        /// The ranks.
        peers: Vec<Peer>,
        /// Its name for the driver, as `nvidia-smi -L` lists it.
        gpu: String,
    },
    /// The system refused something that a group or the launcher needs.
    #[error("cannot {doing}")]
    System {
        /// A verb phrase that fits after "cannot".
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The launcher cannot start a rank.
    #[error("cannot start `{program}` as rank {rank}")]
    Start {
        /// The program.
        program: String,
        /// The rank.
        rank: usize,
        /// What the system said.
        source: io::Error,
    },
}

fn variable(name: &str, value: Option<&str>) -> String {
    value.map_or_else(|| format!("the variable {name} is not set"), |value| format!("the variable {name} is `{value}`"))
}

fn failed(operation: &Operation, failure: &Failure) -> String {
    match failure {
        Failure::Lost { .. } | Failure::Left { .. } | Failure::NoRoute { .. } => format!("in {operation}: {failure}"),
        _ => failure.to_string(),
    }
}

impl Error {
    /// Wraps an [`io::Error`] with what was being done.
    pub(crate) fn system(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::System { doing, source }
    }

    /// Whether the cause lies with another rank. A process that ends for such a reason should end with
    /// [`crate::launch::PEER_FAILED`], so that the launcher looks further for the rank that began.
    pub fn is_peer_failure(&self) -> bool {
        match self {
            Error::Failed { failure, .. } => !matches!(**failure, Failure::Mismatch { .. } | Failure::NoRoute { .. }),
            _ => false,
        }
    }

    /// The way out, where one is known: a sentence for the line after the error.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Variable { way_out, .. } | Error::Option { way_out, .. } => Some(way_out.clone()),
            Error::PortInUse { address, .. } => Some(format!(
                "`ss -ltnp` shows who holds {address}; end that process, or choose another port with MASTER_PORT or \
                 `--rdzv-endpoint host:port` (on a single machine, leave the endpoint out and a free port is taken)"
            )),
            Error::Listen { .. } | Error::System { .. } => None,
            Error::Unreachable { torchrun: true, .. } => Some(
                "torchrun's c10d rendezvous may place rank 0 on another machine than MASTER_ADDR: start it with \
                 `--rdzv-backend static --node-rank N --master-addr HOST`, HOST being the machine of node rank 0"
                    .into(),
            ),
            Error::Unreachable { .. } => Some(
                "check that rank 0 was started, that MASTER_ADDR and MASTER_PORT name its machine and port on every rank, \
                 that its world size is not 1, and that no firewall stands between"
                    .into(),
            ),
            Error::Refused(refusal) => Some(refusal_hint(refusal)),
            Error::Failed { failure, .. } => failure_hint(failure),
            Error::Start { source, program, .. } if source.kind() == io::ErrorKind::NotFound => {
                Some(format!("`{program}` was not found; give its path, or put its folder into PATH"))
            }
            Error::Start { .. } => None,
            #[cfg(feature = "nccl")]
            Error::Nccl { .. } => Some("run again with NCCL_DEBUG=WARN: NCCL then writes what it met".into()),
            #[cfg(feature = "nccl")]
            Error::SharedGpu { .. } => Some(
                "start at most as many processes on a machine as it has GPUs (`nvidia-smi -L` lists them): LOCAL_RANK chooses among those \
                 that CUDA_VISIBLE_DEVICES leaves"
                    .into(),
            ),
        }
    }
}

fn refusal_hint(refusal: &Refusal) -> String {
    match refusal {
        Refusal::Protocol { .. } => "run the same build of the program on all machines".into(),
        Refusal::WorldSize { .. } => {
            "start all ranks with the same number of processes: --nnodes times --nproc-per-node must be the same on all machines".into()
        }
        Refusal::DuplicateRank { .. } => {
            "give each machine its own --node-rank, and see that no process of an earlier run is still there".into()
        }
        Refusal::Fingerprint { .. } => "give all machines the same configuration, base model and data".into(),
    }
}

fn failure_hint(failure: &Failure) -> Option<String> {
    Some(match failure {
        Failure::Lost { peers, silence: Silence::Closed } => format!(
            "look at the last lines of {}; where there are none, its machine's `dmesg` shows whether it was killed for memory",
            named(peers)
        ),
        Failure::Lost { peers, .. } => format!("a process is stopped, a machine is down, or the network to {} is cut", named(peers)),
        Failure::Left { peer } => format!("look at the last lines of rank {peer}: it ended first"),
        Failure::Missing { peers, .. } => {
            format!("see what {} is busy with; where that work may take so long, raise the deadline", named(peers))
        }
        Failure::Stalled { .. } => "see whether a firewall or a broken link stands between these machines".into(),
        Failure::Mismatch { .. } => "all ranks must run the same build with the same configuration; if they do, this is a bug".into(),
        Failure::NoRoute { .. } => {
            "all ranks must reach each other, not only rank 0: open the ports between the machines, or check their host names".into()
        }
    })
}
