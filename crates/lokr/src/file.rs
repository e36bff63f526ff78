//! Writing an adapter's file, in the naming of LyCORIS and kohya (lycoris/modules/lokr.py `custom_state_dict`,
//! lycoris/kohya.py `save_weights`). Reading is `load.rs`; looking at any such file is `inspect.rs`.
//!
//! # The file
//! A safetensors file. For each module `{name}.alpha` (0-d) and its factors as `{name}.lokr_w1` | `lokr_w1_a`, `lokr_w1_b`,
//! and `lokr_w2` | `lokr_w2_a`, `lokr_w2_b` [, `lokr_t2`]; for each trained norm `{name}.w_norm` and `{name}.b_norm`. All of one
//! element type. `name` is `lora_te1`, `lora_te2` or `lora_unet`, and the layer's path with underscores. The metadata is the
//! caller's, plus `sshs_model_hash`: "0x" and the sha256 over the tensors' bytes in the order of the modules (not of the file).

use crate::error::{Error, Result};
use crate::module::{LokrModule, Module};
use crate::network::LokrNetwork;
use crate::shape::{Factor, Form};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use storage::safetensors::{Dtype, TensorSource};

/// Metadata key that says that scales are folded into the factors, so that `rs_lora` in `ss_network_args` is not to be
/// applied again.
pub const FOLDED_KEY: &str = "lokr_scale";
/// Value of [`FOLDED_KEY`].
pub const FOLDED: &str = "folded";

/// Element type of a saved file (`save_precision`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveDtype {
    /// 4 bytes; what resuming elsewhere needs.
    F32,
    /// 2 bytes, 11 bits of precision, up to 65504: what most files are.
    F16,
    /// 2 bytes, 8 bits of precision.
    Bf16,
}

impl SaveDtype {
    /// Its name in messages and metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// The largest finite value.
    pub fn max(self) -> f64 {
        match self {
            Self::F32 => f32::MAX.into(),
            Self::F16 => f16::MAX.to_f64(),
            Self::Bf16 => bf16::MAX.to_f64(),
        }
    }

    fn file(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }

    fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        }
    }

    /// The first value that does not survive as a number.
    fn misfit(self, values: &[f32]) -> Option<f32> {
        let fits = |v: f32| match self {
            Self::F32 => v.is_finite(),
            Self::F16 => f16::from_f32(v).is_finite(),
            Self::Bf16 => bf16::from_f32(v).is_finite(),
        };
        values.iter().copied().find(|&v| !fits(v))
    }
}

/// How a file is written.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions {
    /// Element type of every tensor.
    pub dtype: SaveDtype,
    /// Multiplies each module's scale into w1 (or w1_a) and writes alpha = rank, so that every reader finds scale 1. Off, the
    /// file is as LyCORIS writes it. On without being asked for where an alpha would not fit the element type.
    pub fold_scale: bool,
}

/// A tensor of the file: its key and its values.
struct Item {
    key: String,
    shape: Vec<usize>,
    tensor: Tensor,
}

impl Item {
    fn values(&self) -> candle_core::Result<Vec<f32>> {
        self.tensor.flatten_all()?.to_vec1()
    }
}

impl LokrNetwork {
    /// Writes the adapter, whole or absent, and gives `sshs_model_hash`. `metadata` is written as it is. A scalar
    /// (use_scalar) is multiplied into w1, as in LyCORIS.
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming the first tensor whose values are no numbers or do not fit the type; [`Error::Storage`].
    pub fn save(&self, path: &Path, options: SaveOptions, metadata: &BTreeMap<String, String>) -> Result<String> {
        let modules = || self.entries().iter().map(|e| &e.module);
        let alpha_fits = |m: &Module| match m {
            Module::Lokr(m) => m.shape().alpha_for(options.dtype.max()).is_some(),
            Module::Norm(_) => true,
        };
        let fold = options.fold_scale || !modules().all(alpha_fits);
        let mut items = Vec::new();
        for module in modules() {
            match module {
                Module::Lokr(module) => lokr_items(module, options.dtype, fold, &mut items)?,
                Module::Norm(module) => {
                    for parameter in module.parameters() {
                        items.push(item(parameter.name().into(), &parameter.tensor())?);
                    }
                }
            }
        }
        let mut hash = Sha256::new();
        for item in &items {
            let values = item.values()?;
            if let Some(value) = options.dtype.misfit(&values) {
                return Err(Error::NotFinite { tensor: item.key.clone(), value, dtype: options.dtype.name() });
            }
            hash.update(options.dtype.encode(&values));
        }
        let hash = hash.finalize().iter().fold(String::from("0x"), |hex, byte| hex + &format!("{byte:02x}"));
        let mut metadata = metadata.clone();
        metadata.insert("sshs_model_hash".into(), hash.clone());
        if fold {
            metadata.insert(FOLDED_KEY.into(), FOLDED.into());
        }
        let sources = items.into_iter().map(|item| source(item, options.dtype)).collect();
        storage::safetensors::write(path, sources, &metadata)?;
        Ok(hash)
    }
}

fn item(key: String, tensor: &Tensor) -> Result<Item> {
    Ok(Item { key, shape: tensor.dims().to_vec(), tensor: tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)? })
}

fn lokr_items(module: &LokrModule, dtype: SaveDtype, fold: bool, items: &mut Vec<Item>) -> Result<()> {
    let shape = module.shape();
    let (alpha, strength) = match shape.alpha_for(dtype.max()) {
        Some(alpha) if !fold => (alpha, 1.0),
        // The rank that readers divide by; with both factors full they do not divide, and the dim is kept for their tables.
        _ => (shape.rank().map_or((shape.dim as f64).min(dtype.max()), |r| r as f64), shape.scale),
    };
    items.push(item(format!("{}.alpha", module.name()), &Tensor::new(alpha as f32, &Device::Cpu)?)?);
    let first = if shape.w1 == Form::Full { Factor::W1 } else { Factor::W1A };
    for (factor, parameter) in module.factors() {
        let mut tensor = parameter.tensor();
        if *factor == first {
            if let Some(scalar) = module.scalar() {
                tensor = tensor.broadcast_mul(&scalar.tensor())?;
            }
            if strength != 1.0 {
                tensor = (tensor * strength)?;
            }
        }
        items.push(item(parameter.name().into(), &tensor)?);
    }
    Ok(())
}

fn source<'a>(item: Item, dtype: SaveDtype) -> TensorSource<'a> {
    let (name, shape) = (item.key.clone(), item.shape.clone());
    // The values were read once for the hash, so this cannot fail; if it did, the writer would refuse the empty tensor.
    let data = move || Cow::Owned(dtype.encode(&item.values().unwrap_or_default()));
    TensorSource { name, dtype: dtype.file(), shape, data: Box::new(data) }
}
