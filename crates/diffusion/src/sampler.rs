//! From noise to latents: the samplers that previews use.
//!
//! The state is x = x0 + σ ε (variance exploding). The network sees x/√(σ²+1) and answers ε or v, already guided; a
//! sampler turns the answer into its estimate of x0 and steps to the next level. All of it in f32 with f64 scalars.
//! Sources: k-diffusion `k_diffusion/sampling.py` (`sample_euler`, `sample_euler_ancestral`, `sample_dpmpp_2m`), after
//! Karras et al. 2022 and Lu et al. 2022 (DPM-Solver++). x0 is never clipped: these are latents, which have no bounds.
//!
//! # Determinism
//! Nothing is drawn here. Start noise and the ancestral sampler's noise come from the caller.

use candle_core::{DType, Result as TensorResult, Tensor};

use crate::choice::choice;
use crate::{Prediction, Result, SamplingPlan};

choice! {
    /// A sampling rule.
    Sampler {
        /// Euler's method on the probability flow.
        Euler = "euler",
        /// Euler with fresh noise at each step (η = 1).
        EulerAncestral = "euler_ancestral",
        /// DPM-Solver++(2M): the second-order multistep rule.
        DpmPp2m = "dpmpp_2m",
        /// DDIM with η = 0 (Song et al. 2021). In the variance-exploding form this is Euler's step; only the size of the
        /// first x differs.
        Ddim = "ddim",
    }
}

/// Classifier-free guidance ε_u + s (ε_c - ε_u) (Ho and Salimans 2022).
pub fn guide(uncond: &Tensor, cond: &Tensor, scale: f64) -> TensorResult<Tensor> {
    uncond + ((cond - uncond)? * scale)?
}

/// Runs `sampler` over `plan`.
///
/// - `noise`: [B, C, H, W], standard normal; it is scaled by the plan here.
/// - `denoise(x_in, t)`: the network's guided answer, shaped as its input.
/// - `step_noise(i)`: standard normal noise for step i, asked for only by the ancestral sampler and not at its last step.
/// - `observe(i, x)`: called with the state after step i.
///
/// Returns the latents, still scaled by the VAE's factor.
pub fn sample(
    plan: &SamplingPlan,
    sampler: Sampler,
    prediction: Prediction,
    noise: &Tensor,
    mut denoise: impl FnMut(&Tensor, f64) -> TensorResult<Tensor>,
    mut step_noise: impl FnMut(usize) -> TensorResult<Tensor>,
    mut observe: impl FnMut(usize, &Tensor),
) -> Result<Tensor> {
    let mut x = (noise.to_dtype(DType::F32)? * plan.start_scale)?;
    let mut previous: Option<Tensor> = None;
    for (i, &t) in plan.timesteps.iter().enumerate() {
        let (sigma, next) = (plan.sigmas[i], plan.sigmas[i + 1]);
        let answer = denoise(&(&x / (sigma * sigma + 1.0).sqrt())?, t)?.to_dtype(DType::F32)?;
        let x0 = estimate(prediction, &x, &answer, sigma)?;
        x = match sampler {
            Sampler::Euler | Sampler::Ddim => euler(&x, &x0, sigma, next)?,
            Sampler::EulerAncestral => {
                let (down, up) = ancestral_split(sigma, next);
                let stepped = euler(&x, &x0, sigma, down)?;
                if next > 0.0 { (stepped + (step_noise(i)?.to_dtype(DType::F32)? * up)?)? } else { stepped }
            }
            Sampler::DpmPp2m => {
                let before = (i > 0).then(|| plan.sigmas[i - 1]);
                let stepped = dpmpp_2m(&x, &x0, previous.as_ref().zip(before), sigma, next)?;
                previous = Some(x0);
                stepped
            }
        };
        observe(i, &x);
    }
    Ok(x)
}

/// The estimate of x0: x - σ ε, or x/(σ²+1) - v σ/√(σ²+1).
fn estimate(prediction: Prediction, x: &Tensor, answer: &Tensor, sigma: f64) -> TensorResult<Tensor> {
    match prediction {
        Prediction::Epsilon => x - (answer * sigma)?,
        Prediction::V => {
            let variance = sigma * sigma + 1.0;
            (x / variance)? - (answer * (sigma / variance.sqrt()))?
        }
    }
}

/// x + d (σ' - σ) with d = (x - x0)/σ.
fn euler(x: &Tensor, x0: &Tensor, sigma: f64, next: f64) -> TensorResult<Tensor> {
    let d = ((x - x0)? / sigma)?;
    x + (d * (next - sigma))?
}

/// Where an ancestral step goes down to, and how much noise brings it back up to `next`.
fn ancestral_split(sigma: f64, next: f64) -> (f64, f64) {
    let up = next.min((next * next * (sigma * sigma - next * next) / (sigma * sigma)).sqrt());
    ((next * next - up * up).sqrt(), up)
}

/// One step of DPM-Solver++(2M); `previous` is the last step's x0 with the σ it was estimated at.
fn dpmpp_2m(x: &Tensor, x0: &Tensor, previous: Option<(&Tensor, f64)>, sigma: f64, next: f64) -> TensorResult<Tensor> {
    if next == 0.0 {
        return Ok(x0.clone());
    }
    // λ = -ln σ, h = λ' - λ.
    let h = sigma.ln() - next.ln();
    let d = match previous {
        None => x0.clone(),
        Some((previous, before)) => {
            let r = (before.ln() - sigma.ln()) / h;
            ((x0 * (1.0 + 0.5 / r))? - (previous * (0.5 / r))?)?
        }
    };
    (x * (next / sigma))? - (d * (-h).exp_m1())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn scalar(x: f64) -> Tensor {
        Tensor::full(x as f32, (1, 1, 1, 1), &Device::Cpu).unwrap()
    }

    fn value(x: &Tensor) -> f64 {
        f64::from(x.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0])
    }

    fn plan() -> SamplingPlan {
        SamplingPlan { timesteps: vec![900.0, 500.0, 100.0], sigmas: vec![4.0, 2.0, 1.0, 0.0], start_scale: 4.0 }
    }

    /// States after each step for the denoiser ε = 0.5 x_in + t/1000, from noise 1 and step noise 1, 2.
    fn states(sampler: Sampler, prediction: Prediction) -> Vec<f64> {
        let mut seen = Vec::new();
        let denoise = |x: &Tensor, t: f64| (x * 0.5)? + t / 1000.0;
        let noise = |i: usize| Ok(scalar(i as f64 + 1.0));
        let last = sample(&plan(), sampler, prediction, &scalar(1.0), denoise, noise, |_, x| seen.push(value(x))).unwrap();
        assert_eq!(seen.last().copied(), Some(value(&last)));
        seen
    }

    fn assert_near(got: &[f64], want: &[f64]) {
        // f32 states of size 1..6 after three steps of a handful of roundings each: a few times 6e-8 * 6.
        assert!(got.len() == want.len() && got.iter().zip(want).all(|(g, w)| (g - w).abs() < 3e-6), "{got:?}, not {want:?}");
    }

    // Worked out apart from the code, in f64 with the formulas of the papers. The first Euler step by hand: x = 4, ε =
    // 0.5 * 4/√17 + 0.9 = 1.385071, x' = 4 + 1.385071 (2 - 4) = 1.229857. The first ancestral step: σ_up = √(4 * 12/16) =
    // √3, σ_down = 1, x' = 4 + 1.385071 (1 - 4) + √3 = 1.576837. DPM++ 2M starts as Euler does.
    #[test]
    fn three_steps_of_each_sampler_are_the_hand_computed_ones() {
        let cases = [
            (Sampler::Euler, Prediction::Epsilon, [1.2298574998546679, 0.45485300262337036, 0.19403818132434653]),
            (Sampler::Euler, Prediction::V, [1.4457888161110715, 0.4992876103055568, 0.054111224457734475]),
            (Sampler::Ddim, Prediction::Epsilon, [1.2298574998546679, 0.45485300262337036, 0.19403818132434653]),
            (Sampler::EulerAncestral, Prediction::Epsilon, [1.5768370573508794, 2.0300006374681616, 1.212287029184786]),
            (Sampler::EulerAncestral, Prediction::V, [1.9007340317354844, 1.8718241188777798, 0.39724535160079033]),
            (Sampler::DpmPp2m, Prediction::Epsilon, [1.2298574998546679, 0.7598863790440546, 0.3912259732673835]),
            (Sampler::DpmPp2m, Prediction::V, [1.4457888161110712, 0.6645898033750315, 0.09543677272510315]),
        ];
        for (sampler, prediction, want) in cases {
            assert_near(&states(sampler, prediction), &want);
        }
    }

    #[test]
    fn step_noise_is_not_asked_for_where_it_is_not_used() {
        let run = |sampler| {
            let mut asked = Vec::new();
            let noise = |i: usize| {
                asked.push(i);
                Ok(scalar(0.0))
            };
            sample(&plan(), sampler, Prediction::Epsilon, &scalar(1.0), |x, _| Ok(x.clone()), noise, |_, _| ()).unwrap();
            asked
        };
        assert!(run(Sampler::Euler).is_empty() && run(Sampler::DpmPp2m).is_empty());
        assert_eq!(run(Sampler::EulerAncestral), [0, 1]);
    }

    #[test]
    fn an_error_of_the_network_comes_through() {
        let fail = |_: &Tensor, _: f64| candle_core::bail!("out of memory");
        let got = sample(&plan(), Sampler::Euler, Prediction::Epsilon, &scalar(1.0), fail, |_| Ok(scalar(0.0)), |_, _| ());
        let error = got.unwrap_err();
        assert!(std::error::Error::source(&error).is_some_and(|e| e.to_string().contains("out of memory")), "{error:?}");
    }

    #[test]
    fn guidance_extrapolates_from_the_unconditional_answer() {
        assert_eq!(value(&guide(&scalar(1.0), &scalar(3.0), 5.0).unwrap()), 11.0);
        assert_eq!(value(&guide(&scalar(1.0), &scalar(3.0), 1.0).unwrap()), 3.0);
    }

    /// With the true noise as the answer every deterministic rule lands on the picture, whatever the levels.
    #[test]
    fn a_perfect_denoiser_gives_the_picture_back() {
        let schedule = crate::Schedule::sdxl();
        for sampler in [Sampler::Euler, Sampler::DpmPp2m, Sampler::Ddim, Sampler::EulerAncestral] {
            for spacing in crate::Spacing::NAMES {
                let plan = SamplingPlan::new(&schedule, sampler, crate::Spacing::from_name(spacing).unwrap(), 12).unwrap();
                let picture = 0.75;
                let mut step = 0;
                let denoise = |x_in: &Tensor, _t: f64| {
                    let sigma = plan.sigmas[step];
                    step += 1;
                    ((x_in * (sigma * sigma + 1.0).sqrt())? - picture)? / sigma
                };
                let got = sample(&plan, sampler, Prediction::Epsilon, &scalar(0.3), denoise, |_| Ok(scalar(-0.7)), |_, _| ()).unwrap();
                // x up to 15 in f32, divided by σ down to 0.03 and multiplied again: 15 * 6e-8 * a few.
                assert!((value(&got) - picture).abs() < 1e-5, "{sampler:?} {spacing}: {}", value(&got));
            }
        }
    }
}
