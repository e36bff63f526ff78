//! `metrics.jsonl`: one line of JSON per optimizer step, and one per validation.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::Result;
use crate::event::StepReport;

/// Lines of the metrics that a checkpoint keeps.
pub const TAIL_LINES: usize = 100;
/// More than so many lines take.
const TAIL_BYTES: usize = 1 << 18;
/// Keys of a line that a clock measured.
const CLOCK: [&str; 3] = ["seconds", "images_per_second", "phases"];

/// Step of a line and whether it is a validation's: its place in the file. `None` for a torn line.
fn place(line: &str) -> Option<(u64, bool)> {
    let value: Value = serde_json::from_str(line).ok()?;
    Some((value["step"].as_u64()?, value.get("validation_loss").is_some()))
}

fn without_clock(line: &str) -> Option<String> {
    let mut value: Value = serde_json::from_str(line).ok()?;
    let object = value.as_object_mut()?;
    CLOCK.iter().for_each(|key| _ = object.remove(*key));
    Some(value.to_string())
}

/// The metrics file of a run.
pub struct Metrics(PathBuf);

impl Metrics {
    /// The file in a run's folder; it is created by the first line.
    pub fn new(run: &Path) -> Self {
        Self(run.join("metrics.jsonl"))
    }

    /// Drops the lines of steps after `step`, which a resumed run makes again, and torn ones; and puts back those of `tail`, the last
    /// lines of a checkpoint, that the file has not: lines are not synced, and a power loss may take them. A run that starts at step 0
    /// makes every line again, that of the validation before its first step too.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn keep_until(&self, step: u64, tail: &str) -> Result<()> {
        let text = if self.0.exists() { String::from_utf8_lossy(&storage::read(&self.0)?).into_owned() } else { String::new() };
        let places = |text: &'_ str| text.lines().filter_map(|l| Some((place(l)?, l.to_string()))).collect::<Vec<_>>();
        let mut lines: Vec<_> = places(&text).into_iter().filter(|((s, _), _)| step > 0 && *s <= step).collect();
        let there: BTreeSet<_> = lines.iter().map(|(place, _)| *place).collect();
        let lost: Vec<_> = places(tail).into_iter().filter(|(place, _)| step > 0 && !there.contains(place)).collect();
        if !lost.is_empty() {
            lines.extend(lost);
            lines.sort_by_key(|(place, _)| *place);
        }
        let out: String = lines.into_iter().map(|(_, line)| line + "\n").collect();
        if out != text {
            storage::write_whole(&self.0, out.as_bytes())?;
        }
        Ok(())
    }

    /// The file's last lines, up to [`TAIL_LINES`], without what a clock measured, so that equal runs have equal ones.
    ///
    /// # Errors
    /// If the file exists and cannot be read.
    pub fn tail(&self) -> Result<String> {
        if !self.0.exists() {
            return Ok(String::new());
        }
        let from = storage::file_len(&self.0)?.saturating_sub(TAIL_BYTES as u64);
        let bytes = storage::RangeReader::open(&self.0)?.read_up_to(from, TAIL_BYTES)?;
        let text = String::from_utf8_lossy(&bytes);
        // The first line may be cut; it is then no JSON.
        let lines: Vec<String> = text.lines().filter_map(without_clock).collect();
        Ok(lines[lines.len().saturating_sub(TAIL_LINES)..].iter().map(|line| line.clone() + "\n").collect())
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
        metrics.keep_until(3, "").expect("no file is fine");
        assert!(!dir.path().join("metrics.jsonl").exists());
        for step in [1, 2, 3] {
            metrics.write_validation(step, 0.5, 4).expect("written");
        }
        let path = dir.path().join("metrics.jsonl");
        let torn = storage::read_to_string(&path).expect("read") + "{\"step\": 2, \"lo";
        storage::write_whole(&path, torn.as_bytes()).expect("written");
        metrics.keep_until(2, "").expect("kept");
        let text = storage::read_to_string(&path).expect("read");
        assert_eq!(text.lines().count(), 2);
        assert!(text.lines().all(|l| l.contains("validation_loss")) && text.ends_with('\n'));
        assert!(metrics.has_validation(2).expect("read") && !metrics.has_validation(3).expect("read"));
        metrics.keep_until(0, "").expect("kept");
        assert_eq!(storage::read_to_string(&path).expect("read"), "");
    }

    #[test]
    fn lines_that_were_lost_come_back_from_a_checkpoint_and_those_that_are_there_stay() {
        let dir = tempfile::tempdir().expect("a folder");
        let metrics = Metrics::new(dir.path());
        let path = dir.path().join("metrics.jsonl");
        let line = |step: u64| format!("{{\"images_per_second\":2.5,\"loss\":0.1000000000000000{step},\"seconds\":0.1,\"step\":{step}}}");
        metrics.write_validation(0, 0.5, 4).expect("written");
        (1..=3).for_each(|step| storage::append_line(&path, &line(step)).expect("written"));
        metrics.write_validation(3, 0.4, 4).expect("written");
        let whole = storage::read_to_string(&path).expect("read");
        let tail = metrics.tail().expect("read");
        assert_eq!(tail.lines().count(), 5);
        assert!(!tail.contains("second") && tail.contains("\"loss\":0.10000000000000002,"), "to the last digit, without the clock: {tail}");
        metrics.keep_until(3, &tail).expect("kept");
        assert_eq!(storage::read_to_string(&path).expect("read"), whole, "nothing was lost");
        let lines: Vec<&str> = whole.lines().collect();
        storage::write_whole(&path, format!("{}\n{}\n{}\n", lines[1], lines[2], &lines[3][..9]).as_bytes()).expect("written");
        metrics.keep_until(3, &tail).expect("kept");
        let text = storage::read_to_string(&path).expect("read");
        let restored: Vec<&str> = text.lines().collect();
        let kept: Vec<&str> = tail.lines().collect();
        assert_eq!(restored, [kept[0], lines[1], lines[2], kept[3], kept[4]]);
        assert_eq!(metrics.tail().expect("read"), tail, "a further checkpoint has the same lines");
    }

    #[test]
    fn a_checkpoint_keeps_a_bounded_number_of_lines() {
        let dir = tempfile::tempdir().expect("a folder");
        let metrics = Metrics::new(dir.path());
        (1..=TAIL_LINES as u64 + 50).for_each(|step| metrics.write_validation(step, 0.5, 4).expect("written"));
        let tail = metrics.tail().expect("read");
        assert_eq!(
            tail.lines().filter_map(place).collect::<Vec<_>>(),
            (51..=TAIL_LINES as u64 + 50).map(|s| (s, true)).collect::<Vec<_>>()
        );
    }
}
