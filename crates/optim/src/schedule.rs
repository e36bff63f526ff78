//! Learning-rate schedules under the names of sd-scripts (`library/train_util.py`, `get_scheduler_fix`; formulas from
//! transformers `src/transformers/optimization.py`), as pure functions of the step.
//!
//! Steps are optimizer steps, warmup too, at any world size and accumulation. (sd-scripts advances its schedule once per
//! process, so that its integer warmup on four GPUs ends after a quarter of the steps.) Step 0 is the first one: with
//! warmup it has a rate of 0.

use std::f64::consts::PI;
use std::str::FromStr;

use crate::{Error, Result};

/// Which curve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScheduleKind {
    /// 1 throughout; has no warmup.
    Constant,
    /// 1 after the warmup.
    ConstantWithWarmup,
    /// Straight down to 0 at the end.
    Linear,
    /// Half a cosine wave down to 0 at the end.
    Cosine,
    /// `num_cycles` half waves, each starting again at 1.
    CosineWithRestarts,
    /// (1 - progress)^`power` down to a rate of 1e-7.
    Polynomial,
    /// Cosine down to `min_lr_ratio` instead of 0.
    CosineWithMinLr,
    /// 1 / sqrt of the steps since the warmup, in units of `timescale`.
    InverseSqrt,
}

impl ScheduleKind {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Constant,
        Self::ConstantWithWarmup,
        Self::Linear,
        Self::Cosine,
        Self::CosineWithRestarts,
        Self::Polynomial,
        Self::CosineWithMinLr,
        Self::InverseSqrt,
    ];

    /// The name as sd-scripts' `lr_scheduler` writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::ConstantWithWarmup => "constant_with_warmup",
            Self::Linear => "linear",
            Self::Cosine => "cosine",
            Self::CosineWithRestarts => "cosine_with_restarts",
            Self::Polynomial => "polynomial",
            Self::CosineWithMinLr => "cosine_with_min_lr",
            Self::InverseSqrt => "inverse_sqrt",
        }
    }
}

impl FromStr for ScheduleKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| Error::UnknownName {
            kind: "learning-rate schedule",
            name: name.into(),
            known: Self::ALL.map(Self::name).to_vec(),
        })
    }
}

/// What the curves depend on besides the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScheduleOptions {
    /// Optimizer steps over which the rate rises from 0 (`lr_warmup_steps`).
    pub warmup_steps: u64,
    /// Optimizer steps of the whole run (`max_train_steps`).
    pub total_steps: u64,
    /// Half waves of `cosine_with_restarts` and `cosine_with_min_lr` (`lr_scheduler_num_cycles`).
    pub num_cycles: f64,
    /// Exponent of `polynomial` (`lr_scheduler_power`).
    pub power: f64,
    /// Where `cosine_with_min_lr` ends, relative to the base rate (`lr_scheduler_min_lr_ratio`).
    pub min_lr_ratio: f64,
    /// Unit of `inverse_sqrt` in steps (`lr_scheduler_timescale`); by default the warmup, or 10000 without one.
    pub timescale: Option<u64>,
    /// The `learning_rate` option, from which `polynomial` takes its end relative to the base: also for groups with a
    /// rate of their own.
    pub learning_rate: f64,
}

impl Default for ScheduleOptions {
    /// sd-scripts' defaults: no warmup, 1600 steps, one cycle, power 1, `learning_rate` 2e-6; a ratio of 0 is plain cosine.
    fn default() -> Self {
        Self { warmup_steps: 0, total_steps: 1600, num_cycles: 1.0, power: 1.0, min_lr_ratio: 0.0, timescale: None, learning_rate: 2e-6 }
    }
}

/// The rate at which `polynomial` ends.
const POLYNOMIAL_END: f64 = 1e-7;

/// A schedule whose options have been checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    kind: ScheduleKind,
    options: ScheduleOptions,
}

impl Schedule {
    /// Checks the options that `kind` uses.
    ///
    /// # Errors
    /// [`Error::WarmupWithConstant`]; [`Error::Range`] for an option outside the range in which the curve means anything.
    pub fn new(kind: ScheduleKind, options: ScheduleOptions) -> Result<Self> {
        use ScheduleKind::*;
        let ScheduleOptions { warmup_steps, num_cycles, power, min_lr_ratio, timescale, learning_rate, .. } = options;
        if kind == Constant && warmup_steps > 0 {
            return Err(Error::WarmupWithConstant { warmup: warmup_steps });
        }
        let range = |ok: bool, key, value, wants| if ok { Ok(()) } else { Err(Error::Range { key, value, wants }) };
        if matches!(kind, CosineWithRestarts | CosineWithMinLr) {
            range(num_cycles > 0.0 && num_cycles.is_finite(), "lr_scheduler_num_cycles", num_cycles, "more than 0")?;
        }
        if kind == Polynomial {
            range(power >= 0.0 && power.is_finite(), "lr_scheduler_power", power, "at least 0")?;
            range(learning_rate > POLYNOMIAL_END, "learning_rate", learning_rate, "more than 1e-7, where polynomial ends")?;
        }
        if kind == CosineWithMinLr {
            range((0.0..=1.0).contains(&min_lr_ratio), "lr_scheduler_min_lr_ratio", min_lr_ratio, "between 0 and 1")?;
        }
        if kind == InverseSqrt {
            range(timescale != Some(0), "lr_scheduler_timescale", 0.0, "at least 1")?;
        }
        Ok(Self { kind, options })
    }

    /// What the base rate is multiplied by at optimizer step `step` (0 is the first one). The waves of the two cosines
    /// without restarts go on past the end of the run, as the peer's do.
    pub fn factor(&self, step: u64) -> f64 {
        let ScheduleOptions { warmup_steps, total_steps, num_cycles, power, min_lr_ratio, timescale, learning_rate } = self.options;
        if step < warmup_steps {
            return step as f64 / warmup_steps as f64;
        }
        let span = total_steps.saturating_sub(warmup_steps).max(1) as f64;
        let progress = (step - warmup_steps) as f64 / span;
        let half_wave = |x: f64| (0.5 * (1.0 + (PI * x).cos())).max(0.0);
        match self.kind {
            ScheduleKind::Constant | ScheduleKind::ConstantWithWarmup => 1.0,
            ScheduleKind::Linear => (total_steps.saturating_sub(step) as f64 / span).max(0.0),
            ScheduleKind::Cosine => half_wave(progress),
            ScheduleKind::CosineWithRestarts if progress >= 1.0 => 0.0,
            ScheduleKind::CosineWithRestarts => half_wave((num_cycles * progress) % 1.0),
            ScheduleKind::Polynomial if step > total_steps => POLYNOMIAL_END / learning_rate,
            ScheduleKind::Polynomial => ((learning_rate - POLYNOMIAL_END) * (1.0 - progress).powf(power) + POLYNOMIAL_END) / learning_rate,
            ScheduleKind::CosineWithMinLr => half_wave(num_cycles * progress) * (1.0 - min_lr_ratio) + min_lr_ratio,
            ScheduleKind::InverseSqrt => {
                let unit = timescale.unwrap_or(if warmup_steps > 0 { warmup_steps } else { 10_000 }) as f64;
                let shift = unit - warmup_steps as f64;
                1.0 / ((step as f64 + shift) / unit).sqrt()
            }
        }
    }
}
