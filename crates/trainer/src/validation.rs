//! The loss on held-out pictures at fixed timesteps and with fixed noise: one number that can be compared within a run
//! and between runs on the same pictures.

use candle_core::Tensor;
use dataset::{CaptionContext, Dataset, DatasetConfig, SubsetConfig};
use diffusion::BatchNoise;
use random::{Purpose, Stream};
use sdxl::Sdxl;
use sdxl::tokenizer::Tokenizer;
use sdxl::vae::LATENT_SCALE;

use crate::config::RunConfig;
use crate::data::{chunks, push_ids};
use crate::error::Result;
use crate::latents::pixels_tensor;
use crate::step::{self, MicroBatch, Objective};

/// Held-out pictures with their latents, and where the loss is taken.
pub struct Validation {
    pictures: Vec<Picture>,
    timesteps: Vec<u32>,
    seed: u64,
    chunks: usize,
}

struct Picture {
    /// `(1, 4, h, w)`, scaled; the posterior's mean.
    latents: Tensor,
    ids: [Vec<Vec<u32>>; 2],
    time_ids: Tensor,
}

impl Validation {
    /// Reads and encodes the pictures of `validation.image_dir`; `None` if the recipe names none. Captions are read as
    /// the first subset's are, with its prefix, but nothing is shuffled or dropped.
    ///
    /// # Errors
    /// If the folder or a picture cannot be read.
    pub fn open(config: &RunConfig, model: &Sdxl, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let v = &config.validation;
        let Some(image_dir) = &v.image_dir else { return Ok(None) };
        let first = config.dataset.subsets.first().cloned().unwrap_or_default();
        let plain = SubsetConfig::default();
        let subset = SubsetConfig {
            image_dir: image_dir.clone(),
            num_repeats: 1,
            caption_dropout_rate: plain.caption_dropout_rate,
            caption_dropout_every_n_epochs: plain.caption_dropout_every_n_epochs,
            caption_tag_dropout_rate: plain.caption_tag_dropout_rate,
            token_warmup_step: plain.token_warmup_step,
            shuffle_caption: false,
            flip_aug: false,
            random_crop: false,
            ..first
        };
        let (dataset, _) = Dataset::open(&DatasetConfig { subsets: vec![subset], ..config.dataset.clone() })?;
        let chunks = chunks(config.train.max_token_length);
        let mut pictures = Vec::new();
        for number in 0..dataset.len() as u32 {
            let loaded = dataset.load_pixels(number, v.seed, 0, u64::from(number))?;
            let context = CaptionContext { seed: v.seed, epoch: 0, position: u64::from(number), step: 0, max_train_steps: 1 };
            let mut ids = [vec![], vec![]];
            push_ids(tokenizer, &dataset.caption(loaded.sample, context)?, chunks, &mut ids);
            let (mean, _) = model.vae.encode(&pixels_tensor(loaded.pixels)?.to_device(model.device())?)?;
            let time_ids = Tensor::from_vec(loaded.view.time_ids.map(|t| t as f32).to_vec(), (1, 6), model.device())?;
            pictures.push(Picture { latents: (mean * LATENT_SCALE)?, ids, time_ids });
        }
        Ok(Some(Self { pictures, timesteps: v.timesteps.clone(), seed: v.seed, chunks }))
    }

    /// Held-out pictures.
    pub fn len(&self) -> usize {
        self.pictures.len()
    }

    /// Whether there is none; [`Validation::open`] makes no such set.
    pub fn is_empty(&self) -> bool {
        self.pictures.is_empty()
    }

    /// Mean unweighted loss over pictures and timesteps; the noise depends on seed, picture and timestep alone.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn loss(&self, model: &Sdxl, objective: &Objective) -> Result<f64> {
        let mut sum = 0.0;
        for (i, picture) in self.pictures.iter().enumerate() {
            for &t in &self.timesteps {
                let count = picture.latents.elem_count();
                let noise = Stream::new(self.seed, Purpose::Validation, i as u64, u64::from(t)).normal(count);
                let noise = Tensor::from_vec(noise, picture.latents.shape(), model.device())?;
                let batch = MicroBatch {
                    latents: picture.latents.clone(),
                    noise: BatchNoise { target: noise.clone(), input: noise, timesteps: vec![t] },
                    ids: picture.ids.clone(),
                    chunks: self.chunks,
                    time_ids: picture.time_ids.clone(),
                };
                // One picture, and its own loss.
                sum += ops::no_grad(|| step::forward(model, objective, &batch))?.loss.read()?.iter().sum::<f64>();
            }
        }
        Ok(sum / (self.pictures.len() * self.timesteps.len()).max(1) as f64)
    }
}
