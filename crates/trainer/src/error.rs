//! The error of a run: what every part below says, and what the trainer itself refuses. The way out is in [`Error::hint`].

use std::path::{Path, PathBuf};

use crate::config::ConfigError;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The recipe cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file.
    #[error(transparent)]
    Storage(#[from] storage::Error),
    /// The base model.
    #[error(transparent)]
    Sdxl(#[from] sdxl::Error),
    /// The adapter.
    #[error(transparent)]
    Lokr(#[from] lokr::Error),
    /// The pictures.
    #[error(transparent)]
    Dataset(#[from] dataset::Error),
    /// The optimizer.
    #[error(transparent)]
    Optim(#[from] optim::Error),
    /// The noise schedule or the loss.
    #[error(transparent)]
    Diffusion(#[from] diffusion::Error),
    /// A tensor operation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// Another process of the run, or the way to it.
    #[error(transparent)]
    Dist(#[from] dist::Error),
    /// Processes that must hold the same weights do not.
    #[error("after step {step} the weights are not the same on all ranks:{}", differing.iter().map(|(rank, tensor)| format!("\n  rank {rank}: {tensor} is not what rank 0 holds")).collect::<String>())]
    RanksDiffer {
        /// Steps finished.
        step: u64,
        /// Ranks that hold something else than rank 0, with the first tensor that differs.
        differing: Vec<(usize, String)>,
    },
    /// A preview could not be written as PNG.
    #[error("the picture `{}` cannot be written", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// Why.
        source: image::ImageError,
    },
    /// A file of a checkpoint does not hold what a checkpoint holds.
    #[error("checkpoint `{}`: {what}", path.display())]
    Checkpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The run folder belongs to another recipe.
    #[error("checkpoint `{}` was made by another recipe:{}", path.display(), differences.iter().map(|d| format!("\n  {d}")).collect::<String>())]
    RecipeChanged {
        /// The checkpoint.
        path: PathBuf,
        /// Key: value then, value now.
        differences: Vec<String>,
    },
    /// The run folder holds checkpoints, and the recipe says to begin anew.
    #[error("`{}` holds checkpoints of an earlier run, and output.resume is \"never\"", path.display())]
    RunExists {
        /// The run folder.
        path: PathBuf,
    },
    /// A part that is trained got no gradient in the first step.
    #[error("no gradient reached the {part} in the first step, though it is trained at a rate of {lr}")]
    NoGradient {
        /// The part.
        part: &'static str,
        /// Its learning rate.
        lr: f64,
    },
    /// A loss or gradient is no number.
    #[error("{what} is not finite at step {step}; samples of the step: {samples}")]
    NotFinite {
        /// Loss, or the gradient of a tensor.
        what: String,
        /// The optimizer step, counted from 1.
        step: u64,
        /// Files of the step's samples.
        samples: String,
        /// The newest checkpoint of the run.
        checkpoint: Option<PathBuf>,
    },
    /// The gradients of f16 training overflow, whatever the loss scale.
    #[error("the gradient overflows f16 in {in_a_row} steps in a row, up to step {step}; the loss scale has fallen to {scale}")]
    Overflow {
        /// The optimizer step, counted from 1.
        step: u64,
        /// Skipped steps in a row.
        in_a_row: u64,
        /// The scale after the last of them.
        scale: f64,
        /// The newest checkpoint of the run.
        checkpoint: Option<PathBuf>,
    },
    /// Another program wrote to the base model during the run.
    #[error("`{}` was changed while it was trained on; step {step} is not applied", path.display())]
    BaseChanged {
        /// The file.
        path: PathBuf,
        /// The optimizer step, counted from 1.
        step: u64,
    },
    /// Anything that the user can mend, with the way out.
    #[error("{what}")]
    Refused {
        /// What is wrong.
        what: String,
        /// The way out.
        hint: String,
    },
}

impl Error {
    /// A refusal with its way out.
    pub fn refused(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Refused { what: what.into(), hint: hint.into() }
    }

    /// Whether the cause lies with another process of the run, which tells it itself.
    pub fn is_peer_failure(&self) -> bool {
        matches!(self, Self::Dist(e) if e.is_peer_failure())
    }

    /// The way out, where one is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Config(e) => e.hint(),
            Self::Storage(e) => e.hint(),
            Self::Sdxl(e) => e.hint(),
            Self::Lokr(e) => e.hint(),
            Self::Dataset(e) => e.hint(),
            Self::Optim(e) => e.hint(),
            Self::Diffusion(e) => e.hint(),
            Self::Dist(e) => e.hint(),
            Self::RanksDiffer { .. } => Some(
                "the checkpoints up to the last one that was written are good: go on from there; if it happens again on the same \
                 machine, its memory or its device is at fault"
                    .into(),
            ),
            Self::Checkpoint { .. } => {
                Some("resume from another checkpoint of the run, or from `latest`, which passes over damaged ones".into())
            }
            Self::RecipeChanged { .. } => {
                Some("restore these keys, choose another output.dir, or resume with --allow-recipe-change if the change is meant".into())
            }
            Self::RunExists { .. } => Some("set output.resume = \"auto\" to go on, or choose another output.dir".into()),
            Self::NoGradient { .. } => Some(
                "the preset adapts nothing of it that the loss depends on: choose another preset, or set its learning rate to 0".into(),
            ),
            Self::NotFinite { checkpoint, .. } => Some(format!(
                "lower the learning rate or check the named pictures; the step was not applied, and {}",
                last_good(checkpoint.as_deref())
            )),
            Self::Overflow { checkpoint, .. } => Some(format!(
                "set train.mixed_precision = \"bf16\" or \"no\", or lower the learning rate; none of these steps was applied, and {}",
                last_good(checkpoint.as_deref())
            )),
            Self::BaseChanged { .. } => Some(
                "put the file back as it was and run the same command again: the run is saved up to the step before. A file that is \
                 replaced by renaming another over it does not disturb a run"
                    .into(),
            ),
            Self::Refused { hint, .. } => Some(hint.clone()),
            Self::Tensor(_) | Self::Picture { .. } => None,
        }
    }
}

fn last_good(checkpoint: Option<&Path>) -> String {
    match checkpoint {
        Some(path) => format!("the last checkpoint of the run is good: {}", path.display()),
        None => "no checkpoint was written yet".into(),
    }
}
