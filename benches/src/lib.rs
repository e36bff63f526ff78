//! What the benches and the programs beside them measure: one training step of a small UNet ([`step`]), the single ops
//! ([`cases`]), the adapted layers of SDXL ([`layers`]) and the loader of pictures ([`loader`]), with what they share: a base
//! model of random weights ([`model`]) and the memory of the process
//! ([`memory`]), and timing on request ([`request`]).
//!
//! The PyTorch side lies in `benches/torch`; `scripts/bench-against-torch.sh` runs both alternately. Results and how to
//! read them are in `docs/benchmarks.md`.

pub mod cases;
pub mod layers;
pub mod loader;
pub mod memory;
pub mod model;
pub mod request;
pub mod step;

use std::error::Error;
use std::process::ExitCode;

/// Any error of the crates that are measured.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Runs `work` as the trainer does, on a thread of a pool of `threads` threads (`None`: one per core).
///
/// # Errors
/// What `work` returns, or that the threads cannot be started.
pub fn in_pool<T: Send>(threads: Option<usize>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    trainer::train::in_pool(threads, || Ok(work()))?
}

/// Ends a program: with success, or with the error told.
pub fn ended(outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The middle of an odd number of values, the mean of the two middle ones otherwise; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => 0.0,
        (n, middle) if n % 2 == 0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
        (_, middle) => sorted[middle],
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn median_takes_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }
}
