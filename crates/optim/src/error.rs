//! The crate's error: the name or key, what was found, what was wanted, and the way out.

use crate::StateDtype;

/// What can be wrong with a choice, a state that is loaded, or a run that only overflows.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No optimizer or schedule has this name.
    #[error("no {kind} is called `{name}`")]
    UnknownName {
        /// "optimizer" or "learning-rate schedule".
        kind: &'static str,
        /// What was asked for.
        name: String,
        /// All names there are.
        known: Vec<&'static str>,
    },
    /// A number is outside the range in which the rule means anything.
    #[error("`{key}` is {value}; it must be {wants}")]
    Range {
        /// The option's name.
        key: &'static str,
        /// Its value.
        value: f64,
        /// The range, in words.
        wants: &'static str,
    },
    /// The schedule has no warmup, but one was asked for.
    #[error("`lr_scheduler = \"constant\"` has no warmup, but `lr_warmup_steps` is {warmup}")]
    WarmupWithConstant {
        /// Optimizer steps of warmup.
        warmup: u64,
    },
    /// A state tensor that must be there is not.
    #[error("the optimizer state has no `{name}`")]
    StateMissing {
        /// The tensor's name.
        name: String,
    },
    /// A state tensor that this optimizer has no place for.
    #[error("the optimizer state holds `{name}`, which {kind} with {parameters} parameters has no place for")]
    StateUnknown {
        /// The tensor's name.
        name: String,
        /// The optimizer's name.
        kind: &'static str,
        /// How many parameters it has.
        parameters: usize,
    },
    /// A state tensor appears twice.
    #[error("the optimizer state holds `{name}` twice")]
    StateTwice {
        /// The tensor's name.
        name: String,
    },
    /// A state tensor has another shape than its parameter asks for.
    #[error("the optimizer state's `{name}` has shape {found:?}; its parameter wants {wants:?}")]
    StateShape {
        /// The tensor's name.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape wanted.
        wants: Vec<usize>,
    },
    /// A state tensor has another element type than the optimizer keeps.
    #[error("the optimizer state's `{name}` is {found}; {wants} is wanted")]
    StateDtype {
        /// The tensor's name.
        name: String,
        /// Its element type.
        found: StateDtype,
        /// The one wanted.
        wants: StateDtype,
    },
    /// A state tensor's bytes do not fill its shape.
    #[error("the optimizer state's `{name}` has {found} bytes; its shape wants {wants}")]
    StateBytes {
        /// The tensor's name.
        name: String,
        /// Its bytes.
        found: usize,
        /// The bytes wanted.
        wants: usize,
    },
    /// A saved value is one that no run can have written.
    #[error("the saved `{name}` is {value}; it must be {wants}")]
    StateValue {
        /// The tensor's or field's name.
        name: String,
        /// Its value.
        value: f64,
        /// The range, in words.
        wants: &'static str,
    },
    /// The GPU's driver refused a call, or work before it failed.
    #[cfg(feature = "cuda")]
    #[error("the optimizer step on the GPU failed: {what}")]
    Device {
        /// The driver's words.
        what: String,
    },
    /// Too many optimizer steps in a row were skipped because gradients overflowed.
    #[error("gradients overflowed in {skips} steps in a row; the loss scale is down to {scale}")]
    TooManySkips {
        /// Steps skipped in a row.
        skips: u32,
        /// The loss scale after the last of them.
        scale: f32,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The way out, where one is known: a sentence for the line after the error.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::UnknownName { name, known, .. } => {
                let nearest = known.iter().max_by(|a, b| similarity(name, a).total_cmp(&similarity(name, b)))?;
                let all = known.join(", ");
                Some(if similarity(name, nearest) > 0.7 {
                    format!("did you mean `{nearest}`? There are: {all}")
                } else {
                    format!("there are: {all}")
                })
            }
            Error::Range { .. } | Error::StateTwice { .. } => None,
            #[cfg(feature = "cuda")]
            Error::Device { .. } => None,
            Error::WarmupWithConstant { .. } => Some("use `lr_scheduler = \"constant_with_warmup\"`, or set `lr_warmup_steps = 0`".into()),
            Error::StateMissing { .. } | Error::StateBytes { .. } | Error::StateValue { .. } => {
                Some("the checkpoint is damaged; resume from an earlier one".into())
            }
            Error::StateUnknown { .. } | Error::StateShape { .. } | Error::StateDtype { .. } => {
                Some("resume with the optimizer and the adapter settings that the checkpoint was written with".into())
            }
            Error::TooManySkips { .. } => {
                Some("lower the learning rate, look for NaN in the latents or the base model (an f16 VAE?), or train in bf16 or f32".into())
            }
        }
    }
}

/// Spelling and nothing else: case and the choice of `-` or `_` do not count.
fn similarity(a: &str, b: &str) -> f64 {
    let plain = |s: &str| s.to_lowercase().replace('-', "_");
    strsim::jaro_winkler(&plain(a), &plain(b))
}
