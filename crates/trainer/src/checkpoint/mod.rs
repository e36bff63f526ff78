//! Checkpoints: what a run needs to go on, in a folder that is whole or absent.
//!
//! # Format, version 2
//! `checkpoints/step-00000360/` under the run's folder (the number is the steps finished) holds
//! - `adapter.safetensors`: the trained tensors in f32, by parameter name;
//! - `optimizer.safetensors`: the optimizer's state, `{parameter index}.{state1|absmax1|state2|step}`;
//! - `state.json`: [`RunState`];
//! - `recipe.toml`: the recipe as run, complete;
//! - `metrics.jsonl`: the last lines of the run's metrics without what a clock measured, from which lost ones are restored;
//! - `manifest.json`: [`Manifest`], length and BLAKE3 hash of each of the above; written last.
//!
//! # What a failure leaves
//! The folder is filled under a temporary name (`.step-00000360.tmp`), each file synced, then renamed and the parent
//! synced. A returned error or a panic leaves at most the temporary folder, which the next write of that step replaces and the next run
//! removes; so do a kill and a power loss. Older checkpoints are removed only after that, and never the newest whole one; they are renamed
//! (`.step-00000360.old.tmp`) before they are emptied, so that a kill leaves no half of one under a checkpoint's name. What a run
//! passes over, torn or from a line that it leaves for an earlier checkpoint, is renamed to `passed-over-00000360` before its first step.

mod compare;
mod find;
mod write;

pub use compare::differences;
pub use find::{Found, clean, find_newest_whole, open, set_aside};
pub use write::{Snapshot, delete_old};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Result;

/// What a run carries besides tensors. What is not in it does not survive a resume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Version of this format.
    pub format: u32,
    /// Version of lokr that wrote it.
    pub lokr: String,
    /// Optimizer steps finished; the next one has this number, counted from 0.
    pub step: u64,
    /// Samples seen.
    pub samples_seen: u64,
    /// Epoch of the next step, counted from 0.
    pub epoch: u64,
    /// Number of the next step's first sample in the dataset.
    pub next_sample: Option<u32>,
    /// Samples whose picture is broken, so that another one of their bucket took their place.
    #[serde(default)]
    pub replaced: u64,
    /// Moving average of the loss.
    pub loss_average: f64,
    /// Steps withheld because of a loss or gradient that is no number, those skipped because of an f16 overflow included.
    pub withheld_steps: u64,
    /// Withheld steps directly before this point.
    pub consecutive_withheld: u64,
    /// Processes of the run that wrote it.
    #[serde(default = "one")]
    pub world_size: u64,
    /// Batches of a step, all processes together: accumulation x processes. 0: the recipe's accumulation.
    #[serde(default)]
    pub batches_per_step: u64,
    /// The loss scale of f16 training and its counters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scaler: Option<optim::ScalerState>,
    /// Fingerprint of the plan of the epoch that the next step belongs to.
    pub plan_fingerprint: String,
    /// Fingerprint of the dataset.
    pub dataset_fingerprint: String,
    /// Hash of the base model (SHA-256).
    pub base_hash: String,
}

fn one() -> u64 {
    1
}

impl RunState {
    /// The current version of the format.
    pub const FORMAT: u32 = 2;
}

/// Length and hash of each file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub format: u32,
    /// By file name.
    pub files: BTreeMap<String, FileSum>,
}

/// Length and hash of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSum {
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3, hex.
    pub blake3: String,
}

pub(crate) const ADAPTER: &str = "adapter.safetensors";
pub(crate) const OPTIMIZER: &str = "optimizer.safetensors";
pub(crate) const STATE: &str = "state.json";
pub(crate) const RECIPE: &str = "recipe.toml";
pub(crate) const METRICS: &str = "metrics.jsonl";
pub(crate) const MANIFEST: &str = "manifest.json";

/// What the manifest lists.
pub(crate) const FILES: [&str; 5] = [ADAPTER, OPTIMIZER, STATE, RECIPE, METRICS];

/// The folder of a run's checkpoints.
pub fn folder(run: &Path) -> PathBuf {
    run.join("checkpoints")
}

/// Name of a checkpoint's folder after `step` steps.
pub fn name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Deletes a checkpoint, which from the first moment on is none by its name.
fn remove(path: &Path, step: u64) -> Result<()> {
    let doomed = path.with_file_name(format!(".{}.old.tmp", name(step)));
    if doomed.exists() {
        storage::remove_dir_all(&doomed)?;
    }
    storage::rename(path, &doomed)?;
    Ok(storage::remove_dir_all(&doomed)?)
}

pub(crate) fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

#[cfg(test)]
mod tests;
