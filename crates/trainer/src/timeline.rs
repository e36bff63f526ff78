//! Which batches belong to which optimizer step: plain arithmetic, so that any step is found without visiting those
//! before it.
//!
//! A step takes the next `accumulation x processes` batches of the epoch's plan, its window; an epoch has as many steps as
//! there are windows, and its last one takes the batches that are left. Gradients are weighted by samples, so a short step is
//! an average like any other. (sd-scripts divides a short window by the full accumulation, so that its samples count less.)
//!
//! # Determinism
//! Batch `i` of a window goes to rank `i mod processes`. Which samples a step sees depends on the window's size alone: 4
//! processes, or 2 that accumulate twice as much, or 1 that accumulates four times as much, see the same samples at each
//! step. What the ranks have to do in a step differs by one batch at most.

use std::ops::Range;

/// The shape of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeline {
    /// Batches of one epoch, the same in every epoch.
    pub batches_per_epoch: u64,
    /// Batches of one optimizer step on one rank.
    pub accumulation: u64,
    /// Ranks that share the batches of a step.
    pub ranks: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
}

impl Timeline {
    /// A run of `max_train_steps` steps, or of `max_train_epochs` epochs, on `ranks` processes.
    pub fn new(batches_per_epoch: u64, accumulation: u64, ranks: u64, max_train_steps: Option<u64>, max_train_epochs: Option<u64>) -> Self {
        let mut timeline = Self { batches_per_epoch, accumulation: accumulation.max(1), ranks: ranks.max(1), total_steps: 0 };
        timeline.total_steps = max_train_steps.unwrap_or_else(|| max_train_epochs.unwrap_or(1) * timeline.steps_per_epoch());
        timeline
    }

    /// Batches of a step that is not cut short by the end of its epoch.
    pub fn batches_per_step(&self) -> u64 {
        self.accumulation * self.ranks
    }

    /// Optimizer steps of one epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.batches_per_epoch.div_ceil(self.batches_per_step()).max(1)
    }

    /// Epoch of step `step` (counted from 0) and the range of its batches in that epoch's plan.
    pub fn window(&self, step: u64) -> (u64, Range<u64>) {
        let (epoch, k) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let start = k * self.batches_per_step();
        (epoch, start..(start + self.batches_per_step()).min(self.batches_per_epoch))
    }

    /// Number of the batch, counted over all epochs, that `rank` takes as number `turn` (from 0, below `accumulation`) of
    /// step `step`; `None` where the end of the epoch leaves nothing for it.
    pub fn batch_of(&self, step: u64, turn: u64, rank: u64) -> Option<u64> {
        let (epoch, range) = self.window(step);
        let k = range.start + turn * self.ranks + rank;
        (k < range.end).then_some(epoch * self.batches_per_epoch + k)
    }

    /// Epoch and place in its plan of a batch counted over all epochs.
    pub fn place(&self, batch: u64) -> (u64, u64) {
        (batch / self.batches_per_epoch.max(1), batch % self.batches_per_epoch.max(1))
    }

    /// Step in which a batch (counted over all epochs) is used.
    pub fn step_of(&self, batch: u64) -> u64 {
        let (epoch, k) = self.place(batch);
        epoch * self.steps_per_epoch() + k / self.batches_per_step()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_every_batch_of_every_epoch_once() {
        for (batches, accumulation, ranks) in [(7, 3, 1), (6, 3, 1), (1, 4, 1), (5, 1, 1), (7, 1, 3), (13, 2, 3), (2, 1, 4)] {
            let t = Timeline::new(batches, accumulation, ranks, None, Some(3));
            assert_eq!(t.total_steps, 3 * batches.div_ceil(accumulation * ranks));
            let mut next = 0;
            for step in 0..t.total_steps {
                let (epoch, range) = t.window(step);
                assert!(!range.is_empty());
                let turns = (0..accumulation).flat_map(|turn| (0..ranks).map(move |rank| (turn, rank)));
                let taken: Vec<u64> = turns.filter_map(|(turn, rank)| t.batch_of(step, turn, rank)).collect();
                assert_eq!(taken, (next..next + (range.end - range.start)).collect::<Vec<_>>());
                for k in range {
                    assert_eq!(t.place(next), (epoch, k));
                    assert_eq!(t.step_of(next), step);
                    next += 1;
                }
            }
            assert_eq!(next, 3 * batches);
        }
    }

    #[test]
    fn the_batches_of_a_step_do_not_depend_on_how_many_share_them() {
        let alone = Timeline::new(29, 8, 1, None, Some(2));
        for (accumulation, ranks) in [(4, 2), (2, 4), (1, 8)] {
            let shared = Timeline::new(29, accumulation, ranks, None, Some(2));
            assert_eq!(shared.total_steps, alone.total_steps);
            for step in 0..alone.total_steps {
                assert_eq!(shared.window(step), alone.window(step));
                let share = |rank| (0..accumulation).filter(|&turn| shared.batch_of(step, turn, rank).is_some()).count();
                let shares: Vec<usize> = (0..ranks).map(share).collect();
                assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1, "{shares:?}");
            }
        }
    }
}
