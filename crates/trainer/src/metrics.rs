//! `metrics.jsonl`: one line of JSON per optimizer step, and one per validation.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::Result;
use crate::event::StepReport;

/// The metrics file of a run.
pub struct Metrics(PathBuf);

impl Metrics {
    /// The file in a run's folder; it is created by the first line.
    pub fn new(run: &Path) -> Self {
        Self(run.join("metrics.jsonl"))
    }

    /// Drops the lines of steps after `step`, which a resumed run makes again, and a torn last line. A run that starts at step 0 makes
    /// every line again, that of the validation before its first step too.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn keep_until(&self, step: u64) -> Result<()> {
        if !self.0.exists() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&storage::read(&self.0)?).into_owned();
        let kept =
            |line: &&str| step > 0 && serde_json::from_str::<Value>(line).is_ok_and(|v| v["step"].as_u64().is_some_and(|s| s <= step));
        let lines: Vec<&str> = text.lines().filter(kept).collect();
        let mut out = lines.join("\n");
        if !out.is_empty() {
            out.push('\n');
        }
        if out != text {
            storage::write_whole(&self.0, out.as_bytes())?;
        }
        Ok(())
    }

    /// Appends the line of a step.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, report: &StepReport) -> Result<()> {
        Ok(storage::append_line(&self.0, &serde_json::to_string(report).unwrap_or_default())?)
    }

    /// Whether the validation after `step` steps has its line.
    ///
    /// # Errors
    /// If the file exists and cannot be read.
    pub fn has_validation(&self, step: u64) -> Result<bool> {
        if !self.0.exists() {
            return Ok(false);
        }
        let lines = storage::read_to_string(&self.0)?;
        let line_of = |v: Value| v["step"].as_u64() == Some(step) && v.get("validation_loss").is_some();
        Ok(lines.lines().any(|line| serde_json::from_str(line).is_ok_and(line_of)))
    }

    /// Appends the line of a validation after `step` steps.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_validation(&self, step: u64, loss: f64, pictures: usize) -> Result<()> {
        let line = serde_json::json!({ "step": step, "validation_loss": loss, "validation_pictures": pictures });
        Ok(storage::append_line(&self.0, &line.to_string())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_after_a_step_and_torn_ones_are_dropped() {
        let dir = tempfile::tempdir().expect("a folder");
        let metrics = Metrics::new(dir.path());
        metrics.keep_until(3).expect("no file is fine");
        for step in [1, 2, 3] {
            metrics.write_validation(step, 0.5, 4).expect("written");
        }
        let path = dir.path().join("metrics.jsonl");
        let torn = storage::read_to_string(&path).expect("read") + "{\"step\": 2, \"lo";
        storage::write_whole(&path, torn.as_bytes()).expect("written");
        metrics.keep_until(2).expect("kept");
        let text = storage::read_to_string(&path).expect("read");
        assert_eq!(text.lines().count(), 2);
        assert!(text.lines().all(|l| l.contains("validation_loss")) && text.ends_with('\n'));
        assert!(metrics.has_validation(2).expect("read") && !metrics.has_validation(3).expect("read"));
        metrics.keep_until(0).expect("kept");
        assert_eq!(storage::read_to_string(&path).expect("read"), "");
    }
}
