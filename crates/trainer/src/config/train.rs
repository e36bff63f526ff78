//! The section `[train]`: how long, how fast, on which loss.

use diffusion::{HuberSchedule, LossType};
use optim::{OptimizerKind, ScheduleKind};
use sdxl::GradientCheckpointing;
use toml::Value;

use super::key::{Setting, choice, one_of, section};

choice! {
    /// Number format of the forward and backward pass.
    MixedPrecision {
        /// f32 throughout.
        No = "no",
        /// f16 with loss scaling.
        Fp16 = "fp16",
        /// bf16.
        Bf16 = "bf16",
    }
}

choice! {
    /// Type of the factors of matrix products on the CPU, where the rest is f32.
    Compute {
        /// f32.
        Float = "float",
        /// bf16, their sums in f32.
        Bf16 = "bf16",
    }
}

choice! {
    /// Where a run computes.
    DeviceChoice {
        /// The GPU of this process where the program was built for GPUs and there is one, else the CPU.
        Auto = "auto",
        /// The CPU.
        Cpu = "cpu",
        /// The GPU of this process: number `LOCAL_RANK` of those that are visible.
        Cuda = "cuda",
    }
}

/// Makes an enum with `ALL` and `name` a [`Setting`].
macro_rules! listed_setting {
    ($($ty:ty),+) => {$(
        impl Setting for $ty {
            fn kind() -> String {
                one_of(&Self::ALL.map(Self::name))
            }
            fn read(value: &Value) -> Option<Self> {
                let name = value.as_str()?;
                Self::ALL.into_iter().find(|x| x.name() == name)
            }
            fn write(&self) -> Option<Value> {
                Some(self.name().into())
            }
        }
    )+};
}
listed_setting!(OptimizerKind, ScheduleKind);

impl Setting for GradientCheckpointing {
    fn kind() -> String {
        format!("{}, true or false", one_of(Self::NAMES))
    }
    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::Boolean(on) => Some(if *on { Self::Block } else { Self::None }),
            value => Self::from_name(value.as_str()?),
        }
    }
    fn write(&self) -> Option<Value> {
        Some(self.name().into())
    }
}

choice! {
    /// A program whose arithmetic is to be reproduced.
    Compat {
        /// kohya-ss/sd-scripts.
        SdScripts = "sd-scripts",
    }
}

choice! {
    /// What follows a step whose loss or gradient is no number.
    OnNonFinite {
        /// The step is withheld and counted, and the run goes on, up to `max_withheld_steps` in a row.
        Withhold = "withhold",
        /// The run stops at once.
        Stop = "stop",
    }
}

/// A number of optimizer steps, or a part of all steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StepCount {
    /// So many steps.
    Steps(u64),
    /// This part of the whole run, above 0 and below 1.
    Ratio(f64),
}

impl StepCount {
    /// The number of steps in a run of `total` steps.
    pub fn resolve(self, total: u64) -> u64 {
        match self {
            StepCount::Steps(steps) => steps,
            StepCount::Ratio(ratio) => (ratio * total as f64) as u64,
        }
    }
}

impl Setting for StepCount {
    fn kind() -> String {
        "whole number of steps, or a part of all steps between 0 and 1".into()
    }
    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::Integer(_) => u64::read(value).map(StepCount::Steps),
            // 1000.0 would be a thousand times the run: a float of 1 or more is a mistake, not a count.
            Value::Float(x) => (*x > 0.0 && *x < 1.0).then_some(StepCount::Ratio(*x)),
            _ => None,
        }
    }
    fn write(&self) -> Option<Value> {
        match self {
            StepCount::Steps(steps) => steps.write(),
            StepCount::Ratio(ratio) => ratio.write(),
        }
    }
}

/// One learning rate for each text encoder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TextEncoderLr {
    /// First encoder (CLIP-L).
    pub te1: f64,
    /// Second encoder (OpenCLIP bigG).
    pub te2: f64,
}

impl Setting for TextEncoderLr {
    fn kind() -> String {
        "number, or list of two numbers".into()
    }
    fn read(value: &Value) -> Option<Self> {
        if let Some(rate) = f64::read(value) {
            return Some(Self { te1: rate, te2: rate });
        }
        <[f64; 2]>::read(value).map(|[te1, te2]| Self { te1, te2 })
    }
    fn write(&self) -> Option<Value> {
        if self.te1 == self.te2 { self.te1.write() } else { [self.te1, self.te2].write() }
    }
}

section! {
    /// The run: length, batches, optimizer, loss. A step is one optimizer step, never a micro-batch.
    TrainConfig = "train" {
        /// Length of the whole run in optimizer steps. Either this or `max_train_epochs`.
        max_train_steps: Option<u64> = None, same;
        /// Length of the whole run in epochs. Either this or `max_train_steps`.
        max_train_epochs: Option<u64> = None, same;
        /// Samples in one forward pass, per process.
        batch_size: usize = 1, sd("train_batch_size");
        /// Forward passes on each process whose gradients are added up for one optimizer step.
        gradient_accumulation_steps: usize = 1, same;
        /// Seed of everything random in the run.
        seed: u64 = 0, same;
        /// Number format of the forward and backward pass, and of the base model's weights unless `model.weight_dtype` gives another. The adapter, its gradients, norms, softmax, loss and
        /// the VAE are f32 in any case. "fp16" scales the loss.
        mixed_precision: MixedPrecision = MixedPrecision::No, same;
        /// On a CPU that multiplies bf16 (AVX-512 BF16) "bf16" rounds the operands of matrix products, convolutions and attention to bf16 and adds
        /// their products up in f32. Everything that is kept stays f32, and so do previews and the VAE. On a GPU
        /// `mixed_precision` does this.
        compute: Compute = Compute::Float, ours;
        /// Only with `mixed_precision = "fp16"`: what the loss is multiplied by at first. The scale halves at each step whose gradient
        /// overflows, which skips that step, and doubles after 2000 good ones.
        initial_loss_scale: f64 = 65536.0, ours;
        /// Keep the base model's weights (UNet and text encoders, without norms, biases and embeddings) in 8 bits, float8 e4m3, and widen
        /// each layer's when it runs. A quarter of f32's memory, half of f16's, at some loss of accuracy.
        fp8_base: bool = false, same;
        /// The same for the UNet alone.
        fp8_base_unet: bool = false, same;
        /// Optimizer.
        optimizer: OptimizerKind = OptimizerKind::Lion8bit, sd("optimizer_type");
        /// Learning rate of the UNet's modules.
        unet_lr: f64 = 2e-5, same;
        /// Learning rate of the text encoders' modules; two numbers give each encoder its own, and 0 leaves that one out.
        text_encoder_lr: TextEncoderLr = TextEncoderLr { te1: 5e-6, te2: 5e-6 }, same;
        /// Decay rates of the optimizer's moments. If absent: 0.9, 0.99 for Lion; 0.9, 0.999 for AdamW.
        betas: Option<[f64; 2]> = None, sd("optimizer_args");
        /// Decoupled weight decay. If absent: 0 for Lion, 0.01 for AdamW.
        weight_decay: Option<f64> = None, sd("optimizer_args");
        /// How the learning rates go with the step.
        lr_scheduler: ScheduleKind = ScheduleKind::Constant, same;
        /// Optimizer steps of the linear rise at the start (not multiplied by processes).
        lr_warmup_steps: StepCount = StepCount::Steps(0), same;
        /// Number of half waves; for `cosine_with_restarts` and `cosine_with_min_lr`. If absent there: 1.
        lr_scheduler_num_cycles: Option<f64> = None, same;
        /// Power of the fall; for `polynomial`. If absent there: 1.
        lr_scheduler_power: Option<f64> = None, same;
        /// Part of the rate that is left at the end; for `cosine_with_min_lr`. If absent there: 0.
        lr_scheduler_min_lr_ratio: Option<f64> = None, same;
        /// Steps that scale the fall; for `inverse_sqrt`. If absent there: the warmup, or 10000.
        lr_scheduler_timescale: Option<u64> = None, same;
        /// Largest L2 norm of the whole gradient; it is scaled down to this. 0: never.
        max_grad_norm: f64 = 1.0, same;
        /// What follows a step whose loss or gradient is no number. Such a step never reaches the weights.
        on_non_finite: OnNonFinite = OnNonFinite::Withhold, ours;
        /// Steps in a row that may be withheld or skipped before the run stops.
        max_withheld_steps: u64 = 20, ours;
        /// Min-SNR weighting of the loss with this gamma; 5 is usual.
        min_snr_gamma: Option<f64> = None, same;
        /// Weigh the loss by 1/sqrt(snr) (epsilon) or 1/(snr + 1) (v).
        debiased_estimation_loss: bool = false, same;
        /// Only with `v_parameterization`: weigh the loss as a noise prediction's.
        scale_v_pred_loss_like_noise_pred: bool = false, same;
        /// Only without `v_parameterization`: adds this much of the loss weighed as a velocity prediction's.
        v_pred_like_loss: Option<f64> = None, same;
        /// Element loss.
        loss_type: LossType = LossType::L2, same;
        /// How the threshold of `huber` and `smooth_l1` goes with the timestep. If absent there: "snr".
        huber_schedule: Option<HuberSchedule> = None, same;
        /// Threshold of `huber` and `smooth_l1`. If absent there: 0.1.
        huber_c: Option<f64> = None, same;
        /// Factor of the threshold, for the schedules "constant" and "exponential". If absent there: 1.
        huber_scale: Option<f64> = None, same;
        /// Strength of a constant that is added to each channel of the noise; 0.0357 is usual.
        noise_offset: Option<f64> = None, same;
        /// Draw that strength for each sample between 0 and `noise_offset`.
        noise_offset_random_strength: bool = false, same;
        /// Adds this times the absolute mean of each latent channel to the strength of `noise_offset`.
        adaptive_noise_scale: Option<f64> = None, same;
        /// Number of coarser noise fields that are added; 6 to 10 is usual.
        multires_noise_iterations: Option<u32> = None, same;
        /// Weight of each coarser field relative to the one before. If absent with `multires_noise_iterations`: 0.3.
        multires_noise_discount: Option<f64> = None, same;
        /// Strength of extra noise in the network's input that it is not asked to predict; 0.1 is usual.
        ip_noise_gamma: Option<f64> = None, same;
        /// Draw that strength for each sample between 0 and `ip_noise_gamma`.
        ip_noise_gamma_random_strength: bool = false, same;
        /// First timestep that is trained.
        min_timestep: u32 = 0, same;
        /// First timestep above the range that is trained.
        max_timestep: u32 = 1000, same;
        /// Longest caption in tokens: 75, 150 or 225.
        max_token_length: u32 = 75, same;
        /// Compute activations again in the backward pass instead of keeping them; gradients stay the same to the last bit. "block" (or true, as
        /// in sd-scripts): each ResNet, transformer block and text encoder layer keeps its input only, about a third more time. "layer": the
        /// attentions, feed-forwards and ResNet halves inside them too, about two thirds more time and the least memory. "none" (or false): all is kept.
        gradient_checkpointing: GradientCheckpointing = GradientCheckpointing::None, same;
        /// "sd-scripts": do as it does where its arithmetic differs from the published model's: the pooled text embedding of single-file
        /// checkpoints (projection not transposed), loss weights from the schedule before `zero_terminal_snr`, and, unless the recipe
        /// gives it, `dataset.crop_condition`. For comparisons with its runs.
        compat: Option<Compat> = None, ours;
        /// Minutes that processes wait for one of them, at the start and in a step. If absent: 10.
        ddp_timeout: Option<f64> = None, same;
        /// Size in MiB of the pieces in which several processes add up their gradients.
        ddp_bucket_cap_mb: f64 = 25.0, ours;
        /// Optimizer steps between checks that all processes hold the same weights. They are checked at the start and before
        /// each checkpoint in any case.
        ddp_check_every_n_steps: Option<u64> = None, ours;
        /// Where to compute. "cuda": the GPU with the number of this process on its machine (`LOCAL_RANK`; 0 for a single process), of
        /// those that `CUDA_VISIBLE_DEVICES` leaves. "auto": that GPU where the program was built for GPUs and there is one, else the CPU.
        device: DeviceChoice = DeviceChoice::Auto, ours;
        /// Threads for computing. If absent: one for each core.
        threads: Option<usize> = None, ours;
        /// Threads that prepare batches ahead: read, decode and resize pictures, tokenize captions. Each holds one batch, and as many
        /// wait finished. 0, with which sd-scripts loads between the steps, is taken for 1. If absent: one for each core, shared by the
        /// processes of a machine.
        max_data_loader_n_workers: Option<usize> = None, same;
    }
}
