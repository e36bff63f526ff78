//! Timesteps and noise of one training sample, each a function of the sample's own key.
//!
//! # Determinism
//! Every draw takes the key (seed, epoch, position of the sample in the epoch) and a purpose: `Purpose::Timestep`,
//! `Purpose::Noise` (the field, then the coarse fields of multires noise) and `Purpose::NoiseOffset` (two strengths, the
//! offsets, then the input perturbation). So a sample gets the same numbers in any batch, on any rank, at any world
//! size, after any resume; turning one option on does not change the draws of another. Draws are made on the CPU, so
//! the device does not matter either.
//!
//! Formulas: sd-scripts `library/train_util.py` and `library/custom_train_functions.py`. sd-scripts draws one strength,
//! one resize ratio and one standard deviation for a whole batch; here each sample has its own, since anything shared
//! by a batch would tie a sample's noise to its neighbours.

use candle_core::{DType, Device, Tensor};
use random::{Purpose, Stream};

use crate::{Error, Result, TRAIN_TIMESTEPS};

/// Which sample of the run is drawn for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SampleKey {
    /// Epoch, counted from 0.
    pub epoch: u64,
    /// Position of the sample in the epoch, counted from 0 over all ranks.
    pub position: u64,
}

/// How training noise is made. Field names are those of sd-scripts' options.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseConfig {
    /// Seed of the run.
    pub seed: u64,
    /// Strength of the constant added to each channel of the noise; 0 is off.
    pub noise_offset: f64,
    /// Draw the strength of the offset per sample, uniform in [0, noise_offset).
    pub noise_offset_random_strength: bool,
    /// Adds this times |mean of the channel of the latents| to the strength; the sum is kept at 0 or above.
    pub adaptive_noise_scale: Option<f64>,
    /// Number of coarser noise fields that are added; 0 is off.
    pub multires_noise_iterations: u32,
    /// Weight of the i-th coarser field is this to the power i.
    pub multires_noise_discount: f64,
    /// Strength of the extra noise in the network's input that the target does not hold; 0 is off.
    pub ip_noise_gamma: f64,
    /// Draw that strength per sample, uniform in [0, ip_noise_gamma).
    pub ip_noise_gamma_random_strength: bool,
    /// First timestep that is drawn.
    pub min_timestep: u32,
    /// First timestep above the range, 1000 at most.
    pub max_timestep: u32,
}

impl Default for NoiseConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            noise_offset: 0.0,
            noise_offset_random_strength: false,
            adaptive_noise_scale: None,
            multires_noise_iterations: 0,
            multires_noise_discount: 0.3,
            ip_noise_gamma: 0.0,
            ip_noise_gamma_random_strength: false,
            min_timestep: 0,
            max_timestep: TRAIN_TIMESTEPS as u32,
        }
    }
}

/// Noise of one batch.
#[derive(Debug)]
pub struct BatchNoise {
    /// [B, C, H, W] f32: what the target is made of.
    pub target: Tensor,
    /// [B, C, H, W] f32: what the latents are noised with; differs from `target` only with `ip_noise_gamma`.
    pub input: Tensor,
    /// One per sample.
    pub timesteps: Vec<u32>,
}

impl NoiseConfig {
    /// The timestep of one sample, uniform in `min_timestep..max_timestep`.
    pub fn draw_timestep(&self, key: SampleKey) -> Result<u32> {
        let (min, max) = (self.min_timestep, self.max_timestep);
        if min >= max || max > TRAIN_TIMESTEPS as u32 {
            return Err(Error::TimestepRange { min, max });
        }
        Ok(min + Stream::new(self.seed, Purpose::Timestep, key.epoch, key.position).below(u64::from(max - min)) as u32)
    }

    /// The noise of one sample, with multires noise and noise offset as configured.
    ///
    /// `shape`: [C, H, W]. `latent_means`: mean of each latent channel, which only `adaptive_noise_scale` reads.
    /// Returns C*H*W values.
    pub fn draw_noise(&self, key: SampleKey, shape: [usize; 3], latent_means: &[f32]) -> Vec<f32> {
        let [channels, height, width] = shape;
        let mut stream = Stream::new(self.seed, Purpose::Noise, key.epoch, key.position);
        let mut noise = stream.normal(channels * height * width);
        let mut offsets = Stream::new(self.seed, Purpose::NoiseOffset, key.epoch, key.position);
        let (strength, _) = (offsets.uniform(), offsets.uniform());
        let offset_noise = offsets.normal(channels);
        if self.noise_offset != 0.0 {
            let strength = self.noise_offset * if self.noise_offset_random_strength { strength } else { 1.0 };
            for (c, field) in noise.chunks_exact_mut(height * width).enumerate() {
                let mean = f64::from(latent_means.get(c).copied().unwrap_or(0.0).abs());
                let strength = self.adaptive_noise_scale.map_or(strength, |a| (strength + a * mean).max(0.0));
                let shift = strength as f32 * offset_noise[c];
                field.iter_mut().for_each(|x| *x += shift);
            }
        }
        if self.multires_noise_iterations > 0 {
            add_multires(&mut noise, shape, self.multires_noise_iterations, self.multires_noise_discount, &mut stream);
        }
        noise
    }

    /// The noise that the network's input gets on top (Ning et al. 2023, "Input Perturbation"), already scaled, or
    /// `None` when it is off. `shape`: [C, H, W].
    pub fn draw_input_perturbation(&self, key: SampleKey, shape: [usize; 3]) -> Option<Vec<f32>> {
        if self.ip_noise_gamma == 0.0 {
            return None;
        }
        let mut stream = Stream::new(self.seed, Purpose::NoiseOffset, key.epoch, key.position);
        let (_, strength) = (stream.uniform(), stream.uniform());
        stream.normal(shape[0]);
        let gamma = self.ip_noise_gamma * if self.ip_noise_gamma_random_strength { strength } else { 1.0 };
        let mut noise = stream.normal(shape.iter().product());
        noise.iter_mut().for_each(|x| *x *= gamma as f32);
        Some(noise)
    }

    /// Timesteps and noise of a whole batch, on the CPU. `latents`: [B, C, H, W], of which only `adaptive_noise_scale` reads more than the
    /// shape; `keys`: one per sample.
    pub fn draw_batch(&self, keys: &[SampleKey], latents: &Tensor) -> Result<BatchNoise> {
        let (batch, channels, height, width) = latents.dims4()?;
        if keys.len() != batch {
            return Err(Error::BatchSize { what: "sample keys", got: keys.len(), batch });
        }
        let means: Vec<Vec<f32>> = match self.adaptive_noise_scale {
            Some(_) => latents.to_dtype(DType::F32)?.mean((2, 3))?.to_vec2()?,
            None => vec![Vec::new(); batch],
        };
        let shape = [channels, height, width];
        let per_sample = channels * height * width;
        let mut target = Vec::with_capacity(batch * per_sample);
        let mut extra = Vec::new();
        let mut timesteps = Vec::with_capacity(batch);
        for (&key, means) in keys.iter().zip(&means) {
            timesteps.push(self.draw_timestep(key)?);
            target.extend(self.draw_noise(key, shape, means));
            extra.extend(self.draw_input_perturbation(key, shape).into_iter().flatten());
        }
        let tensor = |values: Vec<f32>| Tensor::from_vec(values, (batch, channels, height, width), &Device::Cpu);
        let target = tensor(target)?;
        let input = if extra.is_empty() { target.clone() } else { (&target + tensor(extra)?)? };
        Ok(BatchNoise { target, input, timesteps })
    }
}

/// noise + strength * offset_noise: the offset as such, for draws that were made elsewhere.
///
/// `noise`: [B, C, H, W]; `offset_noise`: [B, C, 1, 1].
pub fn add_offset(noise: &Tensor, offset_noise: &Tensor, strength: f64) -> Result<Tensor> {
    // The strength is rounded to f32 before the product, as a scalar in torch is.
    let strength = Tensor::new(strength as f32, noise.device())?;
    Ok(noise.broadcast_add(&offset_noise.broadcast_mul(&strength)?)?)
}

/// Adds coarser fields, each stretched over the whole, and brings the sum back to unit deviation (Whitaker 2023,
/// "Multi-Resolution Noise for Diffusion Model Training").
fn add_multires(noise: &mut [f32], [channels, height, width]: [usize; 3], iterations: u32, discount: f64, stream: &mut Stream) {
    for i in 0..iterations as i32 {
        let ratio = (2.0 + 2.0 * stream.uniform()).powi(i);
        let small = |side: usize| ((side as f64 / ratio) as usize).max(1);
        let (h, w) = (small(height), small(width));
        let weight = discount.powi(i) as f32;
        let coarse = stream.normal(channels * h * w);
        for (field, coarse) in noise.chunks_exact_mut(height * width).zip(coarse.chunks_exact(h * w)) {
            add_stretched(field, (height, width), coarse, (h, w), weight);
        }
        if h == 1 || w == 1 {
            break;
        }
    }
    let n = noise.len() as f64;
    let mean = noise.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let variance = noise.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    if variance > 0.0 {
        let scale = (1.0 / variance.sqrt()) as f32;
        noise.iter_mut().for_each(|x| *x *= scale);
    }
}

/// field += weight * bilinear stretch of `coarse` (half-pixel centres, edges repeated).
fn add_stretched(field: &mut [f32], (height, width): (usize, usize), coarse: &[f32], (h, w): (usize, usize), weight: f32) {
    let at = |i: usize, from: usize, to: usize| {
        let x = ((i as f32 + 0.5) * from as f32 / to as f32 - 0.5).max(0.0);
        let low = (x as usize).min(from - 1);
        (low, (low + 1).min(from - 1), x - low as f32)
    };
    for (y, row) in field.chunks_exact_mut(width).enumerate() {
        let (y0, y1, fy) = at(y, h, height);
        for (x, out) in row.iter_mut().enumerate() {
            let (x0, x1, fx) = at(x, w, width);
            let top = coarse[y0 * w + x0] * (1.0 - fx) + coarse[y0 * w + x1] * fx;
            let bottom = coarse[y1 * w + x0] * (1.0 - fx) + coarse[y1 * w + x1] * fx;
            *out += weight * (top * (1.0 - fy) + bottom * fy);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: [usize; 3] = [4, 16, 24];

    fn key(position: u64) -> SampleKey {
        SampleKey { epoch: 2, position }
    }

    fn moments(x: &[f32]) -> (f32, f32) {
        let n = x.len() as f32;
        let mean = x.iter().sum::<f32>() / n;
        (mean, x.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / (n - 1.0))
    }

    #[test]
    fn a_sample_gets_the_same_noise_in_every_batch() {
        let config = NoiseConfig { seed: 7, noise_offset: 0.05, ip_noise_gamma: 0.1, multires_noise_iterations: 3, ..Default::default() };
        let latents = |b| Tensor::zeros((b, 4, 16, 24), DType::F32, &Device::Cpu).unwrap();
        let both = config.draw_batch(&[key(5), key(9)], &latents(2)).unwrap();
        let alone = config.draw_batch(&[key(9)], &latents(1)).unwrap();
        assert_eq!(both.timesteps[1], alone.timesteps[0]);
        for (both, alone) in [(&both.target, &alone.target), (&both.input, &alone.input)] {
            let second: Vec<f32> = both.get(1).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(second, alone.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        }
        assert_ne!(both.timesteps[0], both.timesteps[1]);
        assert!(matches!(config.draw_batch(&[key(1)], &latents(2)), Err(Error::BatchSize { .. })));
    }

    #[test]
    fn options_do_not_move_each_others_draws() {
        let plain = NoiseConfig { seed: 1, ..Default::default() };
        let offset = NoiseConfig { noise_offset: 0.5, ..plain.clone() };
        let both = NoiseConfig { ip_noise_gamma: 0.2, ..offset.clone() };
        let base = plain.draw_noise(key(0), SHAPE, &[]);
        let shifted = offset.draw_noise(key(0), SHAPE, &[]);
        let area = SHAPE[1] * SHAPE[2];
        for c in 0..4 {
            let differences: Vec<f32> = (0..area).map(|i| shifted[c * area + i] - base[c * area + i]).collect();
            let (mean, variance) = moments(&differences);
            // One constant per channel; what is left is the rounding of values up to 5.
            assert!(mean != 0.0 && variance < 1e-12, "channel {c}: {mean} {variance}");
        }
        assert_eq!(shifted, both.draw_noise(key(0), SHAPE, &[]));
        assert_eq!(plain.draw_timestep(key(0)).unwrap(), both.draw_timestep(key(0)).unwrap());
        assert!(plain.draw_input_perturbation(key(0), SHAPE).is_none());
    }

    #[test]
    fn offsets_follow_strength_and_latent_mean() {
        let fixed = NoiseConfig { noise_offset: 0.1, ..Default::default() };
        let base = NoiseConfig::default().draw_noise(key(3), SHAPE, &[]);
        let shift = |config: &NoiseConfig, means: &[f32]| config.draw_noise(key(3), SHAPE, means)[0] - base[0];
        let one = shift(&fixed, &[]);
        let double = shift(&NoiseConfig { noise_offset: 0.2, ..fixed.clone() }, &[]);
        let adaptive = shift(&NoiseConfig { adaptive_noise_scale: Some(0.05), ..fixed.clone() }, &[-2.0, 0.0, 0.0, 0.0]);
        let clamped = shift(&NoiseConfig { adaptive_noise_scale: Some(-0.05), ..fixed.clone() }, &[-9.0, 0.0, 0.0, 0.0]);
        let random = shift(&NoiseConfig { noise_offset_random_strength: true, ..fixed }, &[]);
        // Differences of values up to 5 in f32: 5e-7 each.
        assert!((double - 2.0 * one).abs() < 2e-6);
        assert!((adaptive - 2.0 * one).abs() < 2e-6);
        assert_eq!(clamped, 0.0);
        assert!(random.abs() < one.abs() && random != 0.0 && random.signum() == one.signum());
    }

    #[test]
    fn multires_noise_is_smoother_and_of_unit_deviation() {
        let plain = NoiseConfig::default();
        let multires = NoiseConfig { multires_noise_iterations: 6, multires_noise_discount: 0.8, ..plain.clone() };
        let smoothness = |x: &[f32]| x.windows(2).map(|w| w[0] * w[1]).sum::<f32>() / x.len() as f32;
        let shape = [4, 32, 32];
        let (a, b) = (plain.draw_noise(key(1), shape, &[]), multires.draw_noise(key(1), shape, &[]));
        // Correlation of neighbours: 0 ± 4/sqrt(4096) for white noise; the coarse fields hold well over half of the variance.
        assert!(smoothness(&a).abs() < 0.0625 && smoothness(&b) > 0.2, "{} {}", smoothness(&a), smoothness(&b));
        let (_, variance) = moments(&b);
        assert!((variance - 1.0).abs() < 1e-4, "{variance}");
    }

    #[test]
    fn stretching_is_bilinear_with_half_pixel_centres() {
        let mut field = [0f32; 8];
        add_stretched(&mut field, (2, 4), &[0.0, 4.0], (1, 2), 0.5);
        // torch: interpolate([[0, 4]], size=(2, 4), mode="bilinear") gives 0, 1, 3, 4 in both rows.
        assert_eq!(field, [0.0, 0.5, 1.5, 2.0, 0.0, 0.5, 1.5, 2.0]);
    }

    #[test]
    fn timesteps_stay_in_range_and_cover_it() {
        let config = NoiseConfig { min_timestep: 990, max_timestep: 1000, ..Default::default() };
        let mut seen = [false; 10];
        for p in 0..200 {
            seen[config.draw_timestep(key(p)).unwrap() as usize - 990] = true;
        }
        // A value is missed in 200 draws with probability 10 * 0.9^200 = 7e-9.
        assert!(seen.iter().all(|s| *s));
        for (min, max) in [(5, 5), (6, 5), (0, 1001)] {
            let bad = NoiseConfig { min_timestep: min, max_timestep: max, ..Default::default() };
            assert!(matches!(bad.draw_timestep(key(0)), Err(Error::TimestepRange { .. })));
        }
    }
}
