//! Base models on disk. A [`Checkpoint`] is a single file (SGM layout) or a diffusers folder, opened as a memory map and
//! seen under one set of canonical tensor names, so that the networks, the adapter's merge and the exports know one
//! naming only:
//!
//! - UNet: SGM names without prefix, as `input_blocks.1.0.in_layers.2.weight`;
//! - te1 and te2: transformers' names, as `text_model.final_layer_norm.weight`; te2's `text_projection.weight` is a Linear
//!   weight [projection, width], the transposed of the single file's matrix;
//! - VAE: LDM names without prefix; q, k, v and proj_out of the attention as matrices [c, c].
//!
//! Names are `names.rs`, opening and telling wrong files `open.rs` and `kind.rs`, writing `export.rs` and `folder.rs`.
//! Whether a part's tensors are complete is the networks' business: names that no table knows stay in
//! [`Checkpoint::names`], to be reported.

mod configs;
mod described;
mod dims;
mod export;
mod folder;
mod hash;
mod kind;
mod names;
mod open;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use ops::Mapped;
use serde_json::Value;
use storage::safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
pub use described::Shapes;
pub(crate) use described::zeros;
pub use dims::HeadDims;
pub use export::{export, modelspec};
pub use hash::ModelHash;
pub use kind::Kind;

const UNET_PREFIX: &str = "model.diffusion_model.";
const TE1_PREFIX: &str = "conditioner.embedders.0.transformer.";
const TE2_PREFIX: &str = "conditioner.embedders.1.model.";
const VAE_PREFIX: &str = "first_stage_model.";

/// One of the four networks of SDXL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The denoiser.
    Unet,
    /// CLIP-L.
    TextEncoder1,
    /// OpenCLIP bigG.
    TextEncoder2,
    /// Autoencoder between pictures and latents.
    Vae,
}

impl Part {
    /// All parts, in the order in which they are named everywhere.
    pub const ALL: [Part; 4] = [Part::Unet, Part::TextEncoder1, Part::TextEncoder2, Part::Vae];

    /// Short name: "unet", "te1", "te2", "vae".
    pub fn name(self) -> &'static str {
        match self {
            Part::Unet => "unet",
            Part::TextEncoder1 => "te1",
            Part::TextEncoder2 => "te2",
            Part::Vae => "vae",
        }
    }

    /// What it is, for a message.
    pub fn title(self) -> &'static str {
        match self {
            Part::Unet => "denoising network",
            Part::TextEncoder1 => "text encoder CLIP-L",
            Part::TextEncoder2 => "text encoder OpenCLIP bigG",
            Part::Vae => "autoencoder",
        }
    }

    /// Name of its folder in the diffusers layout.
    pub fn folder(self) -> &'static str {
        match self {
            Part::Unet => "unet",
            Part::TextEncoder1 => "text_encoder",
            Part::TextEncoder2 => "text_encoder_2",
            Part::Vae => "vae",
        }
    }

    /// What its tensors' names begin with in a single file.
    pub fn prefix(self) -> &'static str {
        match self {
            Part::Unet => UNET_PREFIX,
            Part::TextEncoder1 => TE1_PREFIX,
            Part::TextEncoder2 => TE2_PREFIX,
            Part::Vae => VAE_PREFIX,
        }
    }

    fn index(self) -> usize {
        self as usize
    }
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The two forms in which SDXL models are passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One safetensors file with SGM names.
    SingleFile,
    /// A folder with a folder for each part.
    Diffusers,
}

/// How a canonical tensor lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum View {
    Whole,
    /// The k-th third of the rows.
    Third(usize),
    /// A matrix whose rows are our columns.
    Transposed,
    /// A 1x1 convolution that is a matrix here.
    Matrix,
}

impl View {
    /// Which of the `len` bytes in the file are the tensor's.
    fn part(self, len: usize) -> std::ops::Range<usize> {
        match self {
            Self::Third(k) => len / 3 * k..len / 3 * (k + 1),
            Self::Whole | Self::Transposed | Self::Matrix => 0..len,
        }
    }
}

/// A canonical tensor's place.
#[derive(Debug, Clone)]
struct Entry {
    file: usize,
    name: String,
    view: View,
    dtype: Dtype,
    /// Canonical shape.
    shape: Vec<usize>,
}

/// A tensor that belongs to no network but is written back by exports, as `logit_scale` or `v_pred`.
#[derive(Debug, Clone)]
struct Aside {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: AsideBytes,
}

#[derive(Debug, Clone)]
enum AsideBytes {
    InFile(usize),
    Held(Vec<u8>),
}

/// A base model on disk, open for reading. Cloning is cheap next to a tensor, and shares the memory maps.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    path: PathBuf,
    vae_path: Option<PathBuf>,
    layout: Layout,
    files: Vec<SafeTensors>,
    parts: [BTreeMap<String, Entry>; 4],
    /// By single-file name.
    asides: BTreeMap<String, Aside>,
    metadata: BTreeMap<String, String>,
    configs: [Option<Value>; 4],
    scheduler: Option<Value>,
    untransposed: bool,
    head_dims: Option<HeadDims>,
    described: described::Described,
    device: Device,
    mapped: bool,
}

impl Checkpoint {
    /// The same checkpoint; networks built from it live on `device`.
    pub fn with_device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Where networks built from it live: the CPU if nothing else was asked for.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The same checkpoint; on the CPU the weights of linear layers and convolutions stay in the files' maps where they are used as they
    /// are stored (that is so if nothing else was asked for), or are copied into memory.
    pub fn with_mapped_weights(mut self, mapped: bool) -> Self {
        self.mapped = mapped;
        self
    }

    /// A file of the checkpoint that another program has written to since it was opened or last asked about ([`SafeTensors::unchanged`]).
    ///
    /// # Errors
    /// [`Error::Storage`] if the system does not say.
    pub fn changed_file(&self) -> Result<Option<&Path>> {
        for file in &self.files {
            if !file.unchanged()? {
                return Ok(Some(file.path()));
            }
        }
        Ok(None)
    }

    /// In which form it lies on disk.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file or folder of a VAE that replaced the checkpoint's own.
    pub fn vae_path(&self) -> Option<&Path> {
        self.vae_path.as_deref()
    }

    /// The metadata of a single file's header; empty for a folder.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The single file's metadata value `lokr.config`: JSON with the numbers that tensors do not show (see [`HeadDims`]).
    pub fn lokr_config(&self) -> Option<&str> {
        self.metadata.get(dims::LOKR_CONFIG).map(String::as_str)
    }

    /// The config.json of a part's folder; `None` for a single file.
    pub fn diffusers_config(&self, part: Part) -> Option<&Value> {
        self.configs[part.index()].as_ref()
    }

    /// What the model says its UNet predicts: "epsilon" or "v" (from modelspec, the marker tensor `v_pred`, or the
    /// scheduler's config); `None` if it does not say.
    pub fn prediction_type(&self) -> Option<&'static str> {
        let word = |word: &str| if word.starts_with('v') { Some("v") } else { (word == "epsilon").then_some("epsilon") };
        let scheduler = || self.scheduler.as_ref()?.get("prediction_type")?.as_str().and_then(word);
        let marker = || self.asides.contains_key("v_pred").then_some("v");
        marker().or_else(|| self.metadata.get("modelspec.prediction_type").and_then(|value| word(value))).or_else(scheduler)
    }

    /// The scheduler_config.json of a folder; `None` for a single file.
    pub fn scheduler_config(&self) -> Option<&Value> {
        self.scheduler.as_ref()
    }

    /// sd-scripts' reading of a single file's `text_projection`: taken as a Linear weight without transposing. Exports
    /// then write it back in the same way, so what was not edited stays as it was. Folders are not affected by reading.
    pub fn untransposed_text_projection(&mut self, on: bool) {
        self.untransposed = on;
    }

    /// Whether the part has any tensor.
    pub fn has_part(&self, part: Part) -> bool {
        !self.parts[part.index()].is_empty()
    }

    /// The part's tensors by canonical name, sorted. Tensors that no network of SDXL has are among them under the names of
    /// their file; buffers without meaning for the networks (`position_ids`, `logit_scale`, ...) are not.
    pub fn names(&self, part: Part) -> impl Iterator<Item = &str> {
        self.parts[part.index()].keys().map(String::as_str)
    }

    /// Canonical shape of a tensor; `None` if the part has none of that name.
    pub fn shape(&self, part: Part, name: &str) -> Option<Vec<usize>> {
        let entry = self.entry(part, name)?;
        let mut shape = entry.shape.clone();
        if self.untransposed && entry.view == View::Transposed {
            shape.reverse();
        }
        Some(shape)
    }

    /// Element type of a tensor in its file; `None` if the part has none of that name, or if the type is one that cannot
    /// be loaded.
    pub fn dtype(&self, part: Part, name: &str) -> Option<DType> {
        self.entry(part, name).and_then(|entry| entry.dtype.try_into().ok())
    }

    /// A tensor's name in its file, for messages. Three canonical tensors share one fused tensor of the single file.
    pub fn original_name(&self, part: Part, name: &str) -> Option<String> {
        self.entry(part, name).map(|entry| entry.name.clone())
    }

    /// Copies a tensor out of the memory map, whose pages are then given back: on the CPU, in the file's element type, in canonical
    /// shape. Of a checkpoint without weights, zeros that take no memory.
    ///
    /// # Errors
    /// [`Error::MissingPart`], [`Error::MissingTensor`]; [`Error::BadTensor`] for element types that cannot be computed
    /// with.
    pub fn load(&self, part: Part, name: &str) -> Result<Tensor> {
        let entry = self.entry(part, name).ok_or_else(|| self.missing(part, name))?;
        if !self.has_weights() {
            let shape = self.shape(part, name).unwrap_or_default();
            return described::zeros(&shape, self.dtype(part, name).unwrap_or(DType::F32));
        }
        let file = &self.files[entry.file];
        let bad = |what: String| Error::BadTensor { path: file.path().into(), name: entry.name.clone(), what };
        let dtype: DType = entry.dtype.try_into().map_err(|_| bad(format!("element type {} cannot be loaded", entry.dtype)))?;
        let bytes = file.bytes(&entry.name).ok_or_else(|| self.missing(part, name))?;
        let mut in_file = entry.shape.clone();
        if entry.view == View::Transposed {
            in_file.reverse();
        }
        let tensor =
            Tensor::from_raw_buffer(&bytes[entry.view.part(bytes.len())], dtype, &in_file, &Device::Cpu).map_err(|e| bad(e.to_string()))?;
        file.release(&entry.name);
        if entry.view == View::Transposed && !self.untransposed {
            return Ok(tensor.t()?.contiguous()?);
        }
        Ok(tensor)
    }

    /// A tensor that stays in the map of its file, in the file's element type; `None` where weights are not mapped, it lies there in
    /// another shape, or its elements cannot be read in place ([`Mapped::new`]).
    pub fn mapped(&self, part: Part, name: &str) -> Option<Mapped> {
        let entry = self.entry(part, name).filter(|_| self.mapped && self.device.is_cpu() && self.has_weights())?;
        if entry.view == View::Transposed && !self.untransposed {
            return None;
        }
        let bytes = self.files[entry.file].shared(&entry.name)?;
        let bytes = bytes.slice(entry.view.part(bytes.len()));
        Mapped::new(bytes, entry.dtype.try_into().ok()?, &self.shape(part, name)?)
    }

    fn entry(&self, part: Part, name: &str) -> Option<&Entry> {
        self.parts[part.index()].get(name)
    }

    /// The file or folder that a part comes from.
    fn path_of(&self, part: Part) -> &Path {
        self.vae_path.as_deref().filter(|_| part == Part::Vae).unwrap_or(&self.path)
    }

    fn missing(&self, part: Part, name: &str) -> Error {
        let path = self.path_of(part).to_path_buf();
        if self.has_part(part) { Error::MissingTensor { path, part, name: name.into() } } else { Error::MissingPart { path, part } }
    }

    fn aside_bytes<'a>(&'a self, name: &str, aside: &'a Aside) -> &'a [u8] {
        match &aside.bytes {
            // Taken from the same file's own list of names when it was opened.
            AsideBytes::InFile(file) => self.files[*file].bytes(name).unwrap_or_default(),
            AsideBytes::Held(bytes) => bytes,
        }
    }
}
