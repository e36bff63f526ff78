//! What the ranks tell each other when a group cannot form or breaks. These values travel over the wire, so that every
//! rank reports the same cause, whoever saw it first; [`crate::Error`] wraps them.

use serde::{Deserialize, Serialize};

use crate::Operation;

/// A rank and the machine it runs on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Peer {
    /// Its rank.
    pub rank: usize,
    /// Its machine's name; empty as long as it has not joined.
    pub host: String,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host.as_str() {
            "" => write!(f, "{}", self.rank),
            host => write!(f, "{} ({host})", self.rank),
        }
    }
}

/// How a lost rank went quiet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Silence {
    /// Its connection was closed without a farewell: its process ended or was killed.
    Closed,
    /// Its connection stands, but nothing was heard for this long: its process is stopped, or the network is cut.
    Quiet {
        /// The time, in milliseconds.
        millis: u64,
    },
}

/// Why a formed group can go no further. It is final: every later call on the group returns it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Failure {
    /// A rank's process ended, was stopped, or its machine cannot be reached.
    Lost {
        /// The rank; several where they fell silent together, as those of a machine that was cut off.
        peers: Vec<Peer>,
        /// How they went.
        silence: Silence,
    },
    /// A rank left the group (it ended, or met an error of its own) while others still call.
    Left {
        /// The rank.
        peer: Peer,
    },
    /// Ranks are alive, but did not come to an operation in time.
    Missing {
        /// The operation that the others wait in.
        operation: Operation,
        /// Who did not come.
        peers: Vec<Peer>,
        /// How long the first that came has waited, in milliseconds.
        millis: u64,
    },
    /// All ranks came to an operation, then ranks stopped to send their part of it.
    Stalled {
        /// The operation.
        operation: Operation,
        /// Whose data did not come.
        peers: Vec<Peer>,
        /// How long nothing came, in milliseconds.
        millis: u64,
    },
    /// The ranks called different operations.
    Mismatch {
        /// Who called what, for the ranks that had called when it was seen.
        calls: Vec<(Peer, Operation)>,
    },
    /// Two ranks that both reach rank 0 cannot reach each other.
    NoRoute {
        /// The rank that tried.
        from: Peer,
        /// The rank that it tried to reach.
        to: Peer,
        /// Address and port that were tried.
        address: String,
        /// What the system said.
        why: String,
    },
}

/// Why rank 0 turned the group down when it should have formed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Refusal {
    /// Two builds that do not speak the same protocol.
    Protocol {
        /// Address of the other process.
        host: String,
        /// Its version of the protocol.
        theirs: u32,
        /// Rank 0's.
        ours: u32,
    },
    /// A rank was started for another world size.
    WorldSize {
        /// The rank.
        peer: Peer,
        /// Its world size.
        theirs: usize,
        /// Rank 0's.
        ours: usize,
    },
    /// Two processes claim one rank.
    DuplicateRank {
        /// The rank.
        rank: usize,
        /// Machine and process number of each.
        processes: [String; 2],
    },
    /// Ranks disagree on what they are about to do.
    Fingerprint {
        /// Each entry that differs.
        differences: Vec<Difference>,
    },
}

/// One fingerprint entry on which ranks differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// The entry's name.
    pub name: String,
    /// Each value that occurs, with the ranks that have it; `None` where the entry is absent. Rank 0's value first.
    pub values: Vec<(Option<String>, Vec<Peer>)>,
}

/// "rank 1 (a)" or "ranks 1 (a), 2 (b)".
pub(crate) fn named(peers: &[Peer]) -> String {
    let list: Vec<String> = peers.iter().map(Peer::to_string).collect();
    format!("{} {}", if list.len() == 1 { "rank" } else { "ranks" }, list.join(", "))
}

/// "1.5 s", "30 s".
pub(crate) fn seconds(millis: u64) -> String {
    if millis.is_multiple_of(1000) || millis >= 60_000 { format!("{} s", millis / 1000) } else { format!("{:.1} s", millis as f64 / 1e3) }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Lost { peers, silence } => {
                write!(f, "{} {} lost: ", named(peers), if peers.len() == 1 { "was" } else { "were" })?;
                match silence {
                    Silence::Closed => f.write_str("the connection closed"),
                    Silence::Quiet { millis } => write!(f, "nothing was heard for {}", seconds(*millis)),
                }
            }
            Failure::Left { peer } => write!(f, "rank {peer} has left the group"),
            Failure::Missing { operation, peers, millis } => {
                write!(f, "{} did not come to {operation} within {}", named(peers), seconds(*millis))
            }
            Failure::Stalled { operation, peers, millis } => {
                write!(f, "no data came from {} for {} in {operation}", named(peers), seconds(*millis))
            }
            Failure::Mismatch { calls } => {
                f.write_str("the ranks called different operations: ")?;
                let list: Vec<String> = calls.iter().map(|(peer, operation)| format!("rank {peer}: {operation}")).collect();
                f.write_str(&list.join("; "))
            }
            Failure::NoRoute { from, to, address, why } => {
                write!(f, "rank {from} cannot reach rank {to} at {address}: {why}")
            }
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refusal::Protocol { host, theirs, ours } => {
                write!(f, "the process at {host} speaks version {theirs} of the group protocol, rank 0 version {ours}")
            }
            Refusal::WorldSize { peer, theirs, ours } => {
                write!(f, "rank {peer} was started for a world of {theirs}, rank 0 for a world of {ours}")
            }
            Refusal::DuplicateRank { rank, processes: [first, second] } => {
                write!(f, "two processes claim rank {rank}: {first} and {second}")
            }
            Refusal::Fingerprint { differences } => {
                f.write_str("the ranks were not started for the same run: ")?;
                let list: Vec<String> = differences.iter().map(Difference::to_string).collect();
                f.write_str(&list.join("; "))
            }
        }
    }
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` is ", self.name)?;
        let shown = |(value, peers): &(Option<String>, Vec<Peer>)| match value {
            Some(value) => format!("`{value}` on {}", named(peers)),
            None => format!("absent on {}", named(peers)),
        };
        let list: Vec<String> = self.values.iter().map(shown).collect();
        f.write_str(&list.join(", "))
    }
}
