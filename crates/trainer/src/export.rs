//! Files for others: the adapter in LyCORIS's form, and the base model with the adapter merged.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;
use lokr::{LokrNetwork, MergeScale, SaveDtype, SaveOptions};
use sdxl::Sdxl;
use sdxl::checkpoint::{self, Checkpoint, Layout, modelspec};

use crate::base::{all_trees, group_of};
use crate::config::SavePrecision;
use crate::error::{Error, Result};

/// Writes the adapter in kohya naming and gives its `sshs_model_hash`.
///
/// # Errors
/// If a value does not fit the precision, or the file cannot be written.
pub fn write_lokr(network: &LokrNetwork, path: &Path, precision: SavePrecision, metadata: &BTreeMap<String, String>) -> Result<String> {
    let dtype = match precision {
        SavePrecision::Float => SaveDtype::F32,
        SavePrecision::Fp16 => SaveDtype::F16,
        SavePrecision::Bf16 => SaveDtype::Bf16,
    };
    Ok(network.save(path, SaveOptions { dtype, fold_scale: false }, metadata)?)
}

/// What [`write_merged`] is asked for.
pub struct Merge<'a> {
    /// The adapter's file.
    pub lokr: &'a Path,
    /// Strength of the adapter.
    pub multiplier: f64,
    /// Single file or diffusers folder.
    pub layout: Layout,
    /// Element type of the written weights; `None` keeps the base model's.
    pub dtype: Option<DType>,
    /// LyCORIS's double scale, for comparison with files merged there.
    pub scale: MergeScale,
}

/// What a merge did.
pub struct Merged {
    /// Tensors that the adapter changed.
    pub tensors: usize,
    /// Keys of the adapter's file that fit no layer.
    pub unmatched: Vec<String>,
}

/// Writes base + adapter, streamed tensor by tensor.
///
/// # Errors
/// If a file cannot be read or written, or the adapter fits nothing.
pub fn write_merged(base: &Checkpoint, model: &Sdxl, target: &Path, merge: &Merge) -> Result<Merged> {
    let network = LokrNetwork::from_file(merge.lokr, all_trees(model))?;
    network.detach();
    let changed = std::sync::atomic::AtomicUsize::new(0);
    let failure = std::sync::Mutex::new(None);
    let edit = |part, name: &str, tensor: candle_core::Tensor| {
        let Some(group) = group_of(part) else { return Ok(tensor) };
        match network.merged_weight(group, name, &tensor, merge.multiplier, merge.scale) {
            Ok(Some(merged)) => {
                changed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                Ok(merged)
            }
            Ok(None) => Ok(tensor),
            Err(error) => {
                let text = error.to_string();
                *failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(error);
                Err(candle_core::Error::Msg(text).into())
            }
        }
    };
    let title = target.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let prediction = base.prediction_type().unwrap_or("epsilon");
    let mut metadata = modelspec(&title, prediction, "1024x1024", None);
    let lokr = merge.lokr.file_name().unwrap_or_default().to_string_lossy();
    let base_name = base.path().file_name().unwrap_or_default().to_string_lossy();
    metadata.insert("modelspec.merged_from".into(), format!("{base_name}, {lokr} x {}", merge.multiplier));
    let written = checkpoint::export(base, target, merge.layout, merge.dtype, &metadata, &edit);
    if let Some(error) = failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        return Err(error.into());
    }
    written?;
    let merged = Merged { tensors: changed.into_inner(), unmatched: network.unmatched().to_vec() };
    if merged.tensors == 0 {
        let what = format!("`{}` changes nothing of `{}`", merge.lokr.display(), base.path().display());
        return Err(Error::refused(what, "check with `lokr inspect` that both are of the same kind of model"));
    }
    Ok(merged)
}
