//! Ctrl-C and SIGTERM: the first asks the run to stop at the end of its step, the second ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Exit status of a process that a second signal ended.
pub const STOPPED_AT_ONCE: i32 = 130;

/// A request to stop.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Starts listening to both signals.
    ///
    /// # Errors
    /// The system's.
    pub fn listen() -> std::io::Result<Self> {
        let this = Self::default();
        for signal in [SIGINT, SIGTERM] {
            // In this order: the second signal finds the flag of the first.
            flag::register_conditional_shutdown(signal, STOPPED_AT_ONCE, this.0.clone())?;
            flag::register(signal, this.0.clone())?;
        }
        Ok(this)
    }

    /// Whether a stop was asked for.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Asks for a stop, as a signal does.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
