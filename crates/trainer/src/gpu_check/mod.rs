//! `lokr check-gpu`: whether this machine's GPU computes what the CPU computes, and how fast. What no machine without a GPU can
//! show is gathered in one report that can be pasted into an issue.

mod operations;
mod step;

use std::fmt::Write;

use candle_core::Device;

use crate::config::{DeviceChoice, RunConfig};
use crate::device;
use crate::error::Result;

/// What was measured.
pub struct Report {
    /// The report, as text.
    pub text: String,
    /// Comparisons that were outside their bound.
    pub failed: usize,
}

/// Compares the GPU of this process with the CPU: every operation in f32 and f16, forward and backward; batches on their way there; the
/// optimizer step, bit for bit; and, with a recipe, a whole step of its model, with the time and memory that the step takes.
///
/// # Errors
/// If there is no GPU, or the recipe's model cannot be loaded.
pub fn check(config: Option<&RunConfig>) -> Result<Report> {
    let device = device::choose(DeviceChoice::Cuda)?;
    check_on(&device, config)
}

fn check_on(device: &Device, config: Option<&RunConfig>) -> Result<Report> {
    let mut report = Report { text: String::new(), failed: 0 };
    report.line(&format!("lokr {} on {}", env!("CARGO_PKG_VERSION"), device::describe(device)));
    report.line("");
    report.line("Operations: largest difference from the CPU in f32, relative to the largest value; output and gradients.");
    operations::compare(device, &mut report)?;
    operations::compare_staging(device, &mut report)?;
    #[cfg(feature = "cuda")]
    operations::compare_optimizer(device, &mut report)?;
    if let Some(config) = config {
        report.line("");
        step::compare(device, config, &mut report)?;
    }
    let text =
        if report.failed == 0 { "all comparisons are within their bounds".into() } else { format!("{} comparisons FAILED", report.failed) };
    report.line("");
    report.line(&text);
    Ok(report)
}

impl Report {
    fn line(&mut self, text: &str) {
        _ = writeln!(self.text, "{text}");
    }

    /// Notes a comparison; a difference that is no number fails.
    fn compare(&mut self, what: &str, difference: f64, bound: f64) {
        let good = difference <= bound;
        self.failed += usize::from(!good);
        self.line(&format!("{what:<44} {difference:>9.1e}  (bound {bound:.0e}){}", if good { "" } else { "  FAILED" }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On the CPU as the device, f32 differs by nothing and f16 by its rounding: the comparison itself is at work, and in bounds.
    #[test]
    fn the_cpu_agrees_with_itself() {
        let report = check_on(&Device::Cpu, None).expect("runs");
        assert_eq!(report.failed, 0, "{}", report.text);
        let f16: Vec<&str> = report.text.lines().filter(|l| l.contains("f16")).collect();
        assert!(f16.len() > 20 && f16.iter().any(|l| !l.contains(" 0.0e0")), "{}", report.text);
    }

    #[test]
    fn a_difference_beyond_its_bound_and_one_that_is_no_number_fail() {
        let mut report = Report { text: String::new(), failed: 0 };
        report.compare("in", 1e-6, 1e-5);
        report.compare("out", 1e-4, 1e-5);
        report.compare("none", f64::NAN, 1e-5);
        assert_eq!(report.failed, 2);
        assert_eq!(report.text.matches("FAILED").count(), 2);
    }
}
