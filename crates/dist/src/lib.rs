//! Many processes, one training: who this process is, how the processes find each other, what they exchange, and how
//! they are started.
//!
//! Main types: [`World`], read from the variables of torchrun, `lokr launch`, Slurm, Open MPI or PMI; [`ProcessGroup`],
//! the few collectives that training needs, each with a deadline and an error that names the ranks; [`Options`], what a
//! group checks and how long it waits; [`launch::launch`], which starts one process per device and stops all when one dies.
//!
//! [`ProcessGroup`] has a member for a world of one, in which every collective is the identity, and one that works over
//! TCP for CPU runs and tests. With the cargo feature `nccl` there is one for GPUs (`src/nccl.rs`): it keeps a [`TcpGroup`]
//! beside it, for handing out NCCL's unique id, for the checks at the start and for naming ranks that are missing or lost,
//! and passes the same contract tests (`tests/contract`). It sums on a stream of its own, while the caller's stream computes.
//!
//! Nothing here is encrypted or authenticated, as with NCCL: use it on machines and networks that you trust.
//!
//! # Determinism
//! A sum adds the ranks' values in the order of the ranks, element by element, wherever an element stands in a buffer:
//! all ranks get the same bits, a repeated run gets the same bits, and the cut into buckets does not change them. A
//! different world size adds different numbers and may round differently.
//!
//! Must not know: tensors, models, recipes, files, or any other crate of the workspace; it moves bytes and `f32`s.

mod env;
mod error;
mod failure;
mod gather;
mod group;
mod hub;
pub mod launch;
mod mesh;
#[cfg(feature = "nccl")]
mod nccl;
mod operation;
#[cfg(any(test, feature = "nccl"))]
mod pending;
mod rendezvous;
mod slurm;
mod tcp;
mod wire;
mod worker;

pub use env::{Launcher, World};
pub use error::{Error, Result};
pub use failure::{Difference, Failure, Peer, Refusal, Silence};
pub use group::{Handle, OnWait, Options, ProcessGroup, Wait};
#[cfg(feature = "nccl")]
pub use nccl::{DeviceHandle, NcclGroup};
pub use operation::Operation;
pub use tcp::TcpGroup;
