//! Checkpoints are written on a thread of their own while training goes on.

use std::thread::JoinHandle;

use crate::checkpoint::{self, Snapshot};
use crate::config::OutputConfig;
use crate::error::{Error, Result};
use crate::event::{Event, Observer};

/// Writes checkpoints beside the training: one at a time, so that a step waits for the copy only.
#[derive(Default)]
pub struct Writer(Option<JoinHandle<Result<std::path::PathBuf>>>, Vec<Result<std::path::PathBuf>>);

impl Writer {
    /// Begins to write a snapshot, once the one before is written.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start(&mut self, snapshot: Snapshot, output: &OutputConfig) -> Result<()> {
        self.join();
        let (run, keep_last, keep_every) = (output.dir.clone(), output.keep_last, output.keep_every);
        let write = move || {
            let path = snapshot.write(&run)?;
            checkpoint::delete_old(&run, keep_last, keep_every)?;
            Ok(path)
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(write);
        self.0 = Some(thread.map_err(|e| candle_core::Error::Msg(format!("no thread for writing checkpoints: {e}")))?);
        Ok(())
    }

    fn join(&mut self) {
        if let Some(thread) = self.0.take() {
            self.1.push(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
    }

    /// Reports what has been written. A failed save does not end the run: the last good checkpoint is untouched, and the
    /// next cadence tries again.
    pub fn poll(&mut self, observe: &mut Observer) -> Result<()> {
        if self.0.as_ref().is_some_and(JoinHandle::is_finished) {
            self.join();
        }
        for written in self.1.drain(..) {
            match written {
                Ok(path) => observe(Event::Wrote("checkpoint", path)),
                Err(error) => observe(not_saved("checkpoint", &error)),
            }
        }
        Ok(())
    }

    /// Waits for the last save; its failure is the run's.
    pub fn finish(&mut self, observe: &mut Observer) -> Result<()> {
        self.join();
        let last = self.1.pop();
        self.poll(observe)?;
        if let Some(last) = last {
            observe(Event::Wrote("checkpoint", last?));
        }
        Ok(())
    }
}

impl Drop for Writer {
    /// A run that ends with an error still finishes the checkpoint that is being written.
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            _ = thread.join();
        }
    }
}

/// A save that failed and that the next cadence tries again.
pub fn not_saved(what: &str, error: &Error) -> Event {
    let hint = error.hint().map_or_else(String::new, |h| format!(" ({h})"));
    Event::Warning(format!("the {what} was not saved, training goes on: {}{hint}", chain(error)))
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
