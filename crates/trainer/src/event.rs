//! What a run tells whoever watches it. The trainer prints nothing itself.

use std::path::PathBuf;

/// Numbers of one finished optimizer step.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StepReport {
    /// Steps finished, this one included.
    pub step: u64,
    /// Epoch of its samples, counted from 0.
    pub epoch: u64,
    /// Mean loss of its samples.
    pub loss: f64,
    /// Moving average of the loss (0.98 of the old one).
    pub loss_average: f64,
    /// Learning rate of the UNet.
    pub lr_unet: f64,
    /// Learning rates of the text encoders.
    pub lr_te: [f64; 2],
    /// L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Samples in the step.
    pub samples: usize,
    /// Seconds that it took.
    pub seconds: f64,
    /// Samples per second.
    pub images_per_second: f64,
    /// Whether the step was withheld because its loss or gradient was no number, or skipped because of an overflow.
    pub withheld: bool,
    /// What the loss was multiplied by; f16 only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Steps skipped so far because the gradient overflowed; f16 only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overflows: Option<u64>,
    /// Samples so far whose picture is broken, so that another one of their bucket took their place.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub replaced: u64,
    /// Where the time of each rank went, in rank order.
    #[serde(default)]
    pub phases: Vec<Phases>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Seconds of a rank's part of a step. A slow disk shows in `data`, a slow device in `compute`; the others then have a long
/// `reduce`, and all have one where the link is slow.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Phases {
    /// Waiting for its batches.
    pub data: f64,
    /// Forward and backward passes.
    pub compute: f64,
    /// Waiting for the sums of the gradients after its last backward pass.
    pub reduce: f64,
}

/// Something worth telling.
#[derive(Debug)]
pub enum Event {
    /// A line or a block of lines.
    Note(String),
    /// Something that the user may want to change.
    Warning(String),
    /// Work before the first step: what, how much is done, of how much.
    Preparing(&'static str, usize, usize),
    /// Training starts after `done` of `total` optimizer steps.
    Start {
        /// Steps that an earlier run has made.
        done: u64,
        /// Steps of the whole run.
        total: u64,
    },
    /// A step is finished.
    Step(StepReport),
    /// A file or folder was written.
    Wrote(&'static str, PathBuf),
}

/// Where events go.
pub type Observer<'a> = dyn FnMut(Event) + Send + 'a;
