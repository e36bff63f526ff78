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
    /// Files that were not looked into, with the reason.
    pub skipped: Vec<String>,
}

/// What is right with a file, or what is wrong.
type Finding = std::result::Result<String, String>;

impl Report {
    fn note(&mut self, what: &str, finding: Finding) {
        match finding {
            Ok(detail) => self.good.push(format!("{what}: {detail}")),
            Err(why) => self.bad.push(format!("{what}: {why}")),
        }
    }

    fn skip(&mut self, what: &str, why: &str) {
        self.skipped.push(format!("{what}: {why}"));
    }
}

/// Checks a run's folder: every checkpoint (hashes, a readable state and recipe, shapes, finite values); that each exported adapter
/// holds the tensors of the checkpoint of its step, all of them, rounded to the file's type; recipe, metrics and previews.
///
/// # Errors
/// If the folder holds no run, or cannot be listed.
pub fn verify(run: &Path) -> Result<Report> {
    let folder = checkpoint::folder(run);
    if !folder.is_dir() {
        return Err(Error::refused(format!("`{}` is no run: it has no checkpoints", run.display()), "name a run's output.dir"));
    }
    let mut report = Report::default();
    let mut masters: BTreeMap<u64, SafeTensors> = BTreeMap::new();
    for path in storage::list_dir(&folder)? {
        let name = format!("checkpoints/{}", file_name(&path));
        let Some(step) = checkpoint::step_of(&path) else {
            let why = if name.contains("/passed-over-") { "not of the run's line, kept by a resume" } else { "no checkpoint by its name" };
            report.skip(&name, why);
            continue;
        };
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
        let name = file_name(&path);
        match name.as_str() {
            "checkpoints" | "run.lock" => {}
            "metrics.jsonl" => report.note(&name, check_metrics(&path)),
            "recipe.toml" => report.note(&name, check_recipe(&path)),
            "previews.png" => report.note(&name, check_picture(&path)),
            "previews" => {
                storage::list_dir(&path)?.iter().for_each(|p| report.note(&format!("previews/{}", file_name(p)), check_picture(p)))
            }
            _ if storage::is_scratch(&path) => report.skip(&name, "left by a process that was killed; it can be deleted"),
            _ if name.ends_with(".safetensors") => {
                let master = step_of_export(&path, &name).or(newest).and_then(|s| masters.get(&s));
                report.note(&name, check_export(&path, master));
            }
            _ => report.skip(&name, "no file of a run"),
        }
    }
    Ok(report)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn check_recipe(path: &Path) -> Finding {
    let text = storage::read_to_string(path).map_err(|e| e.to_string())?;
    RunConfig::parse(&text, path, &[]).map_err(|e| e.to_string())?;
    Ok("a recipe".into())
}

fn check_picture(path: &Path) -> Finding {
    let bytes = storage::read(path).map_err(|e| e.to_string())?;
    let picture = image::load_from_memory(&bytes).map_err(|e| e.to_string())?;
    Ok(format!("{} x {} pixels", picture.width(), picture.height()))
}

/// Every line is whole, and the steps follow each other, none missing and none twice.
fn check_metrics(path: &Path) -> Finding {
    let text = storage::read_to_string(path).map_err(|e| e.to_string())?;
    let mut last: Option<u64> = None;
    for (n, line) in text.lines().enumerate() {
        let value: serde_json::Value = serde_json::from_str(line).map_err(|_| format!("line {} is torn", n + 1))?;
        let Some(step) = value["step"].as_u64() else { return Err(format!("line {} names no step", n + 1)) };
        if value.get("validation_loss").is_some() {
            continue;
        }
        if let Some(before) = last.filter(|b| step != b + 1) {
            return Err(format!("line {} is of step {step}, the one before of step {before}", n + 1));
        }
        last = Some(step);
    }
    Ok(format!("{} lines", text.lines().count()))
}

/// The step that an exported adapter is of: by its name, or, for that of a run's end, by its metadata; the run may have gone on since.
fn step_of_export(path: &Path, name: &str) -> Option<u64> {
    let by_name = name.trim_end_matches(".safetensors").rsplit_once("-step").and_then(|(_, n)| n.parse().ok());
    by_name.or_else(|| SafeTensors::open(path).ok()?.metadata().get("ss_steps")?.parse().ok())
}

fn check_checkpoint(path: &Path) -> Result<(SafeTensors, String)> {
    let found = checkpoint::open(path)?;
    let damaged = |what: String| Error::Checkpoint { path: path.into(), what };
    RunConfig::parse(&found.recipe, &path.join("recipe.toml"), &[])?;
    let mut count = 0;
    let [adapter, optimizer] = [ADAPTER, OPTIMIZER].map(|file| SafeTensors::open(&path.join(file)));
    let (adapter, optimizer) = (adapter?, optimizer?);
    for (file, tensors) in [(ADAPTER, &adapter), (OPTIMIZER, &optimizer)] {
        for name in tensors.names() {
            count += 1;
            if let Some(values) = values(tensors, name)
                && let Some(at) = values.iter().position(|v| !v.is_finite())
            {
                return Err(damaged(format!("{file}: {name}[{at}] is {}", values[at])));
            }
        }
    }
    // The state knows its parameters by number only: each of its moments must have the size of a trained tensor, and no more moments
    // of a size may be there than tensors.
    let mut sizes: BTreeMap<usize, i64> = BTreeMap::new();
    let elements = |file: &SafeTensors, name: &str| file.info(name).map_or(0, |i| i.shape.iter().product::<usize>());
    adapter.names().for_each(|name| *sizes.entry(elements(&adapter, name)).or_default() += 1);
    for name in optimizer.names().filter(|n| n.ends_with(".state1")) {
        let left = sizes.entry(elements(&optimizer, name)).or_default();
        *left -= 1;
        if *left < 0 {
            return Err(damaged(format!(
                "{OPTIMIZER}: {name} has {} elements, which fits no tensor of {ADAPTER}",
                elements(&optimizer, name)
            )));
        }
    }
    let step = found.state.step;
    Ok((adapter, format!("whole, step {step}, {count} tensors, all finite, shapes fit")))
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

/// The exported tensors are finite; they are the checkpoint's, none missing and none more but the alphas, with its values rounded to
/// the file's type.
fn check_export(path: &Path, master: Option<&SafeTensors>) -> Finding {
    let file = SafeTensors::open(path).map_err(|e| e.to_string())?;
    for name in file.names() {
        let got = values(&file, name).ok_or_else(|| format!("{name} is no float tensor"))?;
        if let Some(at) = got.iter().position(|v| !v.is_finite()) {
            return Err(format!("{name}[{at}] is {}", got[at]));
        }
    }
    let Some(master) = master else {
        return Ok(format!("{} tensors, all finite; no checkpoint of its step to compare with", file.names().count()));
    };
    let mut equal = 0;
    for name in master.names().filter(|n| !n.ends_with(".scalar")) {
        compare(&file, master, name)?;
        equal += 1;
    }
    if let Some(more) = file.names().find(|n| !n.ends_with(".alpha") && master.info(n).is_none()) {
        return Err(format!("{more} is no tensor of the checkpoint"));
    }
    Ok(format!("{equal} tensors equal the checkpoint's"))
}

/// One exported tensor against the master of its name.
fn compare(file: &SafeTensors, master: &SafeTensors, name: &str) -> std::result::Result<(), String> {
    let (Some(info), Some(want_info)) = (file.info(name), master.info(name)) else { return Err(format!("{name} is missing")) };
    if info.shape != want_info.shape {
        return Err(format!("{name} is {:?}, the checkpoint has {:?}", info.shape, want_info.shape));
    }
    let (got, mut want) = (values(file, name).unwrap_or_default(), values(master, name).unwrap_or_default());
    let first = name.strip_suffix(".lokr_w1").or_else(|| name.strip_suffix(".lokr_w1_a"));
    if let Some(module) = first {
        // What stands in front of a module is exported in its first factor: the trained scalar, and a scale that alpha cannot tell.
        if let Some(scalar) = values(master, &format!("{module}.scalar")).and_then(|s| s.first().copied()) {
            want.iter_mut().for_each(|w| *w *= scalar);
        }
        if file.metadata().get(lokr::FOLDED_KEY).is_some_and(|v| v == lokr::FOLDED) {
            return same_ratio(name, &got, &want, info.dtype);
        }
    }
    let round = |v: f32| match info.dtype {
        Dtype::F16 => f16::from_f32(v).to_f32(),
        Dtype::BF16 => bf16::from_f32(v).to_f32(),
        _ => v,
    };
    match got.iter().zip(&want).position(|(g, w)| *g != round(*w)) {
        Some(at) => Err(format!("{name}[{at}] is {}, the checkpoint has {}", got[at], want[at])),
        None => Ok(()),
    }
}

/// With a folded scale, which the file does not name, all values stand in one ratio to the masters.
fn same_ratio(name: &str, got: &[f32], want: &[f32], dtype: Dtype) -> std::result::Result<(), String> {
    let largest = want.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())).map_or(0, |(i, _)| i);
    let ratio = got.get(largest).map_or(0.0, |g| f64::from(*g) / f64::from(want[largest]));
    // Half a unit in the last place of the value that the ratio is taken from, and of the one that is compared; and where f16 has
    // fewer digits (below 2^-14), half of its smallest step.
    let (relative, smallest) = match dtype {
        Dtype::F16 => (2f64.powi(-10), 2f64.powi(-25)),
        Dtype::BF16 => (2f64.powi(-7), 0.0),
        _ => (2f64.powi(-22), 0.0),
    };
    let off = |(g, w): (&f32, &f32)| {
        let expected = f64::from(*w) * ratio;
        (f64::from(*g) - expected).abs() > relative * expected.abs() + smallest
    };
    if got.iter().all(|g| *g == 0.0) && want.iter().all(|w| *w == 0.0) {
        return Ok(());
    }
    match got.iter().zip(want).position(off) {
        Some(at) => Err(format!("{name}[{at}] is {}, the checkpoint's {} times the scale is not", got[at], want[at])),
        None => Ok(()),
    }
}
