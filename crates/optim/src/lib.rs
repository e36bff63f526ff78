//! Optimizers and what stands around them, on plain slices of f32: Lion8bit (block-wise quantized momentum), Lion, AdamW
//! for comparison, learning-rate schedules, gradient clipping, the dynamic loss scaler.
//!
//! Main types: [`Optimizer`] (one state per parameter, steps one parameter at a time, exports its state as named byte
//! tensors), [`Schedule`], [`LossScaler`], and [`clip::global_norm`]. A fast rule stands beside its plain `reference`.
//!
//! # Determinism
//! Nothing here is random. Every result is a function of its arguments alone: work is split at fixed places and joined in
//! a fixed order, whatever the number of threads, and no fused multiply-add is used.
//!
//! Must not know: any other crate of the workspace, tensors and devices, the run's configuration, what a parameter is for.

pub mod adamw;
pub mod clip;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
pub mod lion;
pub mod lion8bit;
pub mod map;
mod optimizer;
mod parallel;
mod scaler;
mod schedule;
mod state;

pub use error::{Error, Result};
pub use optimizer::{Hyper, Optimizer, OptimizerKind};
pub use scaler::{LossScaler, ScalerConfig, ScalerState};
pub use schedule::{Schedule, ScheduleKind, ScheduleOptions};
pub use state::{StateDtype, StateTensor};
