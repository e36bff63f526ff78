//! `lokr verify`: every file of a run is what was written, and what is in it can be used.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use storage::safetensors::{Dtype, SafeTensors};

use crate::checkpoint::{self, ADAPTER, OPTIMIZER};
use crate::config::RunConfig;
use crate::error::{Error, Result};

/// What was looked at, and what is wrong with it.
#[derive(Debug, Default)]
pub struct Report {
    /// Files that are right.
    pub good: Vec<String>,
    /// Files that are not, with the reason.
    pub bad: Vec<String>,
}

impl Report {
    fn note(&mut self, what: &str, result: std::result::Result<String, String>) {
        match result {
            Ok(detail) => self.good.push(format!("{what}: {detail}")),
            Err(why) => self.bad.push(format!("{what}: {why}")),
        }
    }
}

/// Checks a run's folder: every checkpoint (hashes, a readable state and recipe, finite values), the metrics, and that
/// each exported adapter holds the tensors of the checkpoint of its step.
///
/// # Errors
/// If the folder holds no run.
pub fn verify(run: &Path) -> Result<Report> {
    let folder = checkpoint::folder(run);
    if !folder.is_dir() {
        return Err(Error::refused(format!("`{}` is no run: it has no checkpoints", run.display()), "name a run's output.dir"));
    }
    let mut report = Report::default();
    let mut masters: BTreeMap<u64, SafeTensors> = BTreeMap::new();
    for path in storage::list_dir(&folder)? {
        let Some(step) = checkpoint::step_of(&path) else { continue };
        let name = format!("checkpoints/{}", checkpoint::name(step));
        match check_checkpoint(&path) {
            Ok((adapter, detail)) => {
                masters.insert(step, adapter);
                report.note(&name, Ok(detail));
            }
            Err(error) => report.note(&name, Err(error.to_string())),
        }
    }
    let newest = masters.keys().next_back().copied();
    for path in storage::list_dir(run)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.ends_with(".safetensors") || storage::is_scratch(&path) {
            continue;
        }
        let master = step_of_export(&path, &name).or(newest).and_then(|s| masters.get(&s));
        report.note(&name, check_export(&path, master));
    }
    let metrics = run.join("metrics.jsonl");
    if metrics.exists() {
        let text = storage::read_to_string(&metrics)?;
        let torn = text.lines().position(|l| serde_json::from_str::<serde_json::Value>(l).is_err());
        let outcome = torn.map_or_else(|| Ok(format!("{} lines", text.lines().count())), |n| Err(format!("line {} is torn", n + 1)));
        report.note("metrics.jsonl", outcome);
    }
    Ok(report)
}

/// The step that an exported adapter is of: by its name, or, for that of a run's end, by its metadata; the run may have gone on since.
fn step_of_export(path: &Path, name: &str) -> Option<u64> {
    let by_name = name.trim_end_matches(".safetensors").rsplit_once("-step").and_then(|(_, n)| n.parse().ok());
    by_name.or_else(|| SafeTensors::open(path).ok()?.metadata().get("ss_steps")?.parse().ok())
}

fn check_checkpoint(path: &Path) -> Result<(SafeTensors, String)> {
    let found = checkpoint::open(path)?;
    RunConfig::parse(&found.recipe, &path.join("recipe.toml"), &[])?;
    let mut count = 0;
    for file in [ADAPTER, OPTIMIZER] {
        let tensors = SafeTensors::open(&path.join(file))?;
        for name in tensors.names() {
            count += 1;
            if let Some(values) = values(&tensors, name)
                && let Some(at) = values.iter().position(|v| !v.is_finite())
            {
                return Err(Error::Checkpoint { path: path.into(), what: format!("{file}: {name}[{at}] is {}", values[at]) });
            }
        }
    }
    let adapter = SafeTensors::open(&path.join(ADAPTER))?;
    Ok((adapter, format!("whole, step {}, {count} tensors, all finite", found.state.step)))
}

/// Values of a float tensor; `None` for other types.
fn values(file: &SafeTensors, name: &str) -> Option<Vec<f32>> {
    let bytes = file.bytes(name)?;
    Some(match file.info(name)?.dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => return None,
    })
}

/// The exported tensors are finite, and those that a checkpoint has too are its values, rounded to the file's type.
fn check_export(path: &Path, master: Option<&SafeTensors>) -> std::result::Result<String, String> {
    let file = SafeTensors::open(path).map_err(|e| e.to_string())?;
    let scalars = master.is_some_and(|m| m.names().any(|n| n.ends_with(".scalar")));
    let mut equal = 0;
    for name in file.names() {
        let Some(got) = values(&file, name) else { continue };
        if let Some(at) = got.iter().position(|v| !v.is_finite()) {
            return Err(format!("{name}[{at}] is {}", got[at]));
        }
        // A scalar is folded into w1 when it is exported, so that factors differ by it.
        let Some(want) = master.filter(|_| !scalars).and_then(|m| values(m, name)) else { continue };
        let round = |v: f32| match file.info(name).map(|i| i.dtype) {
            Some(Dtype::F16) => f16::from_f32(v).to_f32(),
            Some(Dtype::BF16) => bf16::from_f32(v).to_f32(),
            _ => v,
        };
        if let Some(at) = got.iter().zip(&want).position(|(g, w)| *g != round(*w)) {
            return Err(format!("{name}[{at}] is {}, the checkpoint has {}", got[at], want[at]));
        }
        equal += 1;
    }
    Ok(match master {
        Some(_) if !scalars => format!("{equal} tensors equal the checkpoint's"),
        _ => format!("{} tensors, all finite; no checkpoint of its step to compare with", file.names().count()),
    })
}
