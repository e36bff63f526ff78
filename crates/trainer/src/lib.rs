//! Training runs: the recipe, the loop, checkpoints and resume, metrics, previews, export.
//!
//! [`config::RunConfig`] is what a recipe says, [`train::train`] runs it, [`checkpoint`] is what it can go on from,
//! [`metadata`] is what a written adapter tells about its run. Nothing is printed here: what is worth telling is an
//! [`event::Event`].
//!
//! It knows every other crate of the workspace. Must not know: `cli`.

pub mod base;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod dataset_tools;
pub mod ddp;
pub mod device;
pub mod error;
pub mod event;
pub mod export;
pub mod fault;
pub mod gpu_check;
pub mod init_base;
pub mod interrupt;
mod latents;
pub mod metadata;
pub mod metrics;
#[cfg(feature = "cuda")]
pub mod on_gpu;
pub mod outputs;
pub mod plan;
pub mod precision;
pub mod preview;
pub mod ranks;
mod rates;
pub mod rehearsal;
pub mod resume;
pub mod setup;
pub mod step;
pub mod sum;
pub mod timeline;
pub mod tools;
pub mod train;
pub mod validation;
pub mod verify;
mod writer;

/// Starting the processes of a run.
pub use dist::launch;
pub use error::{Error, Result};
