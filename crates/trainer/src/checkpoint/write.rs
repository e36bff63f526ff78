//! Taking a snapshot, writing it, and removing old ones.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Device;
use ops::F32;
use optim::{Optimizer, StateDtype};
use storage::safetensors::{Dtype, TensorSource};

use super::{ADAPTER, FILES, FileSum, MANIFEST, METRICS, Manifest, OPTIMIZER, RECIPE, RunState, STATE, folder, name, remove, step_of};
use crate::error::Result;
use crate::step::Trained;

/// A tensor's name, type, shape and bytes.
struct Owned {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A copy of everything that a checkpoint holds, independent of the running training.
pub struct Snapshot {
    adapter: Vec<Owned>,
    optimizer: Vec<Owned>,
    state: RunState,
    recipe: String,
    metrics: String,
}

impl Snapshot {
    /// Copies the trained tensors, the optimizer's state and the rest. `metrics`: the last lines of the metrics.
    ///
    /// # Errors
    /// If a tensor cannot be copied to the host.
    pub fn take(trained: &[Trained], optimizer: &Optimizer, state: RunState, recipe: String, metrics: String) -> Result<Self> {
        let mut adapter = Vec::with_capacity(trained.len());
        for t in trained {
            let tensor = t.parameter.tensor();
            let on_cpu = tensor.to_device(&Device::Cpu)?;
            let bytes = F32::new(&on_cpu)?.iter().flat_map(|v| v.to_le_bytes()).collect();
            adapter.push(Owned { name: t.parameter.name().to_string(), dtype: Dtype::F32, shape: tensor.dims().to_vec(), bytes });
        }
        let dtype = |d| match d {
            StateDtype::U8 => Dtype::U8,
            StateDtype::F32 => Dtype::F32,
        };
        let own = |s: optim::StateTensor| Owned { name: s.name, dtype: dtype(s.dtype), shape: s.shape, bytes: s.bytes.into_owned() };
        Ok(Self { adapter, optimizer: optimizer.state()?.into_iter().map(own).collect(), state, recipe, metrics })
    }

    /// Steps finished at the time of the snapshot.
    pub fn step(&self) -> u64 {
        self.state.step
    }

    /// Writes the checkpoint under `run` and gives its folder. If a whole one of the same step stands there already, it is left as it
    /// is: the same step of the same run has the same content.
    ///
    /// # Errors
    /// If a file cannot be written; no checkpoint is touched then.
    pub fn write(&self, run: &Path) -> Result<PathBuf> {
        let target = folder(run).join(name(self.state.step));
        if super::find::check(&target).is_ok() {
            return Ok(target);
        }
        let scratch = folder(run).join(format!(".{}.tmp", name(self.state.step)));
        if scratch.exists() {
            storage::remove_dir_all(&scratch)?;
        }
        storage::create_dir_all(&scratch)?;
        storage::safetensors::write(&scratch.join(ADAPTER), sources(&self.adapter), &BTreeMap::new())?;
        storage::safetensors::write(&scratch.join(OPTIMIZER), sources(&self.optimizer), &BTreeMap::new())?;
        storage::write_whole(&scratch.join(STATE), json(&self.state).as_bytes())?;
        storage::write_whole(&scratch.join(RECIPE), self.recipe.as_bytes())?;
        storage::write_whole(&scratch.join(METRICS), self.metrics.as_bytes())?;
        let mut files = BTreeMap::new();
        for file in FILES {
            let path = scratch.join(file);
            files.insert(file.to_string(), FileSum { bytes: storage::file_len(&path)?, blake3: storage::blake3_file(&path)? });
        }
        let manifest = Manifest { format: RunState::FORMAT, files };
        storage::write_whole(&scratch.join(MANIFEST), json(&manifest).as_bytes())?;
        // A torn one of the same step is in the way of the rename, and is worth nothing.
        if target.exists() {
            remove(&target, self.state.step)?;
        }
        storage::rename(&scratch, &target)?;
        Ok(target)
    }
}

fn json<T: serde::Serialize>(value: &T) -> String {
    // Plain structs of numbers and texts always have a JSON form.
    serde_json::to_string_pretty(value).unwrap_or_default() + "\n"
}

fn sources(tensors: &[Owned]) -> Vec<TensorSource<'_>> {
    let source = |t: &'_ Owned| {
        let (name, dtype, shape) = (t.name.clone(), t.dtype, t.shape.clone());
        (name, dtype, shape)
    };
    tensors
        .iter()
        .map(|t| {
            let (name, dtype, shape) = source(t);
            TensorSource { name, dtype, shape, data: Box::new(move || Cow::Borrowed(t.bytes.as_slice())) }
        })
        .collect()
}

/// Removes all but the newest `keep` checkpoints of a run; with `every`, those whose step it divides stay too. Called after a newer
/// one is whole. A folder that cannot be removed is left for the next time.
///
/// # Errors
/// If the folder cannot be listed.
pub fn delete_old(run: &Path, keep: u64, every: Option<u64>) -> Result<()> {
    if !folder(run).exists() {
        return Ok(());
    }
    let mut found: Vec<(u64, PathBuf)> = storage::list_dir(&folder(run))?.into_iter().filter_map(|p| Some((step_of(&p)?, p))).collect();
    found.sort();
    let old = found.len().saturating_sub(keep.max(1) as usize);
    for (step, path) in found.drain(..old) {
        if every.is_some_and(|n| n > 0 && step.is_multiple_of(n)) {
            continue;
        }
        if let Err(error) = remove(&path, step) {
            tracing::warn!("the old checkpoint `{}` stays: {error}", path.display());
        }
    }
    Ok(())
}
