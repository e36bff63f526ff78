//! Which batches belong to which optimizer step: plain arithmetic, so that any step is found without visiting those
//! before it.
//!
//! An epoch has `ceil(batches / accumulation)` steps; its last step takes the batches that are left. Gradients are
//! weighted by samples, so a short step is an average like any other. (sd-scripts divides a short window by the full
//! accumulation, so that its samples count less.)

use std::ops::Range;

/// The shape of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeline {
    /// Batches of one epoch, the same in every epoch.
    pub batches_per_epoch: u64,
    /// Batches of one optimizer step.
    pub accumulation: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
}

impl Timeline {
    /// A run of `max_train_steps` steps, or of `max_train_epochs` epochs.
    pub fn new(batches_per_epoch: u64, accumulation: u64, max_train_steps: Option<u64>, max_train_epochs: Option<u64>) -> Self {
        let mut timeline = Self { batches_per_epoch, accumulation: accumulation.max(1), total_steps: 0 };
        timeline.total_steps = max_train_steps.unwrap_or_else(|| max_train_epochs.unwrap_or(1) * timeline.steps_per_epoch());
        timeline
    }

    /// Optimizer steps of one epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.batches_per_epoch.div_ceil(self.accumulation).max(1)
    }

    /// Epoch of step `step` (counted from 0) and the range of its batches in that epoch's plan.
    pub fn window(&self, step: u64) -> (u64, Range<u64>) {
        let (epoch, k) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let start = k * self.accumulation;
        (epoch, start..(start + self.accumulation).min(self.batches_per_epoch))
    }

    /// Number of the first batch of step `step`, counted over all epochs.
    pub fn first_batch(&self, step: u64) -> u64 {
        let (epoch, range) = self.window(step);
        epoch * self.batches_per_epoch + range.start
    }

    /// Epoch and place in its plan of a batch counted over all epochs.
    pub fn place(&self, batch: u64) -> (u64, u64) {
        (batch / self.batches_per_epoch.max(1), batch % self.batches_per_epoch.max(1))
    }

    /// Step in which a batch (counted over all epochs) is used.
    pub fn step_of(&self, batch: u64) -> u64 {
        let (epoch, k) = self.place(batch);
        epoch * self.steps_per_epoch() + k / self.accumulation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_every_batch_of_every_epoch_once() {
        for (batches, accumulation) in [(7, 3), (6, 3), (1, 4), (5, 1)] {
            let t = Timeline::new(batches, accumulation, None, Some(3));
            assert_eq!(t.total_steps, 3 * batches.div_ceil(accumulation));
            let mut next = 0;
            for step in 0..t.total_steps {
                let (epoch, range) = t.window(step);
                assert!(!range.is_empty());
                assert_eq!(t.first_batch(step), next);
                for k in range {
                    assert_eq!(t.place(next), (epoch, k));
                    assert_eq!(t.step_of(next), step);
                    next += 1;
                }
            }
            assert_eq!(next, 3 * batches);
        }
    }
}
