//! The dynamic loss scaler of f16 training, as `torch.amp.GradScaler`: the loss is multiplied by a scale so that small
//! gradients survive f16; a step whose gradients overflow is skipped and halves the scale, many good ones double it.
//!
//! Early steps commonly skip (65536 is a high start). A run that only skips is broken, so a limit of skips in a row ends it.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the scale moves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScalerConfig {
    /// Scale at the start.
    pub initial_scale: f32,
    /// Multiplies the scale after `growth_interval` good steps in a row.
    pub growth_factor: f32,
    /// Multiplies the scale after each overflow.
    pub backoff_factor: f32,
    /// Good steps in a row before the scale grows.
    pub growth_interval: u32,
    /// Skipped steps in a row that are still endured; one more is an error.
    pub max_consecutive_skips: u32,
    /// Whether the scale moves. Where it does not (bf16, f32), it is 1 and only skips are counted.
    pub enabled: bool,
}

impl Default for ScalerConfig {
    /// torch's numbers, and a limit at which a scale of 65536 has long fallen to 2^-34: scaling does not help that run.
    fn default() -> Self {
        Self {
            initial_scale: 65536.0,
            growth_factor: 2.0,
            backoff_factor: 0.5,
            growth_interval: 2000,
            max_consecutive_skips: 50,
            enabled: true,
        }
    }
}

/// What a checkpoint must keep.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ScalerState {
    /// What the loss is multiplied by.
    pub scale: f32,
    /// Good steps since the last overflow or growth.
    pub good_steps: u32,
    /// Skipped steps in a row.
    pub consecutive_skips: u32,
    /// Skipped steps of the whole run.
    pub total_skips: u64,
}

/// The scaler.
#[derive(Debug, Clone)]
pub struct LossScaler {
    config: ScalerConfig,
    state: ScalerState,
}

impl LossScaler {
    /// A scaler at its start.
    pub fn new(config: ScalerConfig) -> Self {
        let scale = if config.enabled { config.initial_scale } else { 1.0 };
        Self { config, state: ScalerState { scale, good_steps: 0, consecutive_skips: 0, total_skips: 0 } }
    }

    /// A scaler that leaves the loss as it is and only counts skips: for bf16 and f32.
    pub fn disabled() -> Self {
        Self::new(ScalerConfig { enabled: false, ..ScalerConfig::default() })
    }

    /// What the loss is multiplied by.
    pub fn scale(&self) -> f32 {
        self.state.scale
    }

    /// What gradients are multiplied by before they are clipped and used.
    pub fn unscale_factor(&self) -> f32 {
        (1.0 / f64::from(self.state.scale)) as f32
    }

    /// What a checkpoint must keep.
    pub fn state(&self) -> ScalerState {
        self.state
    }

    /// Takes a saved state over. The state of a run with another setting of `enabled` gives its counts, not its scale.
    ///
    /// # Errors
    /// [`Error::StateValue`] if the scale is not a positive number.
    pub fn load_state(&mut self, state: ScalerState) -> Result<()> {
        if !(state.scale > 0.0 && state.scale.is_finite()) {
            return Err(Error::StateValue { name: "scale".into(), value: state.scale.into(), wants: "a positive number" });
        }
        let scale = if self.config.enabled { state.scale } else { 1.0 };
        self.state = ScalerState { scale, ..state };
        Ok(())
    }

    /// Tells the scaler how an optimizer step went, after it was taken or skipped. All ranks must tell the same.
    ///
    /// # Errors
    /// [`Error::TooManySkips`] when more than `max_consecutive_skips` steps in a row overflowed.
    pub fn update(&mut self, overflowed: bool) -> Result<()> {
        let ScalerConfig { growth_factor, backoff_factor, growth_interval, max_consecutive_skips, enabled, .. } = self.config;
        let state = &mut self.state;
        if overflowed {
            state.good_steps = 0;
            state.consecutive_skips += 1;
            state.total_skips += 1;
            if enabled {
                // A scale of zero would make every later gradient zero and look like training.
                state.scale = (state.scale * backoff_factor).max(f32::MIN_POSITIVE);
            }
            if state.consecutive_skips > max_consecutive_skips {
                return Err(Error::TooManySkips { skips: state.consecutive_skips, scale: state.scale });
            }
            return Ok(());
        }
        state.consecutive_skips = 0;
        state.good_steps += 1;
        if enabled && state.good_steps >= growth_interval {
            state.good_steps = 0;
            let grown = state.scale * growth_factor;
            if grown.is_finite() {
                state.scale = grown;
            }
        }
        Ok(())
    }
}
