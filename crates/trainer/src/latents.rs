//! The latent cache of a run: where it lies, what is encoded before the first step, and how one picture becomes a latent.
//!
//! No rank waits for another one's latents. What a visit does not find, its rank encodes then, and the numbers are the same.
//!
//! # Determinism
//! A cached latent is one draw from the VAE's posterior, keyed by the picture's identity alone, and rounded to f16 wherever it is
//! kept: a run that moves its cache from memory to files, or back, goes on with the same numbers.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use dataset::{CacheDtype, CachePlace, Dataset, ItemKey, LatentCache, LatentItem, OnBrokenImage, Pixels};
use random::{Purpose, Stream};
use sdxl::vae::AutoencoderKL;

use crate::config::RunConfig;
use crate::error::Result;
use crate::event::{Event, Observer};

/// Keys whose latents are looked for together: bounds what is held of them.
const CHUNK: usize = 1 << 16;

/// Opens the recipe's latent cache; `None` if it asks for none.
///
/// # Errors
/// If latents cannot be cached (random crops), or the folder cannot be used.
pub fn open(config: &RunConfig, dataset: &Dataset, vae_hash: &str, observe: &mut Observer) -> Result<Option<LatentCache>> {
    let c = &config.cache;
    let place = match (c.cache_latents_to_disk, c.cache_latents) {
        (true, _) => CachePlace::Folder(folder(config)),
        (false, true) => CachePlace::Memory,
        (false, false) => return Ok(None),
    };
    dataset.config().check_cacheable()?;
    let cache = LatentCache::open(place, vae_hash, CacheDtype::F16)?.with_npz(c.read_npz_latents);
    let ignored = cache.ignored_shards()?;
    if let Some(first) = ignored.first.first() {
        observe(Event::Note(format!("{} files of cached latents are not used; {first}", ignored.count)));
    }
    Ok(Some(cache))
}

/// Where cached latents are kept: beside the pictures or their index, so that other runs find them.
fn folder(config: &RunConfig) -> PathBuf {
    if let Some(folder) = &config.cache.cache_latents_dir {
        return folder.clone();
    }
    let beside = config.dataset.subsets.first().map(|s| match (&s.index, s.image_dir.as_os_str().is_empty()) {
        (Some(index), true) => index.parent().unwrap_or(Path::new("")).to_path_buf(),
        _ => s.image_dir.clone(),
    });
    beside.unwrap_or_default().join(".lokr-latents")
}

/// Whether all latents are encoded before the first step: not lazily, and not where each of several ranks keeps its own in memory.
pub fn encodes_ahead(config: &RunConfig, ranks: usize) -> bool {
    !config.cache.cache_latents_lazily && (ranks == 1 || config.cache.cache_latents_to_disk)
}

/// Encodes, before the first step, what the cache lacks; nothing with `cache_latents_lazily`. Of `ranks` that share a folder,
/// each takes its part and does not wait for the others; where latents are in memory, ranks encode what they visit.
/// Pictures that turn out broken are skipped; the dataset lists them.
///
/// # Errors
/// If a latent is not finite (the VAE does not fit), the cache cannot be written, or too many pictures are broken.
pub fn encode_ahead(
    config: &RunConfig,
    dataset: &Dataset,
    cache: &LatentCache,
    vae: &AutoencoderKL,
    (rank, ranks): (usize, usize),
    observe: &mut Observer,
) -> Result<()> {
    if !encodes_ahead(config, ranks) {
        return Ok(());
    }
    let c = &config.cache;
    let keys: Vec<ItemKey> = dataset.latent_keys()?.skip(rank).step_by(ranks.max(1)).collect();
    for (number, chunk) in keys.chunks(CHUNK).enumerate() {
        let mut missing = dataset.missing_latents(cache, chunk)?;
        // Pictures of one size stand together, so that a batch has one size.
        missing.sort_by_key(|item| (item.shape, item.key));
        let before = number * CHUNK + chunk.len() - missing.len();
        let mut rest = missing.as_slice();
        while let Some(first) = rest.first() {
            let len = rest.iter().take(c.vae_batch_size.max(1)).take_while(|item| item.shape == first.shape).count();
            let (items, after) = rest.split_at(len);
            rest = after;
            encode_batch(config, dataset, cache, vae, items)?;
            // A cache that was whole before says nothing.
            observe(Event::Preparing("latents", before + missing.len() - rest.len(), keys.len()));
        }
    }
    Ok(cache.flush()?)
}

fn encode_batch(config: &RunConfig, dataset: &Dataset, cache: &LatentCache, vae: &AutoencoderKL, items: &[LatentItem]) -> Result<()> {
    let (mut tensors, mut good) = (Vec::new(), Vec::new());
    for item in items {
        match dataset.load_for_cache(item.key) {
            Ok(pixels) => {
                tensors.push(pixels_tensor(pixels)?);
                good.push(item);
            }
            // It is listed in `Dataset::broken`, and its bucket's next picture will take its place.
            Err(dataset::Error::Image { .. }) if config.dataset.on_broken_image == OnBrokenImage::Skip => {}
            Err(e) => return Err(e.into()),
        }
    }
    if good.is_empty() {
        return Ok(());
    }
    keep(cache, vae, &Tensor::cat(&tensors, 0)?, &good).map(drop)
}

/// Encodes pictures of one size, keeps their latents and gives them as the cache holds them: `(n, 4, h, w)`, unscaled.
///
/// # Errors
/// If a latent is not finite, or the cache cannot be written.
pub fn keep(cache: &LatentCache, vae: &AutoencoderKL, pixels: &Tensor, items: &[&LatentItem]) -> Result<Tensor> {
    let (mean, logvar) = vae.encode(&pixels.to_device(vae.device())?)?;
    let noise = posterior_noise(&mean, items.iter().map(|item| Stream::new(0, Purpose::Posterior, item.id.number(), 0)))?;
    let latents = draw(&mean, &logvar, &noise.to_device(mean.device())?)?;
    let [c, h, w] = [1, 2, 3].map(|i| latents.dims()[i]);
    let mut kept = Vec::with_capacity(latents.elem_count());
    for (i, item) in items.iter().enumerate() {
        kept.extend(cache.insert(item, [c, h, w], &latents.get(i)?.flatten_all()?.to_vec1()?)?.data);
    }
    Ok(Tensor::from_vec(kept, (items.len(), c, h, w), &Device::Cpu)?)
}

/// Noise for a draw from the posteriors with these means, one stream per item; on the CPU.
///
/// # Errors
/// If there are more or fewer streams than items.
pub fn posterior_noise(mean: &Tensor, streams: impl Iterator<Item = Stream>) -> Result<Tensor> {
    let per_item: usize = mean.dims()[1..].iter().product();
    let noise: Vec<f32> = streams.flat_map(|mut s| s.normal(per_item)).collect();
    Ok(Tensor::from_vec(noise, mean.shape(), &Device::Cpu)?)
}

/// mean + exp(logvar / 2) * noise.
///
/// # Errors
/// If the shapes differ.
pub fn draw(mean: &Tensor, logvar: &Tensor, noise: &Tensor) -> Result<Tensor> {
    Ok((mean + (logvar * 0.5)?.exp()? * noise)?)
}

/// Pixels as `(1, 3, h, w)`.
///
/// # Errors
/// If the numbers do not fit the size.
pub fn pixels_tensor(pixels: Pixels) -> Result<Tensor> {
    let (w, h) = pixels.target_size;
    Ok(Tensor::from_vec(pixels.data, (1, 3, h as usize, w as usize), &Device::Cpu)?)
}
