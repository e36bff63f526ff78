//! Comparison with recorded runs of torch and diffusers: `tests/golden/README.md` says how they were made.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use diffusion::{LossConfig, Prediction, Sampler, SamplingPlan, Schedule, Spacing, add_offset, sample};
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    let folder =
        std::env::var_os("LOKR_GOLDEN").map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden").into(), PathBuf::from);
    folder.join(name)
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(golden(name), &Device::Cpu).unwrap()
}

#[allow(clippy::disallowed_methods)]
fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

fn numbers(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn timesteps(t: &Tensor) -> Vec<u32> {
    t.to_vec1::<i64>().unwrap().into_iter().map(|t| t as u32).collect()
}

/// The first two micro-batches, from the recorded inputs and predictions: noisy latents, weights, losses, all of them.
#[test]
fn recorded_micro_batches_are_reproduced() {
    let (data, facts) = (tensors("train_step.safetensors"), json("train_step.json"));
    let strength = facts["hyper"]["noise_offset"].as_f64().unwrap();
    let config = LossConfig { min_snr_gamma: facts["hyper"]["gamma"].as_f64(), ..Default::default() };
    let schedule = Schedule::sdxl();
    for micro in 0..2 {
        let input = |name: &str| &data[&format!("in.{micro:02}.{name}")];
        let tap = |name: &str| &data[&format!("tap.{micro:02}.{name}")];
        let t = timesteps(input("timesteps"));
        let noise = add_offset(input("noise"), input("offset_noise"), strength).unwrap();
        let noisy = schedule.add_noise(input("latents"), &noise, &t).unwrap();
        let (got, want) = (values(&noisy), values(tap("noisy")));
        // torch's vector square root may be one ulp (1.2e-7) off the nearest value, ours is the nearest: √ᾱ and √(1-ᾱ), times
        // values up to 4, plus the rounding of the sum.
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() < 1e-6, "micro-batch {micro}: {got} {want}");
        }

        let target = schedule.target(Prediction::Epsilon, input("latents"), &noise, &t).unwrap();
        let got = config.loss(&schedule, tap("pred"), &target, &t, None, None).unwrap();
        for b in 0..t.len() {
            let (mse, weight) = (f64::from(values(tap("per_sample_mse"))[b]), f64::from(values(tap("snr_weight"))[b]));
            // torch sums 1024 f32 elements by halves: 10 roundings of 6e-8.
            assert!((got.unweighted[b] - mse).abs() < 6e-7 * mse, "{} {mse}", got.unweighted[b]);
            // One f32 division and one minimum there, f64 here.
            assert!((got.weights[b] - weight).abs() < 1e-7 * weight, "{} {weight}", got.weights[b]);
        }
        let recorded = facts["runs"]["lion"][0]["losses"][micro].as_f64().unwrap();
        assert!((got.loss - recorded).abs() < 1e-6 * recorded, "{} {recorded}", got.loss);
    }
}

const RECORDED: [(&str, Sampler, Spacing); 4] = [
    ("euler", Sampler::Euler, Spacing::Leading),
    ("euler_ancestral", Sampler::EulerAncestral, Spacing::Leading),
    ("dpmpp_2m", Sampler::DpmPp2m, Spacing::Leading),
    ("dpmpp_2m_karras", Sampler::DpmPp2m, Spacing::LeadingKarras),
];

#[test]
fn levels_are_those_of_diffusers() {
    let facts = json("sample.json");
    let steps = facts["steps"].as_u64().unwrap() as usize;
    for (name, sampler, spacing) in RECORDED {
        let want = &facts["samplers"][name];
        let plan = SamplingPlan::new(&Schedule::sdxl(), sampler, spacing, steps).unwrap();
        assert_eq!(plan.timesteps, numbers(&want["timesteps"]), "{name}");
        let sigmas = numbers(&want["sigmas"]);
        assert_eq!(plan.sigmas.len(), sigmas.len());
        for (got, want) in plan.sigmas.iter().zip(&sigmas) {
            // f32 numbers that were recorded with torch's vector square root: one ulp, 1.2e-7.
            assert!((got - want).abs() <= 1.2e-7 * want, "{name}: {got} {want}");
        }
        // The multistep solver of diffusers keeps x/√(σ²+1), whose start is plain noise: its recorded factor is 1.
        let start = want["init_noise_sigma"].as_f64().unwrap();
        let start = if sampler == Sampler::DpmPp2m { start * (sigmas[0] * sigmas[0] + 1.0).sqrt() } else { start };
        assert!((plan.start_scale - start).abs() < 1.5e-7 * start, "{name}: {} {start}", plan.start_scale);
    }
}

/// Replays each recorded run with the answers that its first steps imply, and asks for the recorded states.
///
/// The network is not here, so step i's answer is solved from the recorded state after it by the rule as diffusers states
/// it for its own form of the state; that the two forms and rules agree is what is tested. A wrong order, noise scale, level
/// or second-order term leaves a difference that no answer of the single step could hide, since all later steps build on it.
#[test]
fn recorded_states_follow_from_the_answers_they_imply() {
    let (data, facts) = (tensors("sample.safetensors"), json("sample.json"));
    for (name, sampler, spacing) in RECORDED {
        let sigmas = numbers(&facts["samplers"][name]["sigmas"]);
        let plan = SamplingPlan::new(&Schedule::sdxl(), sampler, spacing, sigmas.len() - 1).unwrap();
        let wide = |t: &Tensor| -> Vec<f64> { values(t).into_iter().map(f64::from).collect() };
        let noise = wide(&data["initial_noise"]);
        let start = if sampler == Sampler::DpmPp2m { 1.0 } else { facts["samplers"][name]["init_noise_sigma"].as_f64().unwrap() };
        let mut states = vec![noise.iter().map(|x| x * start).collect::<Vec<f64>>()];
        states.extend((0..plan.steps()).map(|i| wide(&data[&format!("{name}.latent.{i:02}")])));
        let answers = match sampler {
            Sampler::DpmPp2m => multistep_answers(&states, &sigmas),
            _ => {
                euler_answers(&states, &sigmas, |i| (sampler == Sampler::EulerAncestral).then(|| wide(&data["step_noise"].get(i).unwrap())))
            }
        };
        let shape = data["initial_noise"].dims().to_vec();
        let tensor = |v: &[f64]| Tensor::from_vec(v.iter().map(|&x| x as f32).collect::<Vec<_>>(), shape.clone(), &Device::Cpu);
        let mut step = 0;
        let denoise = |_: &Tensor, t: f64| {
            assert_eq!(t, plan.timesteps[step]);
            step += 1;
            tensor(&answers[step - 1])
        };
        let observe = |i: usize, x: &Tensor| {
            let form = if sampler == Sampler::DpmPp2m { (sigmas[i + 1] * sigmas[i + 1] + 1.0).sqrt() } else { 1.0 };
            let largest = states[i + 1].iter().fold(0f64, |m, x| m.max(x.abs()));
            for (got, want) in wide(x).iter().zip(&states[i + 1]) {
                // States up to 30 in f32, eight steps of a few roundings each.
                assert!((got / form - want).abs() < 1e-5 * largest, "{name} step {i}: {} {want}", got / form);
            }
        };
        let step_noise = |i: usize| data["step_noise"].get(i);
        sample(&plan, sampler, Prediction::Epsilon, &data["initial_noise"], denoise, step_noise, observe).unwrap();
    }
}

/// ε of each step from x' = x + ε (σ_down - σ) + σ_up noise.
fn euler_answers(states: &[Vec<f64>], sigmas: &[f64], noise: impl Fn(usize) -> Option<Vec<f64>>) -> Vec<Vec<f64>> {
    (0..sigmas.len() - 1)
        .map(|i| {
            let (s, n) = (sigmas[i], sigmas[i + 1]);
            let noise = noise(i);
            let up = if noise.is_some() { (n * n * (s * s - n * n)).sqrt() / s } else { 0.0 };
            let down = (n * n - up * up).max(0.0).sqrt();
            let noise = noise.unwrap_or_else(|| vec![0.0; states[0].len()]);
            (0..states[0].len()).map(|k| (states[i + 1][k] - up * noise[k] - states[i][k]) / (down - s)).collect()
        })
        .collect()
}

/// ε of each step from the variance-preserving rule x' = (s'/s) x - α' (e^-h - 1) D with α = 1/√(σ²+1), s = σ α.
fn multistep_answers(states: &[Vec<f64>], sigmas: &[f64]) -> Vec<Vec<f64>> {
    let alpha = |s: f64| 1.0 / (s * s + 1.0).sqrt();
    let mut before: Option<(Vec<f64>, f64)> = None;
    (0..sigmas.len() - 1)
        .map(|i| {
            let (s, n) = (sigmas[i], sigmas[i + 1]);
            let h = if n > 0.0 { (s / n).ln() } else { f64::INFINITY };
            let x0: Vec<f64> = (0..states[0].len())
                .map(|k| {
                    let ratio = n * alpha(n) / (s * alpha(s));
                    let d = (ratio * states[i][k] - states[i + 1][k]) / (alpha(n) * ((-h).exp() - 1.0));
                    match (&before, n > 0.0) {
                        (Some((previous, h0)), true) => (d + 0.5 * h / h0 * previous[k]) / (1.0 + 0.5 * h / h0),
                        _ => d,
                    }
                })
                .collect();
            let answer = (0..x0.len()).map(|k| (states[i][k] - alpha(s) * x0[k]) / (s * alpha(s))).collect();
            before = Some((x0, h));
            answer
        })
        .collect()
}
