//! The noise schedule of SDXL: how much signal is left at each of the 1000 training timesteps.
//!
//! β_t = (linspace(√0.00085, √0.012, 1000))², ᾱ = cumprod(1 - β), snr = ᾱ/(1 - ᾱ): the "scaled linear" schedule of
//! Rombach et al. 2022 (latent-diffusion `configs/stable-diffusion`, diffusers `schedulers/scheduling_ddpm.py`). The
//! table is built in f32 as those programs do, because loss weights and noisy latents are compared with theirs. One
//! thing is not imitated: diffusers rounds ᾱ to the latents' type before the square root; here it stays f32.

use candle_core::{DType, Tensor};

use crate::choice::choice;
use crate::{Error, Result};

/// Number of timesteps that SDXL was trained with.
pub const TRAIN_TIMESTEPS: usize = 1000;

choice! {
    /// What the network predicts.
    Prediction {
        /// The noise ε.
        Epsilon = "epsilon",
        /// The velocity v = √ᾱ ε - √(1-ᾱ) x0 (Salimans and Ho 2022).
        V = "v",
    }
}

/// Table of ᾱ and of the signal-to-noise ratios that weigh the loss.
#[derive(Clone, Debug)]
pub struct Schedule {
    alphas_cumprod: Vec<f32>,
    snr: Vec<f32>,
}

impl Schedule {
    /// SDXL's schedule as released.
    pub fn sdxl() -> Self {
        let alphas_cumprod = cumprod(&betas());
        let snr = snr_table(&alphas_cumprod);
        Self { alphas_cumprod, snr }
    }

    /// SDXL's schedule shifted so that nothing of the signal is left at the last timestep (Lin et al. 2024,
    /// "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1).
    ///
    /// `snr_before_shift`: weigh losses by the table of the unshifted schedule, which is what sd-scripts does (it never
    /// updates that table). Otherwise the weights follow the schedule that the noise follows.
    pub fn zero_terminal_snr(snr_before_shift: bool) -> Self {
        let plain = Self::sdxl();
        let root: Vec<f32> = plain.alphas_cumprod.iter().map(|a| a.sqrt()).collect();
        let (first, last) = (root[0], root[TRAIN_TIMESTEPS - 1]);
        let scale = first / (first - last);
        let shifted: Vec<f32> = root.iter().map(|s| (s - last) * scale).map(|s| s * s).collect();
        // Through β and back, as the peers do: the rounding of ᾱ is theirs then.
        let betas: Vec<f32> = (0..TRAIN_TIMESTEPS).map(|t| 1.0 - if t == 0 { shifted[0] } else { shifted[t] / shifted[t - 1] }).collect();
        let alphas_cumprod = cumprod(&betas);
        let snr = if snr_before_shift { plain.snr } else { snr_table(&alphas_cumprod) };
        Self { alphas_cumprod, snr }
    }

    /// ᾱ_t for t = 0..1000.
    pub fn alphas_cumprod(&self) -> &[f32] {
        &self.alphas_cumprod
    }

    /// Signal-to-noise ratio that weighs the loss at `timestep`; 0 at the end of a zero terminal SNR schedule.
    pub fn snr(&self, timestep: u32) -> Result<f32> {
        self.snr.get(timestep as usize).copied().ok_or(Error::Timestep { timestep })
    }

    /// ᾱ_t at `timestep`.
    pub fn alpha_cumprod(&self, timestep: u32) -> Result<f32> {
        self.alphas_cumprod.get(timestep as usize).copied().ok_or(Error::Timestep { timestep })
    }

    /// Noisy latents x_t = √ᾱ_t x0 + √(1-ᾱ_t) ε (Ho et al. 2020, equation 4), each sample at its own timestep.
    ///
    /// `latents`, `noise`: [B, C, H, W], taken to f32. `timesteps`: B entries.
    pub fn add_noise(&self, latents: &Tensor, noise: &Tensor, timesteps: &[u32]) -> Result<Tensor> {
        let (signal, sigma) = self.roots(latents, timesteps)?;
        let signal = latents.to_dtype(DType::F32)?.broadcast_mul(&signal)?;
        Ok((signal + noise.to_dtype(DType::F32)?.broadcast_mul(&sigma)?)?)
    }

    /// Velocity v = √ᾱ_t ε - √(1-ᾱ_t) x0 (Salimans and Ho 2022, appendix D). Shapes as in [`Self::add_noise`].
    pub fn velocity(&self, latents: &Tensor, noise: &Tensor, timesteps: &[u32]) -> Result<Tensor> {
        let (signal, sigma) = self.roots(latents, timesteps)?;
        let noise = noise.to_dtype(DType::F32)?.broadcast_mul(&signal)?;
        Ok((noise - latents.to_dtype(DType::F32)?.broadcast_mul(&sigma)?)?)
    }

    /// What the network should answer: the noise itself, or the velocity. `noise` is the one without input perturbation.
    pub fn target(&self, prediction: Prediction, latents: &Tensor, noise: &Tensor, timesteps: &[u32]) -> Result<Tensor> {
        match prediction {
            Prediction::Epsilon => Ok(noise.to_dtype(DType::F32)?),
            Prediction::V => self.velocity(latents, noise, timesteps),
        }
    }

    /// √ᾱ and √(1-ᾱ) as [B, 1, 1, 1].
    fn roots(&self, latents: &Tensor, timesteps: &[u32]) -> Result<(Tensor, Tensor)> {
        let batch = latents.dim(0)?;
        if timesteps.len() != batch {
            return Err(Error::BatchSize { what: "timesteps", got: timesteps.len(), batch });
        }
        let alphas = timesteps.iter().map(|&t| self.alpha_cumprod(t)).collect::<Result<Vec<f32>>>()?;
        let column = |f: fn(f32) -> f32| {
            let values: Vec<f32> = alphas.iter().map(|&a| f(a)).collect();
            Tensor::from_vec(values, (batch, 1, 1, 1), latents.device())
        };
        Ok((column(f32::sqrt)?, column(|a| (1.0 - a).sqrt())?))
    }
}

/// β_t in f32. Both halves of the line are counted from their own end, with one rounding per value, as `torch.linspace`
/// does where it is compiled for fused multiply-add.
fn betas() -> Vec<f32> {
    let (start, end) = (0.00085f64.sqrt() as f32, 0.012f64.sqrt() as f32);
    let step = (end - start) / (TRAIN_TIMESTEPS - 1) as f32;
    (0..TRAIN_TIMESTEPS)
        .map(|t| {
            let x = if t < TRAIN_TIMESTEPS / 2 {
                step.mul_add(t as f32, start)
            } else {
                (-step).mul_add((TRAIN_TIMESTEPS - 1 - t) as f32, end)
            };
            x * x
        })
        .collect()
}

/// ᾱ from β: f32 factors, product carried in f64, as `torch.cumprod` does on the CPU.
fn cumprod(betas: &[f32]) -> Vec<f32> {
    let mut product = 1f64;
    betas
        .iter()
        .map(|&beta| {
            product *= f64::from(1.0 - beta);
            product as f32
        })
        .collect()
}

/// snr = (√ᾱ / √(1-ᾱ))², in this form and order in sd-scripts `library/custom_train_functions.py`.
fn snr_table(alphas_cumprod: &[f32]) -> Vec<f32> {
    alphas_cumprod.iter().map(|&a| (a.sqrt() / (1.0 - a).sqrt()).powi(2)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn ends_of_the_table_are_those_of_the_released_schedule() {
        let s = Schedule::sdxl();
        // 1 - 0.00085 and the σ range 0.0292 .. 14.6146 that k-diffusion states for this schedule (4 digits given).
        assert!((s.alphas_cumprod()[0] - 0.99915).abs() < 1e-7);
        let sigma = |a: f32| ((1.0 - a) / a).sqrt();
        assert!((sigma(s.alphas_cumprod()[0]) - 0.0292).abs() < 5e-5);
        assert!((sigma(s.alphas_cumprod()[999]) - 14.6146).abs() < 5e-5);
        assert!(s.alphas_cumprod().windows(2).all(|w| w[1] < w[0]));
    }

    #[test]
    fn zero_terminal_snr_ends_at_zero_and_keeps_the_start() {
        let (plain, ours, compat) = (Schedule::sdxl(), Schedule::zero_terminal_snr(false), Schedule::zero_terminal_snr(true));
        assert_eq!(ours.alphas_cumprod()[999], 0.0);
        assert_eq!(ours.snr(999).unwrap(), 0.0);
        assert!((ours.alphas_cumprod()[0] - plain.alphas_cumprod()[0]).abs() < 1e-6);
        assert_eq!(compat.alphas_cumprod(), ours.alphas_cumprod());
        assert_eq!(compat.snr(500).unwrap(), plain.snr(500).unwrap());
        assert!(ours.snr(500).unwrap() < plain.snr(500).unwrap());
        // Algorithm 1 in f64 at t = 500, from the plain table.
        let root = |t: usize| f64::from(plain.alphas_cumprod()[t]).sqrt();
        let want = ((root(500) - root(999)) * root(0) / (root(0) - root(999))).powi(2);
        // 500 f32 factors between 0.98 and 1, each within half an ulp: 500 * 6e-8.
        assert!((f64::from(ours.alphas_cumprod()[500]) - want).abs() / want < 3e-5);
    }

    #[test]
    fn velocity_and_noisy_latents_rotate_signal_and_noise() {
        let s = Schedule::sdxl();
        let x = Tensor::from_vec(vec![1f32, 0.0, 1.0, 0.0], (2, 1, 1, 2), &Device::Cpu).unwrap();
        let e = Tensor::from_vec(vec![0f32, 1.0, 0.0, 1.0], (2, 1, 1, 2), &Device::Cpu).unwrap();
        let t = [3, 700];
        let noisy = s.add_noise(&x, &e, &t).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let v = s.target(Prediction::V, &x, &e, &t).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (i, &t) in t.iter().enumerate() {
            let a = s.alpha_cumprod(t).unwrap();
            assert_eq!(&noisy[2 * i..2 * i + 2], &[a.sqrt(), (1.0 - a).sqrt()]);
            assert_eq!(&v[2 * i..2 * i + 2], &[-(1.0 - a).sqrt(), a.sqrt()]);
        }
        assert!(matches!(s.add_noise(&x, &e, &[1]), Err(Error::BatchSize { got: 1, batch: 2, .. })));
        assert!(matches!(s.add_noise(&x, &e, &[1, 1000]), Err(Error::Timestep { timestep: 1000 })));
    }
}
