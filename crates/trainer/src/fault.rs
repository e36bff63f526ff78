//! Failures on demand, for tests of runs with several processes: the variable `LOKR_FAULT` names one as
//! `RANK:PLACE:STEP:WHAT`, such as `1:forward:3:kill`. Without the variable nothing here does anything.
//!
//! Places: `rendezvous` (step 0), `forward`, `all-reduce`, `checkpoint`. What: `kill` (as by the kernel when memory runs
//! out), `hang` (the process lives and does nothing), `stop` (as by SIGSTOP: not even signs of life); at places of the same names,
//! `weights` (one number of the adapter changes, as by broken memory), `gradient` (the rank's gradient of the step is infinite, its
//! loss is not). After a restart by the launcher it does not happen again.

use crate::error::{Error, Result};

/// A failure that is to happen on this rank, if any.
#[derive(Default)]
pub struct Fault(Option<(String, u64, What)>);

#[derive(Clone, Copy, PartialEq)]
enum What {
    Kill,
    Hang,
    Stop,
    Weights,
    Gradient,
}

impl Fault {
    /// Reads the variable.
    ///
    /// # Errors
    /// If it cannot be understood.
    pub fn from_env(rank: usize) -> Result<Self> {
        let Ok(text) = std::env::var("LOKR_FAULT") else { return Ok(Self::default()) };
        if std::env::var("TORCHELASTIC_RESTART_COUNT").is_ok_and(|n| n != "0") {
            return Ok(Self::default());
        }
        let refuse = || Error::refused(format!("LOKR_FAULT={text} is not RANK:PLACE:STEP:WHAT"), "it is for tests only: unset it");
        let [of, place, step, what] = text.split(':').collect::<Vec<_>>()[..] else { return Err(refuse()) };
        let (Ok(of), Ok(step)) = (of.parse::<usize>(), step.parse()) else { return Err(refuse()) };
        let what = match what {
            "kill" => What::Kill,
            "hang" => What::Hang,
            "stop" => What::Stop,
            "weights" => What::Weights,
            "gradient" => What::Gradient,
            _ => return Err(refuse()),
        };
        Ok(Self((of == rank).then(|| (place.to_string(), step, what))))
    }

    /// Whether the weights are to change here.
    pub fn changes_weights(&self, step: u64) -> bool {
        self.is(What::Weights, step)
    }

    /// What this rank's gradient is multiplied by.
    pub fn gradient_factor(&self, step: u64) -> f64 {
        if self.is(What::Gradient, step) { f64::INFINITY } else { 1.0 }
    }

    fn is(&self, what: What, step: u64) -> bool {
        self.0.as_ref().is_some_and(|(_, at, w)| *w == what && *at == step)
    }

    /// Fails if this is the place.
    pub fn at(&self, place: &str, step: u64) {
        let Some((_, _, what)) = self.0.as_ref().filter(|(p, s, _)| p == place && *s == step) else { return };
        match what {
            // That a signal of one's own is refused is not known to happen; the test would see a run without the failure.
            What::Kill => _ = signal_hook::low_level::raise(signal_hook::consts::SIGKILL),
            What::Stop => _ = signal_hook::low_level::raise(signal_hook::consts::SIGSTOP),
            What::Hang => loop {
                std::thread::park();
            },
            What::Weights | What::Gradient => {}
        }
    }
}
