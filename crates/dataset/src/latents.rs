//! What a VAE made of the images, kept in memory or on disk, so that an image is encoded once.
//!
//! A latent is found by its [`LatentId`]: a hash of the image file's bytes and of everything that was done to the pixels.
//! A changed image, another bucket, crop or method of resizing therefore asks for another id, and an old latent is never
//! taken for a new one (sd-scripts takes it: it does not check shapes). Shards of another VAE or another element type are
//! not read.
//!
//! # File format
//! A folder of shards `latents-<16 hex digits>.safetensors`, each whole or absent, in any number, never rewritten. The
//! digits are a hash of the VAE and of the ids within, so that processes that fill one folder never write to the same
//! name. Metadata: `lokr.format` = `latents-1`, `lokr.vae` = the caller's name of the VAE's weights. Tensors: named by
//! the id's 64 hex digits, f16 or f32, `[4, height / 8, width / 8]`, before the scaling by 0.13025.
//!
//! Left to others: running the VAE; the draw from its posterior, if the latent is to be one.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use half::f16;
use storage::safetensors::{Dtype, SafeTensors, TensorSource};

use crate::config::Interpolation;
use crate::report::Named;
use crate::{Error, Placement, Result};

const FORMAT: &str = "latents-1";
/// Changes whenever the same file, placement and crop give other pixels than before.
const PIXELS_VERSION: u32 = 1;
/// Inserted bytes after which a shard is written without being asked: bounds what waits in memory, and what a kill costs.
const SHARD_BYTES: usize = 64 << 20;

/// Which latent is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ItemKey {
    /// Number of the sample in the dataset.
    pub sample: u32,
    /// Whether it is of the mirrored image.
    pub flipped: bool,
}

/// Identity of a latent's input: a hash of the file's bytes and of what was done to the pixels, as 64 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LatentId(String);

/// One latent that a dataset wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LatentItem {
    /// Where the dataset has it.
    pub key: ItemKey,
    /// What it is.
    pub id: LatentId,
    /// `[4, height / 8, width / 8]`.
    pub shape: [usize; 3],
}

/// A latent as it is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Latent {
    /// `[4, height / 8, width / 8]`.
    pub shape: [usize; 3],
    /// Values before the scaling by 0.13025, C order.
    pub data: Vec<f32>,
}

/// Where latents are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CachePlace {
    /// For this run only.
    Memory,
    /// In this folder, created if absent; other runs and other processes may share it.
    Folder(PathBuf),
}

/// Element type of kept latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheDtype {
    /// Half the space; latents (of size about 10) keep three digits.
    F16,
    /// As the VAE gave them.
    F32,
}

/// What a cache holds of what is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheReport {
    /// Latents wanted; images that are equal count once.
    pub wanted: usize,
    /// Of these, present.
    pub present: usize,
    /// Shards in the folder that were not read: of another VAE, another type, or broken.
    pub ignored_shards: Named,
}

/// Latents by [`ItemKey`]. All methods may be called from several threads.
#[derive(Debug)]
pub struct LatentCache {
    folder: Option<PathBuf>,
    vae: String,
    dtype: CacheDtype,
    items: BTreeMap<ItemKey, (LatentId, [usize; 3])>,
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    shards: Vec<SafeTensors>,
    /// Index into `shards`.
    on_disk: HashMap<LatentId, usize>,
    in_memory: BTreeMap<LatentId, ([usize; 3], Vec<u8>)>,
    waiting_bytes: usize,
    ignored: Named,
}

impl LatentId {
    /// The identity of a latent; `content` is the blake3 hash of the image file.
    pub(crate) fn new(
        content: &str,
        placement: Placement,
        crop: (u32, u32),
        flipped: bool,
        interpolation: Option<Interpolation>,
    ) -> LatentId {
        let Placement { bucket: (bw, bh), resized: (rw, rh) } = placement;
        let done = format!("{rw}x{rh} to {bw}x{bh} at {},{} flipped {flipped} by {interpolation:?}", crop.0, crop.1);
        let all = format!("lokr latent {PIXELS_VERSION} {content} {done}");
        LatentId(blake3::hash(all.as_bytes()).to_hex().to_string())
    }

    /// The 64 hex digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl LatentCache {
    /// Opens a cache for the latents that [`crate::Dataset::latent_items`] wants. `vae` names the VAE's weights (a hash
    /// of them); latents of another one are not seen.
    ///
    /// # Errors
    /// [`Error::Storage`] if the folder cannot be created or listed. A broken shard is none: it is ignored and reported.
    pub fn open(place: CachePlace, vae: &str, dtype: CacheDtype, items: Vec<LatentItem>) -> Result<Self> {
        let folder = match place {
            CachePlace::Memory => None,
            CachePlace::Folder(folder) => Some(folder),
        };
        let items = items.into_iter().map(|item| (item.key, (item.id, item.shape))).collect();
        let cache = Self { folder, vae: vae.into(), dtype, items, state: RwLock::default() };
        if let Some(folder) = &cache.folder {
            storage::create_dir_all(folder)?;
            cache.reload()?;
        }
        Ok(cache)
    }

    /// Looks for shards that other processes wrote in the meantime.
    ///
    /// # Errors
    /// [`Error::Storage`] if the folder cannot be listed.
    pub fn reload(&self) -> Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let mut state = self.write();
        let known: HashSet<PathBuf> = state.shards.iter().map(|s| s.path().to_path_buf()).collect();
        state.ignored = Named::default();
        for path in storage::list_dir(folder)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let is_shard = name.starts_with("latents-") && name.ends_with(".safetensors") && !storage::is_scratch(&path);
            if !is_shard || known.contains(&path) {
                continue;
            }
            match SafeTensors::open(&path) {
                Ok(shard) => match self.refusal(&shard) {
                    None => state.add(shard),
                    Some(why) => state.ignored.add(format_args!("{name}: {why}")),
                },
                Err(error) => {
                    tracing::warn!("latent cache shard is ignored: {}", crate::source::chain(&error));
                    state.ignored.add(format_args!("{name}: {}", crate::source::chain(&error)));
                }
            }
        }
        Ok(())
    }

    /// What is there of what is wanted.
    pub fn report(&self) -> CacheReport {
        let state = self.read();
        let wanted: HashMap<_, _> = self.items.values().map(|(id, shape)| (id, *shape)).collect();
        let present = wanted.iter().filter(|(id, shape)| state.has(id, **shape)).count();
        CacheReport { wanted: wanted.len(), present, ignored_shards: state.ignored.clone() }
    }

    /// Keys whose latents are wanted and absent, ascending. Of equal images the first alone is listed.
    pub fn missing(&self) -> Vec<ItemKey> {
        let state = self.read();
        let mut listed = HashSet::new();
        let absent = self.items.iter().filter(|(_, (id, shape))| !state.has(id, *shape) && listed.insert(id));
        absent.map(|(key, _)| *key).collect()
    }

    /// Whether a latent is present.
    pub fn contains(&self, key: ItemKey) -> bool {
        self.items.get(&key).is_some_and(|(id, shape)| self.read().has(id, *shape))
    }

    /// A latent, if it is present.
    pub fn get(&self, key: ItemKey) -> Option<Latent> {
        let (id, shape) = self.items.get(&key)?;
        let state = self.read();
        let bytes = state.bytes(id, *shape)?;
        Some(Latent { shape: *shape, data: self.dtype.decode(bytes) })
    }

    /// Keeps a latent. On disk it is written with the next shard: after 64 MiB, or at [`LatentCache::flush`].
    ///
    /// # Errors
    /// [`Error::Latent`] if the key is not wanted, the shape is another, or a value is not finite in the cache's type;
    /// [`Error::Storage`] if a shard was due and cannot be written (the latents stay in memory).
    pub fn insert(&self, key: ItemKey, shape: [usize; 3], data: Vec<f32>) -> Result<()> {
        let refuse = |what: String| Error::Latent { sample: key.sample, what };
        let (id, expected) = self.items.get(&key).ok_or_else(|| refuse("it is not one that the dataset wants".into()))?;
        if shape != *expected || data.len() != shape.iter().product::<usize>() {
            return Err(refuse(format!("its shape is {shape:?} with {} values, the bucket's is {expected:?}", data.len())));
        }
        if let Some(at) = data.iter().position(|&v| !self.dtype.holds(v)) {
            return Err(refuse(format!("value {at} is {}, which {:?} cannot hold", data[at], self.dtype)));
        }
        let bytes = self.dtype.encode(&data);
        let mut state = self.write();
        state.waiting_bytes += bytes.len();
        state.in_memory.insert(id.clone(), (shape, bytes));
        if state.waiting_bytes >= SHARD_BYTES { self.write_shard(&mut state) } else { Ok(()) }
    }

    /// Writes what has been inserted since the last shard; does nothing for a cache in memory.
    ///
    /// # Errors
    /// [`Error::Storage`]; the latents stay in memory and the next call tries again.
    pub fn flush(&self) -> Result<()> {
        self.write_shard(&mut self.write())
    }

    fn write_shard(&self, state: &mut State) -> Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        if state.in_memory.is_empty() {
            return Ok(());
        }
        let mut name = blake3::Hasher::new();
        name.update(format!("{FORMAT} {} {:?}", self.vae, self.dtype).as_bytes());
        state.in_memory.keys().for_each(|id| _ = name.update(id.0.as_bytes()));
        let path = folder.join(format!("latents-{}.safetensors", &name.finalize().to_hex()[..16]));
        let tensors = state.in_memory.iter().map(|(id, (shape, bytes))| TensorSource {
            name: id.0.clone(),
            dtype: self.dtype.into(),
            shape: shape.to_vec(),
            data: Box::new(move || Cow::Borrowed(bytes.as_slice())),
        });
        let metadata = [("lokr.format", FORMAT), ("lokr.vae", &self.vae)].map(|(k, v)| (k.to_string(), v.to_string()));
        storage::safetensors::write(&path, tensors.collect(), &metadata.into())?;
        let shard = SafeTensors::open(&path)?;
        state.add(shard);
        state.in_memory.clear();
        state.waiting_bytes = 0;
        Ok(())
    }

    /// Why a shard's latents are not used.
    fn refusal(&self, shard: &SafeTensors) -> Option<String> {
        let says = |key: &str| shard.metadata().get(key).map_or("", String::as_str);
        if says("lokr.format") != FORMAT {
            return Some(format!("its format is `{}`, not `{FORMAT}`", says("lokr.format")));
        }
        if says("lokr.vae") != self.vae {
            return Some(format!("made by another VAE (`{}`, not `{}`)", says("lokr.vae"), self.vae));
        }
        let other = shard.names().filter_map(|n| shard.info(n)).find(|info| info.dtype != Dtype::from(self.dtype));
        other.map(|info| format!("its latents are {:?}, not {:?}", info.dtype, self.dtype))
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(|e| e.into_inner())
    }
}

impl State {
    fn add(&mut self, shard: SafeTensors) {
        let index = self.shards.len();
        self.on_disk.extend(shard.names().map(|name| (LatentId(name.into()), index)));
        self.shards.push(shard);
    }

    fn has(&self, id: &LatentId, shape: [usize; 3]) -> bool {
        self.bytes(id, shape).is_some()
    }

    fn bytes(&self, id: &LatentId, shape: [usize; 3]) -> Option<&[u8]> {
        if let Some((held, bytes)) = self.in_memory.get(id) {
            return (*held == shape).then_some(bytes);
        }
        let shard = &self.shards[*self.on_disk.get(id)?];
        let fits = shard.info(id.as_str()).is_some_and(|info| info.shape == shape);
        if fits { shard.bytes(id.as_str()) } else { None }
    }
}

impl CacheDtype {
    fn holds(self, value: f32) -> bool {
        match self {
            CacheDtype::F16 => f16::from_f32(value).is_finite(),
            CacheDtype::F32 => value.is_finite(),
        }
    }

    fn encode(self, data: &[f32]) -> Vec<u8> {
        match self {
            CacheDtype::F16 => data.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            CacheDtype::F32 => data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            CacheDtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            CacheDtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }
}

impl From<CacheDtype> for Dtype {
    fn from(dtype: CacheDtype) -> Dtype {
        match dtype {
            CacheDtype::F16 => Dtype::F16,
            CacheDtype::F32 => Dtype::F32,
        }
    }
}
