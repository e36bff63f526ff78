//! A whole step of a recipe's model on two devices, and what it takes on the GPU.

use std::time::Instant;

use candle_core::{Device, Tensor};
use diffusion::{BatchNoise, SampleKey};
use random::{Purpose, Stream};

use super::Report;
use crate::base;
use crate::config::{Compat, ConfigError, MixedPrecision, RunConfig};
use crate::data::chunks;
use crate::error::Result;
use crate::precision;
use crate::setup;
use crate::step::{self, MicroBatch, Objective, Trained};

/// Steps that are timed, after one that is not.
const TIMED: u64 = 5;
/// Of f16: far from both ends of its range for the gradients of these batches.
const LOSS_SCALE: f64 = 1024.0;

/// One step's loss and gradient norm on both devices, with latents of noise, on the CPU in f32; then times and memory on the GPU.
pub(super) fn compare(device: &Device, config: &RunConfig, report: &mut Report) -> Result<()> {
    config.check().map_err(ConfigError::Problems)?;
    let side = config.dataset.resolution.0 as usize;
    let (base, batch) = (config.model.base.display(), config.train.batch_size);
    report.line(&format!("A step of {base}: batch {batch}, {side}x{side}, {}", precision::describe(config)));
    let mut exact = config.clone();
    (exact.train.mixed_precision, exact.train.fp8_base, exact.train.fp8_base_unet) = (MixedPrecision::No, false, false);
    let small = run(&Device::Cpu, &exact, 32.min(side / 8), 1, 0)?;
    let same = run(device, config, 32.min(side / 8), 1, 0)?;
    let relative = |a: f64, b: f64| ((a - b) / b).abs();
    // Sums over the whole network in another order; with half precision on the GPU, its rounding.
    report.compare("loss of a batch of one", relative(same.loss, small.loss), 1e-2);
    report.compare("norm of its gradient", relative(same.norm, small.norm), 5e-2);
    let full = run(device, config, side / 8, batch, TIMED)?;
    let seconds = full.seconds.map(|s| s / TIMED as f64);
    for (phase, seconds) in ["forward and backward", "gradient norm", "update"].iter().zip(seconds) {
        report.line(&format!("{phase:<44} {:>9.3} s", seconds));
    }
    let images = batch as f64 / seconds[0];
    report.line(&format!("{:<44} {images:>9.3} images/s", "forward and backward alone"));
    if let Some((used, reserved)) = full.memory {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let line = format!("{:>9.2} GiB, {:.2} GiB with what the driver keeps", gib(used), gib(reserved));
        report.line(&format!("{:<44} {line}", "most memory that tensors held"));
        let planned = crate::plan::gpu_step_bytes(config, (side as u32, side as u32, batch))?;
        report.line(&format!("{:<44} {:>9.2} GiB", "what `lokr plan` says of that", gib(planned)));
    }
    Ok(())
}

struct Outcome {
    loss: f64,
    norm: f64,
    /// Of forward and backward, norm, update.
    seconds: [f64; 3],
    /// Most bytes held by tensors, and by the driver for them.
    memory: Option<(u64, u64)>,
}

fn run(device: &Device, config: &RunConfig, side: usize, n: usize, timed: u64) -> Result<Outcome> {
    let checkpoint = base::open_checkpoint(&config.model, config.train.compat == Some(Compat::SdScripts))?.with_device(device.clone());
    let model = base::load_for_training(config, &checkpoint)?;
    model.vae.release();
    let network = base::create_network(config, &model)?;
    let trained: Vec<Trained> = network.parameters().into_iter().map(|(group, parameter)| Trained { group, parameter }).collect();
    let sizes: Vec<usize> = trained.iter().map(|t| t.parameter.tensor().elem_count()).collect();
    let mut optimizer = setup::optimizer(config, &sizes, device)?;
    let objective = Objective::new(config, &trained);
    let scale = if config.train.mixed_precision == MixedPrecision::Fp16 { LOSS_SCALE } else { 1.0 };
    let (mut loss, mut first_norm, mut seconds) = (0.0, 0.0, [0.0; 3]);
    _ = peak(device);
    for s in 0..=timed {
        let batch = batch(config, s, (n, model.unet.config.in_channels, side, side), device)?;
        let mut lap = Lap::new(device);
        let per_sample = step::micro_step(&model, &objective, &batch, scale, &mut |_| Ok(()))?;
        let compute = lap.seconds()?;
        let norm = step::gradient_norm(&trained, &optimizer)?.0 / scale;
        let norm_seconds = lap.seconds()?;
        step::update(&trained, &mut optimizer, (norm, scale), config.train.max_grad_norm, |group| base::learning_rate(config, group))?;
        if s == 0 {
            (loss, first_norm) = (per_sample.iter().sum::<f64>() / n as f64, norm);
        } else {
            for (sum, more) in seconds.iter_mut().zip([compute, norm_seconds, lap.seconds()?]) {
                *sum += more;
            }
        }
    }
    Ok(Outcome { loss, norm: first_norm, seconds, memory: peak(device) })
}

/// Latents of noise, and a caption of the start and end tokens alone.
fn batch(config: &RunConfig, s: u64, shape: (usize, usize, usize, usize), device: &Device) -> Result<MicroBatch> {
    let (n, c, h, w) = shape;
    let latents = Tensor::from_vec(Stream::new(1, Purpose::Noise, s, 0).normal(n * c * h * w), shape, &Device::Cpu)?;
    let keys: Vec<SampleKey> = (0..n as u64).map(|position| SampleKey { epoch: s, position }).collect();
    let BatchNoise { target, input, timesteps } = config.noise().draw_batch(&keys, &latents)?;
    let noise = BatchNoise { target: target.to_device(device)?, input: input.to_device(device)?, timesteps };
    let rows = chunks(config.train.max_token_length);
    let row: Vec<u32> = std::iter::once(49_406).chain(std::iter::repeat_n(49_407, 76)).collect();
    let ids = vec![row; n * rows];
    let size = [8 * h, 8 * w, 0, 0, 8 * h, 8 * w].map(|v| v as f32);
    let time_ids = Tensor::from_vec(size.repeat(n), (n, 6), device)?;
    Ok(MicroBatch { latents: latents.to_device(device)?, noise, ids: [ids.clone(), ids], chunks: rows, time_ids })
}

/// Seconds since the last look, all work of the device included.
struct Lap(Device, Instant);

impl Lap {
    fn new(device: &Device) -> Self {
        Self(device.clone(), Instant::now())
    }

    fn seconds(&mut self) -> Result<f64> {
        self.0.synchronize()?;
        let seconds = self.1.elapsed().as_secs_f64();
        self.1 = Instant::now();
        Ok(seconds)
    }
}

/// Most bytes that tensors of a GPU have held since the last look, and that its driver holds for them.
fn peak(device: &Device) -> Option<(u64, u64)> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return ops::gpu_memory_peak(device).ok();
    }
    let _ = device;
    None
}
