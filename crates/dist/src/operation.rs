//! The description of one collective call: what every rank must agree on before any byte moves, and what errors name.

use serde::{Deserialize, Serialize};

/// One collective call. Two ranks take part in the same call only if their descriptions are equal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Operation {
    /// The forming of the group.
    Rendezvous,
    /// A sum over ranks of `elements` numbers.
    AllReduceSum {
        /// The caller's name for it.
        name: String,
        /// How many numbers each rank brings.
        elements: u64,
    },
    /// The largest of one number per rank.
    AllReduceMax {
        /// The caller's name for it.
        name: String,
    },
    /// Whether any rank says yes.
    AnyTrue {
        /// The caller's name for it.
        name: String,
    },
    /// `bytes` bytes of the rank `root` for all.
    Broadcast {
        /// The caller's name for it.
        name: String,
        /// Length of the buffer.
        bytes: u64,
        /// Whose bytes all receive.
        root: usize,
    },
    /// Every rank's bytes for all; lengths may differ.
    AllGather {
        /// The caller's name for it.
        name: String,
    },
    /// All wait for all.
    Barrier {
        /// The caller's name for it.
        name: String,
    },
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Operation::Rendezvous => f.write_str("the rendezvous"),
            Operation::AllReduceSum { name, elements } => write!(f, "all-reduce \"{name}\" of {elements} numbers"),
            Operation::AllReduceMax { name } => write!(f, "maximum \"{name}\""),
            Operation::AnyTrue { name } => write!(f, "decision \"{name}\""),
            Operation::Broadcast { name, bytes, root } => write!(f, "broadcast \"{name}\" of {bytes} bytes from rank {root}"),
            Operation::AllGather { name } => write!(f, "all-gather \"{name}\""),
            Operation::Barrier { name } => write!(f, "barrier \"{name}\""),
        }
    }
}
