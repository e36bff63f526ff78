//! Opening a base model: finding the files of each part, telling wrong files, and giving each tensor its canonical name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Device;
use serde_json::Value;
use storage::safetensors::SafeTensors;

use super::kind::{Kind, is_vae, wrong_kind, wrong_pipeline};
use super::names::{self, OpenClip};
use super::{Aside, AsideBytes, Checkpoint, Entry, Layout, Part, TE1_PREFIX, TE2_PREFIX, UNET_PREFIX, VAE_PREFIX, View, folder};
use crate::error::{Error, Result};

/// Copies of the weights that training programs keep for themselves; not read, not written.
const DROPPED: &[&str] = &["model_ema.", "loss.", "ema."];

impl Checkpoint {
    /// Opens a base model: a safetensors file in the single-file layout, or a diffusers folder (`*.safetensors` before
    /// `*.fp16.safetensors`, also in shards). A file may lack the VAE (see [`Checkpoint::with_vae`]).
    ///
    /// # Errors
    /// [`Error::WrongKind`] with what was given instead, [`Error::MissingPart`], and [`Error::Storage`] where a file cannot
    /// be read or is not safetensors at all.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        if path.is_dir() { open_folder(path) } else { open_file(path) }
    }

    /// Puts another VAE in place of the checkpoint's own: a safetensors file in either naming, with or without the
    /// single file's prefix (a whole checkpoint will do), a VAE's folder, or a folder that holds `vae`.
    ///
    /// # Errors
    /// [`Error::NoVae`] if there is none, [`Error::Storage`] if a file cannot be read.
    pub fn with_vae(mut self, path: &Path) -> Result<Checkpoint> {
        self.parts[Part::Vae.index()].clear();
        self.vae_path = Some(path.to_path_buf());
        if path.is_dir() {
            let inner = path.join(Part::Vae.folder());
            let holder = if inner.is_dir() { inner } else { path.to_path_buf() };
            let files = part_files(&holder, Part::Vae)?.ok_or_else(|| Error::NoVae { path: path.into(), kind: None })?;
            // A file brings no config; the base's own then still says how many groups the norms have.
            self.configs[Part::Vae.index()] = read_json(&holder.join("config.json"))?.or(self.configs[Part::Vae.index()].take());
            for file in files {
                let file = SafeTensors::open(&file)?;
                self.add_vae(file)?;
            }
        } else {
            let file = SafeTensors::open(path)?;
            self.add_vae(file)?;
        }
        Ok(self)
    }

    fn add_vae(&mut self, file: SafeTensors) -> Result<()> {
        let names: Vec<&str> = file.names().collect();
        let whole_model = names.iter().any(|name| name.starts_with(VAE_PREFIX));
        if !is_vae(&names) {
            return Err(Error::NoVae { path: file.path().into(), kind: wrong_kind(&names) });
        }
        let names: Vec<String> = names.into_iter().map(String::from).collect();
        let index = self.files.len();
        self.files.push(file);
        let diffusers = names.iter().any(|name| name.contains(".down_blocks."));
        for name in names {
            let own = match name.strip_prefix(VAE_PREFIX) {
                Some(own) => own,
                None if whole_model => continue,
                None => &name,
            };
            if DROPPED.iter().any(|prefix| own.starts_with(prefix)) {
                continue;
            }
            let canonical = if diffusers { names::vae_from_diffusers(own) } else { None };
            self.add(Part::Vae, canonical.unwrap_or_else(|| own.to_owned()), index, &name, View::Whole)?;
        }
        Ok(())
    }

    /// Enters the tensor `name` of a file as the part's `canonical`.
    fn add(&mut self, part: Part, canonical: String, file: usize, name: &str, mut view: View) -> Result<()> {
        let Some(info) = self.files[file].info(name) else { return Ok(()) };
        let mut shape = info.shape.clone();
        match view {
            View::Third(_) => match shape.first_mut() {
                Some(rows) if rows.is_multiple_of(3) => *rows /= 3,
                _ => {
                    let what = format!("shape {shape:?} does not hold q, k and v");
                    return Err(Error::BadTensor { path: self.files[file].path().into(), name: name.into(), what });
                }
            },
            View::Transposed if shape.len() == 2 => shape.reverse(),
            View::Transposed => view = View::Whole,
            View::Whole if part == Part::Vae && names::is_vae_attention_matrix(&canonical) && matches!(shape[..], [_, _, 1, 1]) => {
                shape.truncate(2);
                view = View::Matrix;
            }
            View::Whole | View::Matrix => {}
        }
        let entry = Entry { file, name: name.to_owned(), view, dtype: info.dtype, shape };
        if let Some(other) = self.parts[part.index()].insert(canonical.clone(), entry) {
            let path = self.files[file].path().to_path_buf();
            return Err(Error::Twice { path, part, name: canonical, first: other.name, second: name.into() });
        }
        Ok(())
    }

    fn add_aside(&mut self, file: usize, name: &str, single_file_name: String) {
        if let Some(info) = self.files[file].info(name) {
            let aside = Aside { dtype: info.dtype, shape: info.shape.clone(), bytes: AsideBytes::InFile(file) };
            self.asides.insert(single_file_name, aside);
        }
    }

    pub(super) fn empty(path: &Path, layout: Layout) -> Checkpoint {
        Checkpoint {
            path: path.to_path_buf(),
            vae_path: None,
            layout,
            files: Vec::new(),
            parts: Default::default(),
            asides: BTreeMap::new(),
            metadata: BTreeMap::new(),
            configs: Default::default(),
            scheduler: None,
            untransposed: false,
            head_dims: None,
            described: Default::default(),
            device: Device::Cpu,
            mapped: true,
        }
    }
}

fn open_file(path: &Path) -> Result<Checkpoint> {
    let file = SafeTensors::open(path)?;
    let names: Vec<String> = file.names().map(String::from).collect();
    let borrowed: Vec<&str> = names.iter().map(String::as_str).collect();
    if let Some(kind) = wrong_kind(&borrowed) {
        return Err(Error::WrongKind { path: path.into(), kind });
    }
    let mut checkpoint = Checkpoint::empty(path, Layout::SingleFile);
    checkpoint.metadata = file.metadata().clone();
    checkpoint.files.push(file);
    for name in &names {
        add_single(&mut checkpoint, name)?;
    }
    for part in [Part::Unet, Part::TextEncoder1, Part::TextEncoder2] {
        if !checkpoint.has_part(part) {
            return Err(Error::MissingPart { path: path.into(), part });
        }
    }
    Ok(checkpoint)
}

/// Gives one tensor of a single file its place.
fn add_single(checkpoint: &mut Checkpoint, name: &str) -> Result<()> {
    if DROPPED.iter().any(|prefix| name.starts_with(prefix)) {
        return Ok(());
    }
    if is_buffer(name) {
        checkpoint.add_aside(0, name, name.to_owned());
    } else if let Some(own) = name.strip_prefix(UNET_PREFIX) {
        checkpoint.add(Part::Unet, own.to_owned(), 0, name, View::Whole)?;
    } else if let Some(own) = name.strip_prefix(TE1_PREFIX) {
        checkpoint.add(Part::TextEncoder1, own.to_owned(), 0, name, View::Whole)?;
    } else if let Some(own) = name.strip_prefix(TE2_PREFIX) {
        match names::te2_from_open_clip(own) {
            Some(OpenClip::Same(canonical)) => checkpoint.add(Part::TextEncoder2, canonical, 0, name, View::Whole)?,
            Some(OpenClip::Transposed(canonical)) => checkpoint.add(Part::TextEncoder2, canonical, 0, name, View::Transposed)?,
            Some(OpenClip::Joined(thirds)) => {
                for (k, canonical) in thirds.into_iter().enumerate() {
                    checkpoint.add(Part::TextEncoder2, canonical, 0, name, View::Third(k))?;
                }
            }
            None => checkpoint.add(Part::TextEncoder2, own.to_owned(), 0, name, View::Whole)?,
        }
    } else if let Some(own) = name.strip_prefix(VAE_PREFIX) {
        if !DROPPED.iter().any(|prefix| own.starts_with(prefix)) {
            checkpoint.add(Part::Vae, own.to_owned(), 0, name, View::Whole)?;
        }
    } else {
        checkpoint.add_aside(0, name, name.to_owned());
    }
    Ok(())
}

/// Tensors of the text encoders that the networks do not compute with.
fn is_buffer(name: &str) -> bool {
    name.ends_with(".position_ids") || name == "logit_scale" || name.ends_with(".logit_scale")
}

fn open_folder(path: &Path) -> Result<Checkpoint> {
    let wrong = |kind| Err(Error::WrongKind { path: path.into(), kind });
    let index = read_json(&path.join("model_index.json"))?;
    if let Some(kind) = index.as_ref().and_then(wrong_pipeline) {
        return wrong(kind);
    }
    let has = |part: Part| path.join(part.folder()).is_dir();
    if !has(Part::Unet) {
        return wrong(if path.join("adapter_config.json").is_file() { Kind::Adapter } else { Kind::OtherFolder });
    }
    match (has(Part::TextEncoder1), has(Part::TextEncoder2)) {
        (true, false) => return wrong(Kind::Sd1),
        (false, true) => return wrong(Kind::Refiner),
        _ => {}
    }
    let mut checkpoint = Checkpoint::empty(path, Layout::Diffusers);
    checkpoint.scheduler = read_json(&path.join("scheduler").join("scheduler_config.json"))?;
    for part in Part::ALL {
        let folder = path.join(part.folder());
        let Some(files) = part_files(&folder, part)? else {
            if part == Part::Vae {
                continue;
            }
            return Err(Error::MissingPart { path: path.into(), part });
        };
        checkpoint.configs[part.index()] = read_json(&folder.join("config.json"))?;
        for file in files {
            let file = SafeTensors::open(&file)?;
            let names: Vec<String> = file.names().map(String::from).collect();
            let asides = file.metadata().get(folder::ASIDES).cloned();
            checkpoint.files.push(file);
            if let Some(asides) = asides {
                checkpoint.asides.extend(folder::read_asides(&folder, &asides)?);
            }
            for name in names {
                add_from_folder(&mut checkpoint, part, &name)?;
            }
        }
    }
    Ok(checkpoint)
}

/// Gives one tensor of the last opened file its place.
fn add_from_folder(checkpoint: &mut Checkpoint, part: Part, name: &str) -> Result<()> {
    let file = checkpoint.files.len() - 1;
    let canonical = match part {
        Part::TextEncoder1 | Part::TextEncoder2 if is_buffer(name) => return Ok(()),
        Part::Unet => names::unet_from_diffusers(name),
        Part::Vae => names::vae_from_diffusers(name),
        // Newer releases of transformers may leave the outer module's name out.
        Part::TextEncoder1 | Part::TextEncoder2 => {
            let bare = ["embeddings.", "encoder.layers.", "final_layer_norm."].iter().any(|start| name.starts_with(start));
            bare.then(|| format!("text_model.{name}"))
        }
    };
    checkpoint.add(part, canonical.unwrap_or_else(|| name.to_owned()), file, name, View::Whole)
}

/// The weight files of a part's folder: the plain file, its shards, then the same as variant fp16. `None` if the folder
/// has none of them.
fn part_files(folder: &Path, part: Part) -> Result<Option<Vec<PathBuf>>> {
    let base = folder::weights_stem(part);
    for variant in ["", ".fp16"] {
        let whole = folder.join(format!("{base}{variant}.safetensors"));
        if whole.is_file() {
            return Ok(Some(vec![whole]));
        }
        let index = folder.join(format!("{base}.safetensors.index{variant}.json"));
        if let Some(index_json) = read_json(&index)? {
            return shards(folder, &index, &index_json).map(Some);
        }
    }
    if folder.join(format!("{base}.bin")).is_file() {
        return Err(Error::WrongKind { path: folder.into(), kind: Kind::PickledFolder });
    }
    Ok(None)
}

/// The files that an index names, each once.
fn shards(folder: &Path, index: &Path, json: &Value) -> Result<Vec<PathBuf>> {
    let map = json.get("weight_map").and_then(Value::as_object);
    let mut names: Vec<&str> = map.into_iter().flat_map(|map| map.values().filter_map(Value::as_str)).collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        let source = serde::de::Error::custom("`weight_map` names no file");
        return Err(Error::Json { path: index.into(), what: "the list of shards".into(), source });
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// A JSON file; `None` if it does not exist.
fn read_json(path: &Path) -> Result<Option<Value>> {
    let text = match storage::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    serde_json::from_str(&text).map(Some).map_err(|source| Error::Json { path: path.into(), what: "the JSON".into(), source })
}
