//! What a VAE made of the images, kept in memory or on disk, so that an image is encoded once: before training, or when it
//! is first visited.
//!
//! A latent is found by its [`LatentId`]: a hash of the image's content and of everything that was done to the pixels.
//! A changed image, another bucket, crop or method of resizing therefore asks for another id, and an old latent is never
//! taken for a new one (sd-scripts takes it: it does not check shapes). Shards of another VAE or another element type are
//! not read.
//!
//! # File format
//! A folder of shards `latents-<16 hex digits>.safetensors`, each whole or absent, in any number, never rewritten. The
//! digits are a hash of the VAE and of the ids within, so that processes that fill one folder never write to the same
//! name. Metadata: `lokr.format` = `latents-1`, `lokr.vae` = the caller's name of the VAE's weights. Tensors: named by
//! the id's 64 hex digits, f16 or f32, `[4, height / 8, width / 8]`, before the scaling by 0.13025. Beside them lies their
//! [`catalogue`], which can be deleted at any time.
//!
//! # Determinism
//! What [`LatentCache::get`] gives has been rounded to the cache's type, also where it has not been written yet. A run
//! thus sees the same numbers whether a latent was there before, was made by another process, or is new.
//!
//! Left to others: running the VAE; the draw from its posterior, if the latent is to be one.

mod catalogue;
mod items;
mod npz;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use half::f16;
use storage::safetensors::{Dtype, TensorSource};

use crate::config::Interpolation;
use crate::report::Named;
use crate::{Error, Placement, Result};
use catalogue::Catalogue;

pub use items::{LatentVisit, Source as LatentSource};

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

/// Identity of a latent's input: a hash (blake3) of the image's content and of what was done to the pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LatentId([u8; 32]);

/// One latent that a dataset wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// Latents by [`LatentId`]. All methods may be called from several threads; several processes may fill one folder.
///
/// On disk, nothing is held of the latents but those that wait for their shard: places are looked up in the catalogue.
#[derive(Debug)]
pub struct LatentCache {
    disk: Option<Catalogue>,
    vae: String,
    dtype: CacheDtype,
    npz: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    in_memory: BTreeMap<LatentId, ([usize; 3], Vec<u8>)>,
    waiting_bytes: usize,
}

impl LatentId {
    /// The identity of a latent; `content` tells the image's bytes from others.
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
        LatentId(*blake3::hash(all.as_bytes()).as_bytes())
    }

    /// 64 hex digits.
    pub fn hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    /// Its first 64 bits: an index for what is drawn for this latent.
    pub fn number(&self) -> u64 {
        self.0[..8].iter().fold(0, |n, &b| n << 8 | u64::from(b))
    }
}

impl LatentCache {
    /// Opens a cache. `vae` names the VAE's weights (a hash of them); latents of another one are not seen.
    ///
    /// # Errors
    /// [`Error::Storage`] if the folder cannot be created or listed. A broken shard is none: it is ignored and reported.
    pub fn open(place: CachePlace, vae: &str, dtype: CacheDtype) -> Result<Self> {
        let disk = match place {
            CachePlace::Memory => None,
            CachePlace::Folder(folder) => Some(Catalogue::open(folder, vae, dtype)?),
        };
        Ok(Self { disk, vae: vae.into(), dtype, npz: false, state: Mutex::default() })
    }

    /// Takes the latents that sd-scripts left in `.npz` files beside the pictures, where it has none of its own. They do not say
    /// which VAE made them.
    pub fn with_npz(mut self, npz: bool) -> Self {
        self.npz = npz;
        self
    }

    /// Shards in the folder that are not used, with the reason: of another VAE, another type, or broken.
    ///
    /// # Errors
    /// [`Error::Sqlite`].
    pub fn ignored_shards(&self) -> Result<Named> {
        self.disk.as_ref().map_or_else(|| Ok(Named::default()), Catalogue::ignored)
    }

    /// Number of latents that are there, whoever wants them.
    ///
    /// # Errors
    /// [`Error::Sqlite`].
    pub fn count(&self) -> Result<usize> {
        let written = self.disk.as_ref().map_or(Ok(0), Catalogue::count)?;
        Ok(written + self.lock().in_memory.len())
    }

    /// Whether a latent is present.
    ///
    /// # Errors
    /// [`Error::Sqlite`].
    pub fn contains(&self, item: &LatentItem) -> Result<bool> {
        if let Some((shape, _)) = self.lock().in_memory.get(&item.id) {
            return Ok(*shape == item.shape);
        }
        let place = self.disk.as_ref().map_or(Ok(None), |disk| disk.find(&item.id))?;
        Ok(place.is_some_and(|place| place.shape == item.shape))
    }

    /// A latent, if it is present. A shard that was deleted meanwhile has none.
    ///
    /// # Errors
    /// [`Error::Sqlite`]; [`Error::Storage`] if its shard cannot be read.
    pub fn get(&self, item: &LatentItem) -> Result<Option<Latent>> {
        let latent = |bytes: &[u8]| Some(Latent { shape: item.shape, data: self.dtype.decode(bytes) });
        if let Some((shape, bytes)) = self.lock().in_memory.get(&item.id) {
            return Ok(latent(bytes).filter(|_| *shape == item.shape));
        }
        let Some(disk) = &self.disk else { return Ok(None) };
        let Some(place) = disk.find(&item.id)?.filter(|place| place.shape == item.shape) else { return Ok(None) };
        let len = item.shape.iter().product::<usize>() * Dtype::from(self.dtype).bitsize() / 8;
        match storage::read_range(&place.path, place.offset, len) {
            Ok(bytes) => Ok(latent(&bytes)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Keeps a latent, and gives it back as [`LatentCache::get`] will. On disk it is written with the next shard: after
    /// 64 MiB, or at [`LatentCache::flush`].
    ///
    /// # Errors
    /// [`Error::Latent`] if the shape is not the one that is wanted, or a value is not finite in the cache's type;
    /// [`Error::Storage`] if a shard was due and cannot be written (the latents stay in memory).
    pub fn insert(&self, item: &LatentItem, shape: [usize; 3], data: &[f32]) -> Result<Latent> {
        let refuse = |what: String| Error::Latent { sample: item.key.sample, what };
        if shape != item.shape || data.len() != shape.iter().product::<usize>() {
            return Err(refuse(format!("its shape is {shape:?} with {} values, the bucket's is {:?}", data.len(), item.shape)));
        }
        if let Some(at) = data.iter().position(|&v| !self.dtype.holds(v)) {
            return Err(refuse(format!("value {at} is {}, which {:?} cannot hold", data[at], self.dtype)));
        }
        let bytes = self.dtype.encode(data);
        let latent = Latent { shape, data: self.dtype.decode(&bytes) };
        let mut state = self.lock();
        state.waiting_bytes += bytes.len();
        state.in_memory.insert(item.id, (shape, bytes));
        if state.waiting_bytes >= SHARD_BYTES {
            self.write_shard(&mut state)?;
        }
        Ok(latent)
    }

    /// Writes what has been inserted since the last shard; does nothing for a cache in memory.
    ///
    /// # Errors
    /// [`Error::Storage`]; the latents stay in memory and the next call tries again.
    pub fn flush(&self) -> Result<()> {
        self.write_shard(&mut self.lock())
    }

    fn write_shard(&self, state: &mut State) -> Result<()> {
        let Some(disk) = &self.disk else { return Ok(()) };
        if state.in_memory.is_empty() {
            return Ok(());
        }
        let mut name = blake3::Hasher::new();
        name.update(format!("{FORMAT} {} {:?}", self.vae, self.dtype).as_bytes());
        state.in_memory.keys().for_each(|id| _ = name.update(id.hex().as_bytes()));
        let path = disk.folder().join(format!("latents-{}.safetensors", &name.finalize().to_hex()[..16]));
        let tensors = state.in_memory.iter().map(|(id, (shape, bytes))| TensorSource {
            name: id.hex(),
            dtype: self.dtype.into(),
            shape: shape.to_vec(),
            data: Box::new(move || Cow::Borrowed(bytes.as_slice())),
        });
        let metadata = [("lokr.format", FORMAT), ("lokr.vae", &self.vae)].map(|(k, v)| (k.to_string(), v.to_string()));
        storage::safetensors::write(&path, tensors.collect(), &metadata.into())?;
        disk.refresh()?;
        state.in_memory.clear();
        state.waiting_bytes = 0;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for LatentCache {
    /// What waits for its shard is written, so that a run that ends loses none.
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            tracing::warn!("cached latents are lost: {}", crate::source::chain(&error));
        }
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
