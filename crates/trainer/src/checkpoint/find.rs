//! Finding and reading checkpoints: whole ones only.

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use optim::{Optimizer, StateDtype, StateTensor};
use serde::{Deserialize, Serialize};
use storage::safetensors::{Dtype, SafeTensors};

use super::{ADAPTER, FILES, MANIFEST, METRICS, Manifest, OPTIMIZER, RECIPE, RunState, STATE, folder, step_of};
use crate::error::{Error, Result};
use crate::step::Trained;

/// A checkpoint whose files are all there and have their hashes.
#[derive(Serialize, Deserialize)]
pub struct Found {
    /// Its folder.
    pub path: PathBuf,
    /// What the run carried.
    pub state: RunState,
    /// The recipe as run.
    pub recipe: String,
    /// The last lines of the metrics.
    pub metrics: String,
}

fn damaged(path: &Path, what: impl Into<String>) -> Error {
    Error::Checkpoint { path: path.into(), what: what.into() }
}

/// Checks that a folder is a whole checkpoint: every file of its manifest has its length and hash.
///
/// # Errors
/// [`Error::Checkpoint`] naming the first file that is not as written.
pub(super) fn check(path: &Path) -> Result<()> {
    let text = storage::read_to_string(&path.join(MANIFEST)).map_err(|e| damaged(path, format!("no manifest ({e})")))?;
    let manifest: Manifest = serde_json::from_str(&text).map_err(|e| damaged(path, format!("{MANIFEST}: {e}")))?;
    if manifest.format != RunState::FORMAT {
        return Err(damaged(path, format!("format {}, this lokr reads {}", manifest.format, RunState::FORMAT)));
    }
    for file in FILES {
        let Some(sum) = manifest.files.get(file) else { return Err(damaged(path, format!("{MANIFEST} does not list {file}"))) };
        let full = path.join(file);
        let bytes = storage::file_len(&full).map_err(|e| damaged(path, format!("{file}: {e}")))?;
        if bytes != sum.bytes {
            return Err(damaged(path, format!("{file} has {bytes} bytes, {} were written", sum.bytes)));
        }
        if storage::blake3_file(&full)? != sum.blake3 {
            return Err(damaged(path, format!("{file} was altered since it was written")));
        }
    }
    Ok(())
}

/// Opens one checkpoint by its folder.
///
/// # Errors
/// [`Error::Checkpoint`] if it is not whole.
pub fn open(path: &Path) -> Result<Found> {
    check(path)?;
    let state = storage::read_to_string(&path.join(STATE))?;
    let state: RunState = serde_json::from_str(&state).map_err(|e| damaged(path, format!("{STATE}: {e}")))?;
    if let Some(step) = step_of(path).filter(|&step| step != state.step) {
        return Err(damaged(path, format!("it holds step {}, its name says {step}", state.step)));
    }
    let (recipe, metrics) = (storage::read_to_string(&path.join(RECIPE))?, storage::read_to_string(&path.join(METRICS))?);
    Ok(Found { path: path.into(), state, recipe, metrics })
}

/// The newest whole checkpoint of a run, and why each newer one was passed over.
///
/// # Errors
/// If the folder exists and cannot be listed.
pub fn find_newest_whole(run: &Path) -> Result<(Option<Found>, Vec<String>)> {
    let folder = folder(run);
    let mut passed = Vec::new();
    if !folder.exists() {
        return Ok((None, passed));
    }
    let mut all: Vec<(u64, PathBuf)> = storage::list_dir(&folder)?.into_iter().filter_map(|p| Some((step_of(&p)?, p))).collect();
    all.sort();
    for (_, path) in all.into_iter().rev() {
        match open(&path) {
            Ok(found) => return Ok((Some(found), passed)),
            Err(error) => passed.push(error.to_string()),
        }
    }
    Ok((None, passed))
}

/// Removes what a killed process left: checkpoints half written or half deleted, and the temporary files of what a run called `output`
/// writes. Whoever calls it holds the run's lock.
///
/// # Errors
/// If one cannot be removed.
pub fn clean(run: &Path, output: &str) -> Result<()> {
    let ours = [format!(".{output}"), ".recipe.toml".into(), ".metrics.jsonl".into(), ".previews.png".into(), ".step-".into()];
    for place in [run.to_path_buf(), run.join("previews")].into_iter().filter(|p| p.is_dir()) {
        for path in storage::list_dir(&place)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if storage::is_scratch(&path) && ours.iter().any(|start| name.starts_with(start)) {
                storage::remove_file(&path)?;
            }
        }
    }
    let folder = folder(run);
    if !folder.exists() {
        return Ok(());
    }
    for path in storage::list_dir(&folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(".step-") && name.ends_with(".tmp") {
            storage::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

/// Renames the checkpoints that a run starting at `step`, from the checkpoint `from` if not anew, will not go on from: torn ones, and
/// those of a line that is left for an earlier checkpoint. Under their old names they would keep new checkpoints from being written
/// or count among those to keep. Gives the new names.
///
/// # Errors
/// If the folder cannot be listed or one cannot be renamed.
pub fn set_aside(run: &Path, from: Option<&Path>, step: u64) -> Result<Vec<PathBuf>> {
    let folder = folder(run);
    let mut renamed = Vec::new();
    if !folder.exists() {
        return Ok(renamed);
    }
    let from = from.map(Path::file_name);
    for path in storage::list_dir(&folder)? {
        let Some(number) = step_of(&path) else { continue };
        if number < step || from == Some(path.file_name()) {
            continue;
        }
        let aside = folder.join(format!("passed-over-{number:08}"));
        if aside.exists() {
            storage::remove_dir_all(&aside)?;
        }
        storage::rename(&path, &aside)?;
        renamed.push(aside);
    }
    Ok(renamed)
}

impl Found {
    /// Puts the checkpoint's tensors into the adapter and its state into the optimizer.
    ///
    /// # Errors
    /// If a tensor is missing, left over, or of another shape than the recipe's adapter has.
    pub fn restore(&self, trained: &[Trained], optimizer: &mut Optimizer) -> Result<()> {
        self.restore_adapter(trained)?;
        let file = SafeTensors::open(&self.path.join(OPTIMIZER))?;
        let mut tensors = Vec::new();
        for name in file.names() {
            let (Some(info), Some(bytes)) = (file.info(name), file.bytes(name)) else { continue };
            let dtype = match info.dtype {
                Dtype::U8 => StateDtype::U8,
                Dtype::F32 => StateDtype::F32,
                other => return Err(damaged(&self.path, format!("{OPTIMIZER}: {name} is {other:?}"))),
            };
            tensors.push(StateTensor { name: name.into(), dtype, shape: info.shape.clone(), bytes: bytes.into() });
        }
        Ok(optimizer.load_state(tensors)?)
    }

    /// Puts the checkpoint's tensors into the adapter.
    ///
    /// # Errors
    /// As [`Found::restore`].
    pub fn restore_adapter(&self, trained: &[Trained]) -> Result<()> {
        let file = SafeTensors::open(&self.path.join(ADAPTER))?;
        for t in trained {
            let name = t.parameter.name();
            let (Some(info), Some(bytes)) = (file.info(name), file.bytes(name)) else {
                return Err(damaged(&self.path, format!("{ADAPTER} has no tensor {name}, which the recipe's adapter has")));
            };
            let want = t.parameter.tensor();
            if info.shape != want.dims() || info.dtype != Dtype::F32 {
                let what = format!("{name} is {:?} {:?}, the recipe's adapter has f32 {:?}", info.dtype, info.shape, want.dims());
                return Err(damaged(&self.path, what));
            }
            t.parameter.set(Tensor::from_raw_buffer(bytes, candle_core::DType::F32, &info.shape, want.device())?)?;
        }
        if file.names().count() != trained.len() {
            let what = format!("{ADAPTER} has {} tensors, the recipe's adapter {}", file.names().count(), trained.len());
            return Err(damaged(&self.path, what));
        }
        Ok(())
    }
}
