//! Diffusion around the network: noise schedule, training noise, loss with its gradient, samplers for previews.
//!
//! Main types: [`Schedule`] (ᾱ, signal-to-noise, noising, targets), [`NoiseConfig`] (keyed draws per sample),
//! [`LossConfig`] (loss, per-sample losses and the gradient that the trainer's backward starts from),
//! [`Sampler`] with [`SamplingPlan`]. The network itself is never called here: [`sample`] takes it as a closure.
//!
//! Shape letters: B batch, C latent channels (4), H and W latent height and width. Latents are already scaled by the
//! VAE's factor. Everything is computed in f32, scalars in f64.
//!
//! Must not know: `ops`, `sdxl`, `lokr`, `optim`, `dataset`, `dist`, `trainer`, `cli`. Of the workspace it knows `random`.

mod choice;
mod loss;
mod noise;
mod sampler;
mod schedule;
mod sigmas;

pub use loss::{HuberSchedule, LossConfig, LossOutput, LossType, PendingLoss};
pub use noise::{BatchNoise, NoiseConfig, SampleKey, add_offset};
pub use sampler::{Sampler, guide, sample};
pub use schedule::{Prediction, Schedule, TRAIN_TIMESTEPS};
pub use sigmas::{SamplingPlan, Spacing};

/// What can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor operation failed: shapes, types or the device.
    #[error("tensor operation failed")]
    Tensor(#[from] candle_core::Error),
    /// A timestep lies outside the schedule.
    #[error("timestep {timestep} is outside 0..{TRAIN_TIMESTEPS}")]
    Timestep {
        /// The offending value.
        timestep: u32,
    },
    /// Two arguments that must have one entry per sample differ in length.
    #[error("{what}: {got} entries for a batch of {batch}")]
    BatchSize {
        /// Which argument.
        what: &'static str,
        /// Its length.
        got: usize,
        /// Length of the batch.
        batch: usize,
    },
    /// The range of training timesteps is empty or leaves the schedule.
    #[error("min_timestep {min} and max_timestep {max} leave no timestep in 0..{TRAIN_TIMESTEPS}")]
    TimestepRange {
        /// First allowed timestep.
        min: u32,
        /// First timestep that is not allowed any more.
        max: u32,
    },
    /// A number of sampling steps that no schedule can be made for.
    #[error("{steps} sampling steps cannot be spaced over {TRAIN_TIMESTEPS} timesteps")]
    Steps {
        /// The number asked for.
        steps: usize,
    },
}

impl Error {
    /// The way out, where there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::TimestepRange { .. } => Some(format!("use min_timestep < max_timestep <= {TRAIN_TIMESTEPS}")),
            Error::Steps { .. } => Some("use between 1 and 999 steps; 20 to 40 are usual".into()),
            _ => None,
        }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
