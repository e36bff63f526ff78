//! Forward and backward of one micro-batch, and the update that ends an optimizer step.

use candle_core::{DType, Device, Tensor};
use diffusion::{BatchNoise, LossConfig, PendingLoss, Prediction, Schedule};
use lokr::ParameterGroup;
use ops::{F32, OnGradient, Parameter, Value};
use optim::{Optimizer, clip};
use sdxl::conditioning::added_condition;
use sdxl::{GradientCheckpointing, Sdxl};

use crate::config::{Compute, RunConfig};
use crate::error::Result;

/// What one forward pass takes.
pub struct MicroBatch {
    /// `(n, 4, h, w)`, scaled by 0.13025.
    pub latents: Tensor,
    /// Noise and timesteps, one per sample.
    pub noise: BatchNoise,
    /// Token ids of both encoders: `chunks` rows of 77 per sample.
    pub ids: [Vec<Vec<u32>>; 2],
    /// Rows per sample.
    pub chunks: usize,
    /// `(n, 6)`: original height and width, crop top and left, target height and width.
    pub time_ids: Tensor,
}

impl MicroBatch {
    /// Samples in it.
    pub fn len(&self) -> usize {
        self.noise.timesteps.len()
    }

    /// Whether it holds no sample; the plan makes no such batch.
    pub fn is_empty(&self) -> bool {
        self.noise.timesteps.is_empty()
    }
}

/// What is asked of the network.
pub struct Objective {
    /// Noise schedule.
    pub schedule: Schedule,
    /// Element loss and weights by timestep.
    pub loss: LossConfig,
    /// Noise or velocity.
    pub prediction: Prediction,
    /// Which activations are computed again in the backward pass.
    pub gradient_checkpointing: GradientCheckpointing,
    /// Whether products are those of bf16 (`train.compute`).
    pub bf16: bool,
    /// Whether the text encoders are trained; if not, they run without recording.
    pub train_text_encoder: bool,
}

impl Objective {
    /// What a recipe asks; the text encoders are recorded if anything of them is trained.
    pub fn new(config: &RunConfig, trained: &[Trained]) -> Self {
        Self {
            schedule: config.noise_schedule(),
            loss: config.loss(),
            prediction: config.prediction(),
            gradient_checkpointing: config.train.gradient_checkpointing,
            bf16: config.train.compute == Compute::Bf16,
            train_text_encoder: trained.iter().any(|t| t.group.is_text_encoder()),
        }
    }
}

/// What one forward pass gave.
pub struct Forward {
    /// The prediction, `(n, 4, h, w)`, on the tape.
    pub prediction: Value,
    /// The loss of each sample.
    pub loss: PendingLoss,
    /// d loss / d prediction.
    pub gradient: Tensor,
}

/// The forward pass: text encoders, UNet, loss.
///
/// # Errors
/// If shapes do not fit.
pub fn forward(model: &Sdxl, objective: &Objective, batch: &MicroBatch) -> Result<Forward> {
    ops::with_bf16(objective.bf16, || forward_in(model, objective, batch))
}

fn forward_in(model: &Sdxl, objective: &Objective, batch: &MicroBatch) -> Result<Forward> {
    let checkpointing = objective.gradient_checkpointing;
    let encode = || model.encode_text(&batch.ids[0], &batch.ids[1], batch.chunks, None, checkpointing);
    let text = if objective.train_text_encoder { encode()? } else { ops::no_grad(encode)? };
    let timesteps = &batch.noise.timesteps;
    let noisy = objective.schedule.add_noise(&batch.latents, &batch.noise.input, timesteps)?;
    let target = objective.schedule.target(objective.prediction, &batch.latents, &batch.noise.target, timesteps)?;
    let vector = added_condition(&text.pooled, &batch.time_ids)?;
    let t = Tensor::from_vec(timesteps.iter().map(|&t| t as f32).collect::<Vec<_>>(), timesteps.len(), noisy.device())?;
    let prediction = model.unet.forward(&Value::constant(noisy), &t, &text.context, &vector, checkpointing)?;
    let (loss, gradient) = objective.loss.pending_loss(&objective.schedule, prediction.tensor(), &target, timesteps, None, None)?;
    Ok(Forward { prediction, loss, gradient })
}

/// Forward and backward of one micro-batch; `share` of its gradient is added to the parameters' gradients. `share` is
/// its part of the step's samples, so that a short last batch counts by its samples, times the loss scale. `on_gradient` is told of each gradient
/// that was added. Gives the loss, which [`read_losses`] looks at when the step's micro-batches are all under way: until then nothing
/// waits for a GPU. A loss that is no number makes gradients that are none; the caller sees it and withholds the step.
///
/// # Errors
/// If shapes do not fit.
pub fn begin_micro_step(
    model: &Sdxl,
    objective: &Objective,
    batch: &MicroBatch,
    share: f64,
    on_gradient: &mut OnGradient,
) -> Result<PendingLoss> {
    let mut work = || {
        let Forward { prediction, loss, gradient } = forward(model, objective, batch)?;
        let root = vec![(prediction, (gradient * share)?)];
        ops::with_bf16(objective.bf16, || ops::backward_with(root, on_gradient))?;
        Ok(loss)
    };
    if batch.latents.device().is_cpu() { ops::awake(work) } else { work() }
}

/// [`begin_micro_step`] for one micro-batch by itself. Gives the loss of each sample.
///
/// # Errors
/// If shapes do not fit.
pub fn micro_step(model: &Sdxl, objective: &Objective, batch: &MicroBatch, share: f64, on_gradient: &mut OnGradient) -> Result<Vec<f64>> {
    let loss = begin_micro_step(model, objective, batch, share, on_gradient)?;
    Ok(loss.weighted(&loss.read()?))
}

/// Losses of the samples of several micro-batches, in one copy to the host.
///
/// # Errors
/// If the device fails.
pub fn read_losses(losses: &[PendingLoss]) -> Result<Vec<Vec<f64>>> {
    if losses.is_empty() {
        return Ok(Vec::new());
    }
    let all: Vec<f64> = Tensor::cat(&losses.iter().map(|l| &l.unweighted).collect::<Vec<_>>(), 0)?.to_vec1()?;
    let mut rest = all.as_slice();
    let split = losses.iter().map(|loss| {
        let (own, after) = rest.split_at(loss.weights.len().min(rest.len()));
        rest = after;
        loss.weighted(own)
    });
    Ok(split.collect())
}

/// Names the first value of a forward pass that is no number: latents, text, a block of the UNet, or the loss.
///
/// # Errors
/// If shapes do not fit.
pub fn locate_non_finite(model: &Sdxl, objective: &Objective, batch: &MicroBatch) -> Result<String> {
    ops::no_grad(|| {
        let sum = |t: &Tensor| t.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>();
        let finite = |t: &Tensor| sum(t).is_ok_and(f32::is_finite);
        if !finite(&batch.latents) {
            return Ok("a latent".into());
        }
        let text = model.encode_text(&batch.ids[0], &batch.ids[1], batch.chunks, None, GradientCheckpointing::None)?;
        if !finite(text.context.tensor()) || !finite(text.pooled.tensor()) {
            return Ok("the output of a text encoder".into());
        }
        let timesteps = &batch.noise.timesteps;
        let noisy = objective.schedule.add_noise(&batch.latents, &batch.noise.input, timesteps)?;
        let vector = added_condition(&text.pooled, &batch.time_ids)?;
        let t = Tensor::from_vec(timesteps.iter().map(|&t| t as f32).collect::<Vec<_>>(), timesteps.len(), noisy.device())?;
        let mut first = None;
        let mut tap = |name: &str, value: &Value| {
            if first.is_none() && !finite(value.tensor()) {
                first = Some(format!("the output of the UNet's {name}"));
            }
        };
        let out = model.unet.forward_with(&Value::constant(noisy), &t, &text.context, &vector, GradientCheckpointing::None, &mut tap)?;
        Ok(first.unwrap_or_else(|| if finite(out.tensor()) { "the loss".into() } else { "the output of the UNet's out".into() }))
    })
}

/// A trained tensor with the part it belongs to.
pub struct Trained {
    /// Part of the model.
    pub group: ParameterGroup,
    /// The tensor.
    pub parameter: Parameter,
}

/// L2 norm of all gradients together, before clipping; with the first tensor whose gradient is not finite, if any.
///
/// # Errors
/// If a gradient is not f32.
pub fn gradient_norm(trained: &[Trained], optimizer: &Optimizer) -> Result<(f64, Option<String>)> {
    let grads: Vec<(usize, Tensor)> = trained.iter().enumerate().filter_map(|(i, t)| Some((i, t.parameter.grad()?))).collect();
    if grads.iter().any(|(_, g)| !g.device().is_cpu()) {
        let (norm, bad) = gradient_norm_on_device(&grads, optimizer)?;
        return Ok((norm, bad.map(|i| trained[grads[i].0].parameter.name().to_string())));
    }
    let views = grads.iter().map(|(_, g)| F32::new(g)).collect::<candle_core::Result<Vec<_>>>()?;
    let slices: Vec<&[f32]> = views.iter().map(|v| &**v).collect();
    let norm = clip::global_norm(&slices);
    let bad = if norm.is_finite() {
        None
    } else {
        let first = slices.iter().position(|s| s.iter().any(|v| !v.is_finite()));
        first.map(|i| trained[grads[i].0].parameter.name().to_string())
    };
    Ok((norm, bad))
}

/// As [`gradient_norm`], where the gradients are on a GPU: by the optimizer's kernels if it has some, else by candle's operations,
/// with one number for each gradient and one copy to the host. The second number is a place in `grads`.
fn gradient_norm_on_device(grads: &[(usize, Tensor)], optimizer: &Optimizer) -> Result<(f64, Option<usize>)> {
    #[cfg(feature = "cuda")]
    if let Some(kernels) = optimizer.kernels() {
        return crate::on_gpu::gradient_norm(kernels, grads);
    }
    let _ = optimizer;
    let squares = |g: &Tensor| g.flatten_all()?.to_dtype(DType::F64)?.sqr()?.sum(0);
    let sums = grads.iter().map(|(_, g)| squares(g)).collect::<candle_core::Result<Vec<_>>>()?;
    let sums: Vec<f64> = Tensor::stack(&sums, 0)?.to_vec1()?;
    Ok((sums.iter().sum::<f64>().sqrt(), sums.iter().position(|s| !s.is_finite())))
}

/// Divides the gradients by the loss scale, clips them by their global `norm` (of the divided ones), steps every parameter that has a
/// gradient at its group's rate, and forgets the gradients. A
/// parameter without gradient gets no update and no decay.
///
/// # Errors
/// If a tensor is not f32.
pub fn update(
    trained: &[Trained],
    optimizer: &mut Optimizer,
    (norm, loss_scale): (f64, f64),
    max_grad_norm: f64,
    lr: impl Fn(ParameterGroup) -> f64,
) -> Result<()> {
    let factor = f64::from(clip::clip_factor(norm, max_grad_norm)) / loss_scale;
    for (index, t) in trained.iter().enumerate() {
        let Some(grad) = t.parameter.take_grad() else { continue };
        #[cfg(feature = "cuda")]
        if optimizer.kernels().is_some() {
            crate::on_gpu::step(optimizer, index, &t.parameter.tensor(), &grad, factor as f32, lr(t.group) as f32)?;
            continue;
        }
        let grad = if factor == 1.0 { grad } else { (grad * factor)? };
        let value = t.parameter.tensor();
        let (host, grad) = (value.to_device(&Device::Cpu)?, grad.to_device(&Device::Cpu)?);
        let mut data = F32::new(&host)?.to_vec();
        optimizer.step(index, &mut data, &F32::new(&grad)?, lr(t.group) as f32);
        t.parameter.set(Tensor::from_vec(data, value.shape(), value.device())?)?;
    }
    Ok(())
}
