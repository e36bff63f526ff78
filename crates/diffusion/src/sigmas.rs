//! Which noise levels a sampler visits, and the timestep that the network is told at each.
//!
//! Two families exist and give different pictures: k-diffusion's (A1111, ComfyUI, Forge), whose levels lie on a line of
//! ln σ or on Karras' curve, and diffusers', whose levels are integer timesteps. The default is the first, because that
//! is where people look at SDXL's pictures; the second is what recorded runs of diffusers are compared with.
//! Sources: k-diffusion `k_diffusion/sampling.py`, `external.py`; diffusers `schedulers/scheduling_euler_discrete.py`,
//! `scheduling_dpmsolver_multistep.py`, `scheduling_ddim.py` with SDXL's scheduler config (leading, offset 1).

use crate::choice::choice;
use crate::{Error, Result, Sampler, Schedule, TRAIN_TIMESTEPS};

choice! {
    /// How the noise levels are spaced.
    Spacing {
        /// k-diffusion: timesteps evenly from 999 to 0, σ interpolated in ln σ. A1111 calls it "uniform", ComfyUI "normal".
        Uniform = "uniform",
        /// Evenly in σ^(1/7) between the schedule's ends (Karras et al. 2022, equation 5), timestep interpolated in ln σ.
        Karras = "karras",
        /// As `uniform` with one level more, the last of which is left out.
        SgmUniform = "sgm_uniform",
        /// diffusers with "leading" spacing and offset 1: integer timesteps from the start of equal intervals.
        Leading = "leading",
        /// diffusers' Karras spacing: as `karras`, each timestep rounded to an integer.
        LeadingKarras = "leading_karras",
    }
}

/// The levels of one sampling run.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingPlan {
    /// Timestep that the network is told at each of the n steps, descending.
    pub timesteps: Vec<f64>,
    /// n + 1 noise levels σ, descending, the last one 0.
    pub sigmas: Vec<f64>,
    /// What unit noise is multiplied with to be the first x.
    pub start_scale: f64,
}

impl SamplingPlan {
    /// Levels for `steps` steps (1..=999; 998 at most for `dpmpp_2m` with `leading`).
    ///
    /// The first x is noise * σ_max for k-diffusion's spacings, and noise * √(σ² + 1) for diffusers' and for DDIM.
    pub fn new(schedule: &Schedule, sampler: Sampler, spacing: Spacing, steps: usize) -> Result<Self> {
        if steps == 0 || steps >= TRAIN_TIMESTEPS {
            return Err(Error::Steps { steps });
        }
        let table = Table::new(schedule);
        let last = (TRAIN_TIMESTEPS - 1) as f64;
        let (timesteps, mut sigmas): (Vec<f64>, Vec<f64>) = match spacing {
            Spacing::Uniform => line(last, 0.0, steps).map(|t| (t, table.sigma(t))).unzip(),
            Spacing::SgmUniform => line(last, 0.0, steps + 1).take(steps).map(|t| (t, table.sigma(t))).unzip(),
            Spacing::Karras => table.karras(steps).map(|sigma| (table.timestep(sigma), sigma)).unzip(),
            Spacing::LeadingKarras => table.karras(steps).map(|sigma| (table.timestep(sigma).round_ties_even(), sigma)).unzip(),
            Spacing::Leading => leading(sampler, steps)?.map(|t| (t as f64, table.sigmas[t])).unzip(),
        };
        sigmas.push(0.0);
        let variance_preserving = matches!(spacing, Spacing::Leading | Spacing::LeadingKarras) || sampler == Sampler::Ddim;
        let start_scale = if variance_preserving { (sigmas[0] * sigmas[0] + 1.0).sqrt() } else { sigmas[0] };
        Ok(Self { timesteps, sigmas, start_scale })
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }
}

/// n values evenly from `from` to `to`, both included; `from` alone for n = 1.
fn line(from: f64, to: f64, n: usize) -> impl Iterator<Item = f64> {
    (0..n).map(move |i| if n == 1 { from } else { from + (to - from) * i as f64 / (n - 1) as f64 })
}

/// diffusers' leading timesteps, descending, offset 1. Its multistep solver divides by one step more and leaves 0 out,
/// so that 999 steps do not fit in.
fn leading(sampler: Sampler, steps: usize) -> Result<impl Iterator<Item = usize>> {
    let (intervals, first) = if sampler == Sampler::DpmPp2m { (steps + 1, 1) } else { (steps, 0) };
    let ratio = TRAIN_TIMESTEPS / intervals;
    if (first + steps - 1) * ratio + 1 >= TRAIN_TIMESTEPS {
        return Err(Error::Steps { steps });
    }
    Ok((first..first + steps).rev().map(move |i| i * ratio + 1))
}

/// σ_t = √((1-ᾱ_t)/ᾱ_t) of all timesteps, ascending.
struct Table {
    sigmas: Vec<f64>,
}

impl Table {
    /// f32 as in the peers. An ᾱ of 0 becomes 2^-24, the least that f16 can hold, as in diffusers' Euler scheduler:
    /// the first level of a zero terminal SNR model has to be finite.
    fn new(schedule: &Schedule) -> Self {
        let sigma = |&a: &f32| {
            let a = a.max(2f32.powi(-24));
            f64::from(((1.0 - a) / a).sqrt())
        };
        Self { sigmas: schedule.alphas_cumprod().iter().map(sigma).collect() }
    }

    /// σ at a fractional timestep, interpolated in ln σ.
    fn sigma(&self, t: f64) -> f64 {
        let low = t as usize;
        let high = (low + 1).min(self.sigmas.len() - 1);
        let part = t - low as f64;
        if part == 0.0 { self.sigmas[low] } else { ((1.0 - part) * self.sigmas[low].ln() + part * self.sigmas[high].ln()).exp() }
    }

    /// The fractional timestep of σ, interpolated in ln σ; the ends of the table outside of it.
    fn timestep(&self, sigma: f64) -> f64 {
        let high = self.sigmas.partition_point(|&s| s < sigma);
        if high == 0 {
            return 0.0;
        }
        if high == self.sigmas.len() {
            return (high - 1) as f64;
        }
        let (a, b) = (self.sigmas[high - 1].ln(), self.sigmas[high].ln());
        (high - 1) as f64 + (sigma.ln() - a) / (b - a)
    }

    /// Karras et al. 2022, equation 5, ρ = 7.
    fn karras(&self, steps: usize) -> impl Iterator<Item = f64> {
        let end = |s: f64| s.powf(1.0 / 7.0);
        line(end(self.sigmas[self.sigmas.len() - 1]), end(self.sigmas[0]), steps).map(|s| s.powi(7))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(sampler: Sampler, spacing: Spacing, steps: usize) -> SamplingPlan {
        SamplingPlan::new(&Schedule::sdxl(), sampler, spacing, steps).unwrap()
    }

    #[test]
    fn uniform_is_even_in_time_and_starts_at_the_largest_sigma() {
        let p = plan(Sampler::Euler, Spacing::Uniform, 4);
        assert_eq!(p.timesteps, [999.0, 666.0, 333.0, 0.0]);
        // The ends that k-diffusion states for this schedule, to the four digits given.
        assert!((p.sigmas[0] - 14.6146).abs() < 5e-5 && (p.sigmas[3] - 0.0292).abs() < 5e-5);
        assert_eq!(p.sigmas[4], 0.0);
        assert_eq!(p.start_scale, p.sigmas[0]);
        let sgm = plan(Sampler::Euler, Spacing::SgmUniform, 3);
        assert_eq!(sgm.timesteps, [999.0, 666.0, 333.0]);
        assert_eq!(&sgm.sigmas[..3], &p.sigmas[..3]);
        // Between two timesteps: the geometric mean.
        let half = plan(Sampler::Euler, Spacing::Uniform, 3);
        assert_eq!(half.timesteps[1], 499.5);
        let table = Table::new(&Schedule::sdxl());
        assert!((half.sigmas[1] - (table.sigmas[499] * table.sigmas[500]).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn karras_runs_between_the_ends_and_timesteps_invert_sigmas() {
        let p = plan(Sampler::DpmPp2m, Spacing::Karras, 10);
        let table = Table::new(&Schedule::sdxl());
        // Seventh root and seventh power in f64.
        assert!((p.sigmas[0] / table.sigmas[999] - 1.0).abs() < 1e-13 && (p.sigmas[9] / table.sigmas[0] - 1.0).abs() < 1e-13);
        for (t, s) in p.timesteps.iter().zip(&p.sigmas).skip(1).take(8) {
            assert!((table.sigma(*t) / s - 1.0).abs() < 1e-12);
        }
        assert!(p.timesteps.windows(2).all(|w| w[1] < w[0]));
    }

    #[test]
    fn every_spacing_descends_to_zero_for_any_number_of_steps() {
        for spacing in Spacing::NAMES {
            for sampler in Sampler::NAMES {
                for steps in [1, 2, 7, 30, 333, 501, 998] {
                    let p = plan(Sampler::from_name(sampler).unwrap(), Spacing::from_name(spacing).unwrap(), steps);
                    assert_eq!((p.timesteps.len(), p.sigmas.len()), (steps, steps + 1));
                    assert!(p.sigmas.windows(2).all(|w| w[1] < w[0]) && p.sigmas[steps] == 0.0, "{sampler} {spacing} {steps}");
                }
            }
        }
        let s = Schedule::sdxl();
        for steps in [0, 1000] {
            let error = SamplingPlan::new(&s, Sampler::Euler, Spacing::Uniform, steps).unwrap_err();
            assert!(matches!(error, Error::Steps { .. }) && error.hint().is_some());
        }
        assert!(matches!(SamplingPlan::new(&s, Sampler::DpmPp2m, Spacing::Leading, 999), Err(Error::Steps { .. })));
        let zero = SamplingPlan::new(&Schedule::zero_terminal_snr(false), Sampler::Euler, Spacing::Uniform, 5).unwrap();
        // √(2^24 - 1)
        assert!((zero.sigmas[0] - 4096.0).abs() < 1e-3);
    }
}
