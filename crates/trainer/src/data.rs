//! From the plan to micro-batches: captions, token ids, size conditions and latents of each batch, prepared ahead.
//!
//! # Determinism
//! Everything of a visit is a function of (seed, epoch, position in the epoch), captions also of the step.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use candle_core::{Device, Tensor};
use dataset::{BatchPlan, CacheDtype, CachePlace, CaptionContext, Dataset, ItemKey, LatentCache, Pixels, Prefetcher, View};
use diffusion::{NoiseConfig, SampleKey};
use random::{Purpose, Stream};
use sdxl::tokenizer::Tokenizer;
use sdxl::vae::{AutoencoderKL, LATENT_SCALE};

use crate::config::RunConfig;
use crate::error::Result;
use crate::event::{Event, Observer};
use crate::ranks::Ranks;
use crate::step::MicroBatch;
use crate::timeline::Timeline;

/// What batches are made of.
pub struct Data {
    /// The samples.
    pub dataset: Arc<Dataset>,
    cache: Option<LatentCache>,
    tokenizer: Tokenizer,
    noise: NoiseConfig,
    /// The shape of the run.
    pub timeline: Timeline,
    chunks: usize,
    batch_size: usize,
    rank: u64,
    seed: u64,
    plans: Mutex<BTreeMap<u64, Arc<BatchPlan>>>,
}

/// One batch, as far as it can be made without the VAE.
pub struct Prepared {
    /// Numbers of the samples, after replacement of broken ones.
    pub samples: Vec<u32>,
    keys: Vec<SampleKey>,
    images: Images,
    ids: [Vec<Vec<u32>>; 2],
    time_ids: Vec<f32>,
}

enum Images {
    /// `(n, 4, h, w)`, unscaled.
    Latents(Tensor),
    /// `(n, 3, h, w)`.
    Pixels(Tensor),
}

impl Data {
    /// Puts together the data of rank `rank` of `ranks`; latents are encoded by [`encode_latents`].
    ///
    /// # Errors
    /// If the plan or the tokenizer cannot be made.
    pub fn new(config: &RunConfig, dataset: Dataset, cache: Option<LatentCache>, rank: usize, ranks: usize) -> Result<Self> {
        let t = &config.train;
        let batches = dataset.plan(t.seed, 0, t.batch_size)?.len() as u64;
        Ok(Self {
            dataset: Arc::new(dataset),
            cache,
            tokenizer: Tokenizer::new()?,
            noise: config.noise(),
            timeline: Timeline::new(batches, t.gradient_accumulation_steps as u64, ranks as u64, t.max_train_steps, t.max_train_epochs),
            chunks: chunks(t.max_token_length),
            batch_size: t.batch_size,
            rank: rank as u64,
            seed: t.seed,
            plans: Mutex::default(),
        })
    }

    /// Whether latents are cached, so that training does without the VAE.
    pub fn caches_latents(&self) -> bool {
        self.cache.is_some()
    }

    /// The plan of an epoch; the two newest are kept.
    ///
    /// # Errors
    /// If the dataset cannot make it.
    pub fn plan(&self, epoch: u64) -> Result<Arc<BatchPlan>> {
        let mut plans = self.plans.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(plan) = plans.get(&epoch) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(self.dataset.plan(self.seed, epoch, self.batch_size)?);
        plans.insert(epoch, plan.clone());
        while plans.len() > 2 {
            plans.pop_first();
        }
        Ok(plan)
    }

    /// Samples of a step on all ranks together.
    ///
    /// # Errors
    /// If the plan cannot be made.
    pub fn samples_of(&self, step: u64) -> Result<usize> {
        let (epoch, range) = self.timeline.window(step);
        let plan = self.plan(epoch)?;
        Ok(range.filter_map(|k| plan.batch(k as usize)).map(|b| b.entries.len()).sum())
    }

    /// Makes batch `batch`, counted over all epochs.
    ///
    /// # Errors
    /// If a picture cannot be read and no other of its bucket can take its place.
    pub fn prepare(&self, batch: u64) -> Result<Prepared> {
        let (epoch, k) = self.timeline.place(batch);
        let plan = self.plan(epoch)?;
        let Some(b) = plan.batch(k as usize) else {
            return Err(candle_core::Error::Msg(format!("epoch {epoch} has no batch {k}")).into());
        };
        let (mut samples, mut keys, mut time_ids) = (vec![], vec![], vec![]);
        let (mut latents, mut pixels) = (Vec::new(), Vec::new());
        let mut ids = [Vec::new(), Vec::new()];
        for entry in b.entries {
            let (sample, view) = match &self.cache {
                Some(cache) => {
                    let (sample, view, latent) = self.cached(cache, entry.sample, epoch, entry.position)?;
                    latents.push(latent);
                    (sample, view)
                }
                None => {
                    let loaded = self.dataset.load_pixels(entry.sample, self.seed, epoch, entry.position)?;
                    pixels.push(pixels_tensor(&loaded.pixels)?);
                    (loaded.sample, loaded.view)
                }
            };
            let context = CaptionContext {
                seed: self.seed,
                epoch,
                position: entry.position,
                step: self.timeline.step_of(batch),
                max_train_steps: self.timeline.total_steps,
            };
            let caption = self.dataset.caption(sample, context)?;
            push_ids(&self.tokenizer, &caption, self.chunks, &mut ids);
            samples.push(sample);
            keys.push(SampleKey { epoch, position: entry.position });
            time_ids.extend(view.time_ids.map(|v| v as f32));
        }
        let images = if pixels.is_empty() { Images::Latents(Tensor::cat(&latents, 0)?) } else { Images::Pixels(Tensor::cat(&pixels, 0)?) };
        Ok(Prepared { samples, keys, images, ids, time_ids })
    }

    /// The latent of a visit, or of the next sample of the bucket whose latent could be made.
    fn cached(&self, cache: &LatentCache, sample: u32, epoch: u64, position: u64) -> Result<(u32, View, Tensor)> {
        let key = |s: u32| -> Result<(ItemKey, View)> {
            let view = self.dataset.view(s, self.seed, epoch, position)?;
            Ok((ItemKey { sample: s, flipped: view.flipped }, view))
        };
        let found = self.dataset.replacement(sample, |s| key(s).is_ok_and(|(k, _)| cache.contains(k)))?;
        let Some(sample) = found else {
            let s = self.dataset.sample(sample)?;
            return Err(dataset::Error::BucketBroken { bucket: s.placement.bucket, count: 0, path: s.path.clone() }.into());
        };
        let (key, view) = key(sample)?;
        let latent = cache.get(key).ok_or_else(|| candle_core::Error::Msg(format!("latent of sample {sample} vanished")))?;
        let [c, h, w] = latent.shape;
        Ok((sample, view, Tensor::from_vec(latent.data, (1, c, h, w), &Device::Cpu)?))
    }

    /// Adds what needs the VAE: the latents of uncached pictures, a new draw from the posterior at each visit; and noise.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn finish(&self, prepared: Prepared, vae: &AutoencoderKL) -> Result<MicroBatch> {
        let unscaled = match prepared.images {
            Images::Latents(latents) => latents,
            Images::Pixels(pixels) => {
                let (mean, logvar) = vae.encode(&pixels)?;
                let draws = prepared.keys.iter().map(|k| Stream::new(self.seed, Purpose::Posterior, k.epoch, k.position));
                draw(&mean, &logvar, draws)?
            }
        };
        let latents = (unscaled * LATENT_SCALE)?;
        let noise = self.noise.draw_batch(&prepared.keys, &latents)?;
        let n = prepared.samples.len();
        let time_ids = Tensor::from_vec(prepared.time_ids, (n, 6), &Device::Cpu)?;
        Ok(MicroBatch { latents, noise, ids: prepared.ids, chunks: self.chunks, time_ids })
    }

    /// The caption of a visit before tokenization, for messages.
    pub fn path(&self, sample: u32) -> &Path {
        self.dataset.samples().get(sample as usize).map_or(Path::new("?"), |s| &s.path)
    }
}

/// This rank's batches from step `step` on, in order, prepared by two threads: `accumulation` for each step, `None` where
/// the end of an epoch leaves fewer for this rank.
///
/// # Errors
/// If a thread cannot be started.
pub fn prefetch(data: &Arc<Data>, step: u64) -> Result<Prefetcher<Option<Result<Prepared>>>> {
    let turns = data.timeline.accumulation;
    let range = step * turns..data.timeline.total_steps.max(step) * turns;
    let data = data.clone();
    let prepare = move |n: u64| data.timeline.batch_of(n / turns, n % turns, data.rank).map(|batch| data.prepare(batch));
    let started = Prefetcher::new(range, 2, 4, prepare);
    started.map_err(|e| candle_core::Error::Msg(format!("no thread for reading pictures: {e}")).into())
}

/// Rows of 77 tokens for a `max_token_length` of 75, 150 or 225.
pub fn chunks(max_token_length: u32) -> usize {
    (max_token_length as usize / 75).max(1)
}

/// Appends the token rows of a caption for both encoders.
pub fn push_ids(tokenizer: &Tokenizer, caption: &str, chunks: usize, ids: &mut [Vec<Vec<u32>>; 2]) {
    ids[0].extend(tokenizer.te1_rows(caption, chunks).iter().map(|row| row.to_vec()));
    ids[1].extend(tokenizer.te2_rows(caption, chunks).iter().map(|row| row.to_vec()));
}

/// Pixels as `(1, 3, h, w)`.
///
/// # Errors
/// If the numbers do not fit the size.
pub fn pixels_tensor(pixels: &Pixels) -> Result<Tensor> {
    let (w, h) = pixels.target_size;
    Ok(Tensor::from_slice(&pixels.data, (1, 3, h as usize, w as usize), &Device::Cpu)?)
}

/// mean + exp(logvar / 2) * noise, one stream per item.
fn draw(mean: &Tensor, logvar: &Tensor, streams: impl Iterator<Item = Stream>) -> Result<Tensor> {
    let per_item: usize = mean.dims()[1..].iter().product();
    let noise: Vec<f32> = streams.flat_map(|mut s| s.normal(per_item)).collect();
    let noise = Tensor::from_vec(noise, mean.shape(), mean.device())?;
    Ok((mean + (logvar * 0.5)?.exp()? * noise)?)
}

/// Opens the recipe's latent cache and encodes what it lacks: one draw from the posterior, which depends on the picture
/// alone. Pictures that turn out broken are skipped; the dataset lists them.
///
/// Ranks that keep latents in a folder share the work: first all ranks, and then, for what was written where others do not
/// see it, the ranks of each machine. In memory, each rank encodes all that it may need.
///
/// # Errors
/// If a latent is not finite (the VAE does not fit), or the cache cannot be written.
pub fn encode_latents(
    config: &RunConfig,
    dataset: &Dataset,
    vae: &AutoencoderKL,
    vae_hash: &str,
    folder: &Path,
    ranks: &Ranks,
    observe: &mut Observer,
) -> Result<Option<LatentCache>> {
    let c = &config.cache;
    let (place, dtype) = match (c.cache_latents_to_disk, c.cache_latents) {
        (true, _) => (CachePlace::Folder(folder.to_path_buf()), CacheDtype::F16),
        (false, true) => (CachePlace::Memory, CacheDtype::F32),
        (false, false) => return Ok(None),
    };
    let items = dataset.latent_items()?;
    let ids: BTreeMap<ItemKey, u64> =
        items.iter().map(|i| (i.key, u64::from_str_radix(&i.id.as_str()[..16], 16).unwrap_or_default())).collect();
    let cache = LatentCache::open(place, vae_hash, dtype, items)?;
    let shares = match (&config.cache.cache_latents_to_disk, ranks.count()) {
        (true, 2..) => vec![(ranks.rank(), ranks.count()), (ranks.world.local_rank, ranks.world.local_world_size)],
        _ => vec![(0, 1)],
    };
    for (number, of) in shares {
        let mut missing = cache.missing();
        // Pictures of one bucket stand together, so that a batch has one size.
        missing.sort_by_key(|k| (dataset.samples()[k.sample as usize].placement.bucket, *k));
        let missing: Vec<ItemKey> = missing.into_iter().skip(number).step_by(of).collect();
        let mut done = 0;
        let mut rest = missing.as_slice();
        while let Some(first) = rest.first() {
            let bucket = |k: &ItemKey| dataset.samples()[k.sample as usize].placement.bucket;
            let len = rest.iter().take(c.vae_batch_size.max(1)).take_while(|k| bucket(k) == bucket(first)).count();
            let (keys, after) = rest.split_at(len);
            rest = after;
            encode_batch(dataset, vae, &cache, keys, &ids, config)?;
            done += len;
            observe(Event::Preparing("latents", done, missing.len()));
        }
        cache.flush()?;
        ranks.wait("the latents")?;
        cache.reload()?;
    }
    Ok(Some(cache))
}

fn encode_batch(
    dataset: &Dataset,
    vae: &AutoencoderKL,
    cache: &LatentCache,
    keys: &[ItemKey],
    ids: &BTreeMap<ItemKey, u64>,
    config: &RunConfig,
) -> Result<()> {
    let (mut tensors, mut good) = (Vec::new(), Vec::new());
    for &key in keys {
        match dataset.load_for_cache(key) {
            Ok(pixels) => {
                tensors.push(pixels_tensor(&pixels)?);
                good.push(key);
            }
            // It is listed in `Dataset::broken`, and its bucket's next picture will take its place.
            Err(dataset::Error::Image { .. }) if config.dataset.on_broken_image == dataset::OnBrokenImage::Skip => {}
            Err(e) => return Err(e.into()),
        }
    }
    if good.is_empty() {
        return Ok(());
    }
    let (mean, logvar) = vae.encode(&Tensor::cat(&tensors, 0)?)?;
    let latents = draw(&mean, &logvar, good.iter().map(|k| Stream::new(0, Purpose::Posterior, ids[k], 0)))?;
    let [c, h, w] = [1, 2, 3].map(|i| latents.dims()[i]);
    for (i, &key) in good.iter().enumerate() {
        cache.insert(key, [c, h, w], latents.get(i)?.flatten_all()?.to_vec1()?)?;
    }
    Ok(())
}
