//! Writing a base model, edited tensor by tensor, in either layout. Nothing larger than one tensor of the target (with the
//! three that are joined in a fused one) is in memory at a time; the target is whole or absent.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use storage::safetensors::{Dtype, TensorSource};

use super::names;
use super::{Aside, Checkpoint, HeadDims, Layout, Part, TE2_PREFIX, dims, folder};
use crate::error::{Error, Result};

/// What is done to each tensor on its way: part, canonical name, tensor as [`Checkpoint::load`] gives it, to a tensor of
/// the same shape (any element type, any device).
pub type Edit<'a> = dyn Fn(Part, &str, Tensor) -> Result<Tensor> + Sync + 'a;

/// How canonical tensors become one tensor of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Plain,
    Transposed,
    /// A matrix becomes a 1x1 convolution.
    Convolution,
    /// One under the other.
    Joined,
}

/// One tensor of the target.
pub(super) struct Planned {
    name: String,
    part: Part,
    from: Vec<String>,
    form: Form,
}

/// Writes every tensor of the base, passed through `edit`, to `target` in `layout`; so this also converts between the
/// layouts. `dtype` casts all floating-point tensors, `None` keeps each one's own (whatever `edit` gave). `metadata` goes
/// into the single file's header, or into that of a folder's UNet; a single file also gets the modelspec keys that
/// `metadata` lacks (see [`modelspec`]), and `lokr.config` where heads and groups are not SDXL's.
///
/// Kept but not edited are tensors that no network computes with (`position_ids`, `logit_scale`, markers as `v_pred`);
/// left out are training programs' second copies (`model_ema.`).
///
/// # Errors
/// Whatever `edit` returns; [`Error::TargetTaken`] if the target is the base itself or a folder that no export wrote;
/// [`Error::NotInDiffusers`] and [`Error::HeadDims`] if a network has no diffusers config; [`Error::EditedShape`];
/// [`Error::Storage`]. The target is then as it was before.
pub fn export(
    checkpoint: &Checkpoint,
    target: &Path,
    layout: Layout,
    dtype: Option<DType>,
    metadata: &BTreeMap<String, String>,
    edit: &Edit,
) -> Result<()> {
    refuse_base(checkpoint, target)?;
    match layout {
        Layout::Diffusers => folder::write(checkpoint, target, dtype, metadata, edit),
        Layout::SingleFile => {
            if target.is_dir() {
                return Err(Error::TargetTaken { path: target.into(), what: "a folder is there, and the single-file layout is a file" });
            }
            let metadata = single_metadata(checkpoint, target, metadata)?;
            let asides: Vec<(&str, &Aside)> = checkpoint.asides.iter().map(|(name, aside)| (name.as_str(), aside)).collect();
            write_tensors(checkpoint, target, single_plan(checkpoint)?, &asides, dtype, &metadata, edit)
        }
    }
}

/// The modelspec keys of a checkpoint (specification 1.0.1, as sd-scripts writes them, library/sai_model_spec.py).
/// `prediction_type` is "epsilon" or "v", `resolution` as "1024x1024", `date` local time as "2024-05-01T12:00:00"; without
/// a date, equal input gives equal bytes.
pub fn modelspec(title: &str, prediction_type: &str, resolution: &str, date: Option<&str>) -> BTreeMap<String, String> {
    let mut keys = BTreeMap::from([
        ("modelspec.sai_model_spec", "1.0.1"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base"),
        ("modelspec.implementation", "https://github.com/Stability-AI/generative-models"),
        ("modelspec.title", title),
        ("modelspec.resolution", resolution),
        ("modelspec.prediction_type", prediction_type),
    ]);
    keys.extend(date.map(|date| ("modelspec.date", date)));
    keys.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

fn single_metadata(checkpoint: &Checkpoint, target: &Path, given: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
    let title = target.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let resolution = checkpoint.metadata().get("modelspec.resolution").map_or("1024x1024", String::as_str);
    let mut metadata = modelspec(&title, checkpoint.prediction_type().unwrap_or("epsilon"), resolution, None);
    metadata.insert("format".into(), "pt".into());
    let head_dims = checkpoint.head_dims()?;
    if head_dims != HeadDims::default() {
        metadata.insert(dims::LOKR_CONFIG.into(), serde_json::json!(head_dims).to_string());
    }
    metadata.extend(given.clone());
    Ok(metadata)
}

/// The base is memory-mapped while it is read, and nobody means to overwrite it.
fn refuse_base(checkpoint: &Checkpoint, target: &Path) -> Result<()> {
    let Ok(real) = target.canonicalize() else { return Ok(()) };
    let sources = checkpoint.files.iter().map(|file| file.path()).chain([checkpoint.path()]);
    if sources.filter_map(|path| path.canonicalize().ok()).any(|path| path.starts_with(&real) || real == path) {
        return Err(Error::TargetTaken { path: target.into(), what: "the base model is there" });
    }
    Ok(())
}

/// The tensors of a single file.
fn single_plan(checkpoint: &Checkpoint) -> Result<Vec<Planned>> {
    let mut plan = Vec::new();
    let mut joined: BTreeMap<String, [Option<String>; 3]> = BTreeMap::new();
    for part in Part::ALL {
        for name in checkpoint.names(part) {
            let mut planned = Planned { name: format!("{}{name}", part.prefix()), part, from: vec![name.into()], form: Form::Plain };
            match part {
                Part::TextEncoder2 => match names::te2_to_open_clip(name) {
                    Some((fused, Some(k))) => {
                        joined.entry(fused).or_default()[k] = Some(name.to_owned());
                        continue;
                    }
                    Some((other, None)) => {
                        let transposed = other == names::OPEN_CLIP_PROJECTION && !checkpoint.untransposed;
                        planned.form = if transposed { Form::Transposed } else { Form::Plain };
                        planned.name = format!("{TE2_PREFIX}{other}");
                    }
                    None => {}
                },
                Part::Vae if names::is_vae_attention_matrix(name) => planned.form = Form::Convolution,
                _ => {}
            }
            plan.push(planned);
        }
    }
    for (fused, thirds) in joined {
        let thirds = thirds.into_iter().collect::<Option<Vec<String>>>();
        let from = thirds.ok_or_else(|| checkpoint.missing(Part::TextEncoder2, &fused))?;
        plan.push(Planned { name: format!("{TE2_PREFIX}{fused}"), part: Part::TextEncoder2, from, form: Form::Joined });
    }
    Ok(plan)
}

/// The tensors of a part's folder. Names that no table knows stay as they are.
pub(super) fn diffusers_plan(checkpoint: &Checkpoint, part: Part) -> Vec<Planned> {
    let other = |name: &str| match part {
        Part::Unet => names::unet_to_diffusers(name),
        Part::Vae => names::vae_to_diffusers(name),
        Part::TextEncoder1 | Part::TextEncoder2 => None,
    };
    let plan =
        |name: &str| Planned { name: other(name).unwrap_or_else(|| name.to_owned()), part, from: vec![name.to_owned()], form: Form::Plain };
    checkpoint.names(part).map(plan).collect()
}

/// Streams planned tensors and asides into one safetensors file, whole or absent.
pub(super) fn write_tensors(
    checkpoint: &Checkpoint,
    target: &Path,
    plan: Vec<Planned>,
    asides: &[(&str, &Aside)],
    dtype: Option<DType>,
    metadata: &BTreeMap<String, String>,
    edit: &Edit,
) -> Result<()> {
    // A source of bytes cannot fail; it gives too few, which stops the writer, and leaves the reason here.
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let failure = &failure;
    let mut sources = Vec::with_capacity(plan.len() + asides.len());
    for planned in plan {
        let (own, shape) = planned.target(checkpoint)?;
        let to = dtype.filter(|_| own.is_float()).unwrap_or(own);
        let name = planned.name.clone();
        let data = move || match planned.bytes(checkpoint, to, edit) {
            Ok(bytes) => Cow::Owned(bytes),
            Err(error) => {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                Cow::Borrowed(&[][..])
            }
        };
        sources.push(TensorSource { name, dtype: Dtype::from(to), shape, data: Box::new(data) });
    }
    for (name, aside) in asides {
        let data = move || Cow::Borrowed(checkpoint.aside_bytes(name, aside));
        sources.push(TensorSource { name: (*name).to_owned(), dtype: aside.dtype, shape: aside.shape.clone(), data: Box::new(data) });
    }
    let written = storage::safetensors::write(target, sources, metadata);
    match failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(error),
        None => Ok(written?),
    }
}

impl Planned {
    /// Element type in the base, and shape in the target.
    fn target(&self, checkpoint: &Checkpoint) -> Result<(DType, Vec<usize>)> {
        let mut shapes = Vec::new();
        for name in &self.from {
            shapes.push(checkpoint.shape(self.part, name).ok_or_else(|| checkpoint.missing(self.part, name))?);
        }
        let bad = |what: String| Error::BadTensor { path: checkpoint.path_of(self.part).into(), name: self.name.clone(), what };
        let first = &self.from[0];
        let Some(dtype) = checkpoint.dtype(self.part, first) else {
            let name = checkpoint.original_name(self.part, first).unwrap_or_default();
            let what = "its element type cannot be loaded".into();
            return Err(Error::BadTensor { path: checkpoint.path_of(self.part).into(), name, what });
        };
        let mut shape = shapes[0].clone();
        match self.form {
            Form::Plain => {}
            Form::Transposed if shape.len() == 2 => shape.reverse(),
            Form::Transposed => return Err(bad(format!("shape {shape:?} is no matrix"))),
            Form::Convolution if shape.len() == 2 => shape.extend([1, 1]),
            Form::Convolution => {}
            Form::Joined => {
                if shape.is_empty() || shapes.iter().any(|other| other.get(1..) != shape.get(1..)) {
                    return Err(bad(format!("q, k and v have the shapes {shapes:?}, which cannot be joined")));
                }
                shape[0] = shapes.iter().map(|other| other[0]).sum();
            }
        }
        Ok((dtype, shape))
    }

    /// Loads, edits, casts and reshapes.
    fn bytes(&self, checkpoint: &Checkpoint, dtype: DType, edit: &Edit) -> Result<Vec<u8>> {
        let mut tensors = Vec::with_capacity(self.from.len());
        for name in &self.from {
            let tensor = checkpoint.load(self.part, name)?;
            let expected = tensor.dims().to_vec();
            let edited = edit(self.part, name, tensor)?;
            if edited.dims() != expected {
                return Err(Error::EditedShape { part: self.part, name: name.clone(), expected, got: edited.dims().to_vec() });
            }
            tensors.push(edited.to_device(&Device::Cpu)?.to_dtype(dtype)?);
        }
        let tensor = match (self.form, tensors.as_slice()) {
            (Form::Transposed, [tensor]) => tensor.t()?,
            // A convolution's trailing ones change no byte.
            (_, [tensor]) => tensor.clone(),
            (_, several) => Tensor::cat(several, 0)?,
        };
        let mut bytes = Vec::with_capacity(tensor.elem_count() * dtype.size_in_bytes());
        tensor.write_bytes(&mut bytes)?;
        Ok(bytes)
    }
}
