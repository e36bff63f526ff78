//! From the plan to micro-batches: captions, token ids, size conditions and latents of each batch, prepared ahead.
//!
//! # Determinism
//! Everything of a visit is a function of (seed, epoch, position in the epoch), captions also of the step.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use dataset::{BatchPlan, CaptionContext, Dataset, LatentCache, LatentSource, LatentVisit, Prefetcher};
use diffusion::{BatchNoise, NoiseConfig, SampleKey};
use ops::Staging;
use random::{Purpose, Stream};
use sdxl::tokenizer::Tokenizer;
use sdxl::vae::{AutoencoderKL, LATENT_SCALE};

use crate::config::RunConfig;
use crate::error::Result;
use crate::latents::{self, draw, pixels_tensor, posterior_noise};
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
    staging: Staging,
}

/// One batch, as far as it can be made without the VAE.
pub struct Prepared {
    /// Numbers of the samples, after replacement of broken ones.
    pub samples: Vec<u32>,
    /// How many of them took a broken one's place.
    pub replaced: u64,
    keys: Vec<SampleKey>,
    images: Images,
    ids: [Vec<Vec<u32>>; 2],
    time_ids: Vec<f32>,
}

enum Images {
    /// With a cache: latents, or what they are made of.
    Cached(Vec<LatentVisit>),
    /// `(n, 3, h, w)`.
    Pixels(Tensor),
}

impl Data {
    /// Puts together the data of rank `rank` of `ranks`; what `cache` lacks is encoded when it is visited.
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
            staging: Staging::default(),
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
        let (mut samples, mut replaced, mut keys, mut time_ids) = (vec![], 0, vec![], vec![]);
        let (mut cached, mut pixels) = (Vec::new(), Vec::new());
        let mut ids = [Vec::new(), Vec::new()];
        for entry in b.entries {
            let (sample, view) = match &self.cache {
                Some(cache) => {
                    let visit = self.dataset.load_latent(cache, entry.sample, self.seed, epoch, entry.position)?;
                    let seen = (visit.item.key.sample, visit.view);
                    cached.push(visit);
                    seen
                }
                None => {
                    let loaded = self.dataset.load_pixels(entry.sample, self.seed, epoch, entry.position)?;
                    let seen = (loaded.sample, loaded.view);
                    pixels.push(pixels_tensor(loaded.pixels)?);
                    seen
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
            replaced += u64::from(sample != entry.sample);
            keys.push(SampleKey { epoch, position: entry.position });
            time_ids.extend(view.time_ids.map(|v| v as f32));
        }
        let images = if self.cache.is_some() { Images::Cached(cached) } else { Images::Pixels(Tensor::cat(&pixels, 0)?) };
        Ok(Prepared { samples, replaced, keys, images, ids, time_ids })
    }

    /// Adds what needs the VAE: latents that the cache lacks, or, without one, a new draw from the posterior at each visit;
    /// and noise.
    ///
    /// # Errors
    /// If shapes do not fit, or the cache cannot be written.
    pub fn finish(&self, prepared: Prepared, vae: &AutoencoderKL) -> Result<MicroBatch> {
        let send = |t: &Tensor| self.staging.to_device(t, vae.device());
        let unscaled = match prepared.images {
            Images::Cached(visits) => {
                let latents: Result<Vec<Tensor>> = visits.into_iter().map(|visit| self.latent(visit, vae)).collect();
                Tensor::cat(&latents?, 0)?
            }
            Images::Pixels(pixels) => {
                let (mean, logvar) = vae.encode(&send(&pixels)?)?;
                let streams = prepared.keys.iter().map(|k| Stream::new(self.seed, Purpose::Posterior, k.epoch, k.position));
                draw(&mean, &logvar, &send(&posterior_noise(&mean, streams)?)?)?
            }
        };
        let latents = (unscaled * LATENT_SCALE)?;
        let BatchNoise { target: drawn, input, timesteps } = self.noise.draw_batch(&prepared.keys, &latents)?;
        let (latents, target) = (send(&latents)?, send(&drawn)?);
        let input = if input.id() == drawn.id() { target.clone() } else { send(&input)? };
        let time_ids = send(&Tensor::from_vec(prepared.time_ids, (timesteps.len(), 6), &Device::Cpu)?)?;
        if let Some(why) = self.staging.refusal() {
            tracing::warn!("no page-locked memory for batches, so that each is waited for on its way to the GPU: {why}");
        }
        let noise = BatchNoise { target, input, timesteps };
        Ok(MicroBatch { latents, noise, ids: prepared.ids, chunks: self.chunks, time_ids })
    }

    /// The latent of one visit, `(1, 4, h, w)`. One picture is encoded at a time, so that the numbers do not depend on which
    /// others of its batch were there already.
    fn latent(&self, visit: LatentVisit, vae: &AutoencoderKL) -> Result<Tensor> {
        match (visit.source, &self.cache) {
            (LatentSource::Pixels(pixels), Some(cache)) => latents::keep(cache, vae, &pixels_tensor(pixels)?, &[&visit.item]),
            (LatentSource::Latent(dataset::Latent { shape: [c, h, w], data }), _) => {
                Ok(Tensor::from_vec(data, (1, c, h, w), &Device::Cpu)?)
            }
            (LatentSource::Pixels(_), None) => Err(candle_core::Error::Msg("a cached visit without a cache".into()).into()),
        }
    }

    /// The batch that takes most memory: width and height of its pictures, and a micro-batch of that size of zeros and empty captions.
    ///
    /// # Errors
    /// If the plan cannot be made.
    pub fn largest_batch(&self, vae: &AutoencoderKL) -> Result<Option<((u32, u32), MicroBatch)>> {
        let plan = self.plan(0)?;
        let size = |b: &dataset::Batch| b.entries.len() as u64 * u64::from(b.bucket.0) * u64::from(b.bucket.1);
        let Some(largest) = plan.iter().max_by_key(size) else { return Ok(None) };
        let ((w, h), n, device) = (largest.bucket, largest.entries.len(), vae.device());
        let [rows, columns] = [h, w].map(|side| side as usize / vae.factor());
        let latents = Tensor::zeros((n, vae.config.latent_channels, rows, columns), DType::F32, device)?;
        let mut ids = [Vec::new(), Vec::new()];
        (0..n).for_each(|_| push_ids(&self.tokenizer, "", self.chunks, &mut ids));
        let noise = BatchNoise { target: latents.clone(), input: latents.clone(), timesteps: vec![self.noise.min_timestep; n] };
        let time_ids = Tensor::zeros((n, 6), DType::F32, device)?;
        Ok(Some(((w, h), MicroBatch { latents, noise, ids, chunks: self.chunks, time_ids })))
    }

    /// The file of a sample, for messages.
    pub fn path(&self, sample: u32) -> PathBuf {
        self.dataset.name(sample)
    }
}

/// This rank's batches from step `step` on, in order, prepared by so many threads: `accumulation` for each step, `None` where
/// the end of an epoch leaves fewer for this rank.
///
/// # Errors
/// If a thread cannot be started.
pub fn prefetch(data: &Arc<Data>, step: u64, threads: usize) -> Result<Prefetcher<Option<Result<Prepared>>>> {
    let turns = data.timeline.accumulation;
    let range = step * turns..data.timeline.total_steps.max(step) * turns;
    let data = data.clone();
    let prepare = move |n: u64| data.timeline.batch_of(n / turns, n % turns, data.rank).map(|batch| data.prepare(batch));
    let started = Prefetcher::new(range, threads, threads, prepare);
    started.map_err(|e| candle_core::Error::Msg(format!("no thread for reading pictures: {e}")).into())
}

/// Threads that prepare batches, in each of `processes` on this machine.
pub fn loader_threads(config: &RunConfig, processes: usize) -> usize {
    let all = || std::thread::available_parallelism().map_or(1, usize::from) / processes.max(1);
    config.train.max_data_loader_n_workers.unwrap_or_else(all).max(1)
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
