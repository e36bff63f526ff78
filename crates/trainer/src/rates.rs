//! Learning rates: each part's own, moved by the schedule.

use lokr::ParameterGroup;
use optim::Schedule;

use crate::base::learning_rate;
use crate::config::RunConfig;
use crate::error::Result;

/// The learning rate of each part at each step.
pub struct Rates([(ParameterGroup, f64, Schedule); 3]);

/// Learning rates of one step.
pub struct StepRates([(ParameterGroup, f64); 3]);

impl Rates {
    /// The schedules of a recipe.
    ///
    /// # Errors
    /// If one is impossible.
    pub fn new(config: &RunConfig, total_steps: u64) -> Result<Self> {
        let rate = |group| -> Result<_> {
            let base = learning_rate(config, group);
            Ok((group, base, config.lr_schedule(total_steps, base)?))
        };
        Ok(Self([rate(ParameterGroup::TextEncoder1)?, rate(ParameterGroup::TextEncoder2)?, rate(ParameterGroup::Unet)?]))
    }

    /// The rates of the step after `step` finished ones.
    pub fn at(&self, step: u64) -> StepRates {
        StepRates(self.0.each_ref().map(|(group, base, schedule)| (*group, base * schedule.factor(step))))
    }
}

impl StepRates {
    /// The rate of a part; 0 where it is not trained.
    pub fn of(&self, group: ParameterGroup) -> f64 {
        self.0.iter().find(|(g, _)| *g == group).map_or(0.0, |(_, rate)| *rate)
    }
}
