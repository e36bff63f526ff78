//! Mixed precision: in which types a run computes and keeps the base model, and the dynamic loss scale of f16.
//!
//! Activations and the base model's weights are of the compute type; norms' statistics, softmax, activation functions, the timestep
//! embedding, the loss, the adapter, its gradients and the optimizer are f32, and so is the VAE. With `train.compute = "bf16"` all is
//! f32 but the operands of products while they are multiplied.

use candle_core::{DType, Device};
use optim::{LossScaler, ScalerConfig, ScalerState};

use crate::checkpoint::RunState;
use crate::config::{Compute, MixedPrecision, RunConfig, TrainConfig};
use crate::error::{Error, Result};

/// The type of activations, and of the base model's weights where the recipe asks for no other.
pub fn compute_type(train: &TrainConfig) -> DType {
    match train.mixed_precision {
        MixedPrecision::No => DType::F32,
        MixedPrecision::Fp16 => DType::F16,
        MixedPrecision::Bf16 => DType::BF16,
    }
}

/// The types in which the weights of text encoders and UNet are kept; `None`: as the file has them. Where the recipe asks for none, half
/// precision keeps them in its own type.
pub fn weight_types(config: &RunConfig) -> (Option<DType>, Option<DType>) {
    let half = Some(compute_type(&config.train)).filter(|d| *d != DType::F32);
    let (plain, eight) = (config.model.weight_dtype.dtype().or(half), Some(DType::F8E4M3));
    match (config.train.fp8_base, config.train.fp8_base_unet) {
        (true, _) => (eight, eight),
        (false, true) => (plain, eight),
        (false, false) => (plain, plain),
    }
}

/// Refuses `train.compute = "bf16"` where the run would not do it: on a GPU, and on a CPU without instructions for it.
///
/// # Errors
/// If so, with the way out.
pub fn check_compute(train: &TrainConfig, device: &Device) -> Result<()> {
    if train.compute == Compute::Float {
        return Ok(());
    }
    if !device.is_cpu() {
        return Err(Error::refused(
            "train.compute = \"bf16\" is of the CPU, and this run computes on a GPU",
            "set train.mixed_precision = \"bf16\" in place of it, or train.device = \"cpu\"",
        ));
    }
    if !ops::has_bf16() {
        return Err(Error::refused(
            "train.compute = \"bf16\": this CPU has no instructions that multiply bf16 (AVX-512 BF16)",
            "set train.compute = \"float\"",
        ));
    }
    Ok(())
}

/// Name of a type in messages.
pub fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        _ => "f32",
    }
}

/// Compute type, and what part of the base model is kept in 8 bits.
pub fn describe(config: &RunConfig) -> String {
    let name = match config.train.compute {
        Compute::Float => type_name(compute_type(&config.train)),
        Compute::Bf16 => "f32, products of bf16",
    };
    match (config.train.fp8_base, config.train.fp8_base_unet) {
        (true, _) => format!("{name}, base weights e4m3"),
        (false, true) => format!("{name}, weights of the base UNet e4m3"),
        (false, false) => name.into(),
    }
}

/// The loss scaler of a run, at its start or as `saved`; `None` outside of f16, where nothing is scaled.
///
/// # Errors
/// If the saved scale is no positive number.
pub fn scaler(train: &TrainConfig, saved: Option<ScalerState>) -> optim::Result<Option<ScalerState>> {
    if train.mixed_precision != MixedPrecision::Fp16 {
        return Ok(None);
    }
    let mut scaler = LossScaler::new(ScalerConfig { initial_scale: train.initial_loss_scale as f32, ..ScalerConfig::default() });
    if let Some(saved) = saved {
        scaler.load_state(saved)?;
    }
    Ok(Some(scaler.state()))
}

/// What the loss of the next step is multiplied by.
pub fn loss_scale(state: &RunState) -> f64 {
    state.loss_scaler.map_or(1.0, |s| f64::from(s.scale))
}

/// What is done with the gradient of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is applied.
    Apply,
    /// It passed the range of f16 at a loss scale above 1: the step is skipped and the scale falls, which is how the scale is found.
    Overflow,
    /// Loss or gradient is no number, and no smaller scale would help: the step is withheld.
    NotFinite,
}

/// Judges a step by its loss and the norm of its gradient, both the same on all ranks, and moves the loss scale. A loss that is no
/// number says nothing about the scale, which then stays.
pub fn judge(state: &mut RunState, loss: f64, norm: f64) -> Verdict {
    let finite = loss.is_finite() && norm.is_finite();
    let Some(saved) = state.loss_scaler else {
        return if finite { Verdict::Apply } else { Verdict::NotFinite };
    };
    if !loss.is_finite() || (!finite && saved.scale <= 1.0) {
        return Verdict::NotFinite;
    }
    // The run counts its skipped steps together with the withheld ones.
    let mut scaler = LossScaler::new(ScalerConfig { max_consecutive_skips: u32::MAX, ..ScalerConfig::default() });
    _ = scaler.load_state(saved).and_then(|()| scaler.update(!finite));
    state.loss_scaler = Some(scaler.state());
    if finite { Verdict::Apply } else { Verdict::Overflow }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(scale: Option<f32>) -> RunState {
        let loss_scaler = scale.map(|scale| ScalerState { scale, good_steps: 0, consecutive_skips: 0, total_skips: 0 });
        RunState { loss_scaler, ..RunState::default() }
    }

    #[test]
    fn an_overflow_lowers_the_scale_and_a_nan_of_the_forward_pass_does_not() {
        let mut s = state(Some(65536.0));
        assert_eq!(judge(&mut s, 0.5, f64::INFINITY), Verdict::Overflow);
        assert_eq!(loss_scale(&s), 32768.0);
        assert_eq!(judge(&mut s, f64::NAN, 0.1), Verdict::NotFinite);
        assert_eq!(loss_scale(&s), 32768.0);
        assert_eq!(judge(&mut s, 0.5, 0.1), Verdict::Apply);
        let scaler = s.loss_scaler.expect("kept");
        assert_eq!((scaler.good_steps, scaler.consecutive_skips, scaler.total_skips), (1, 0, 1));
    }

    #[test]
    fn at_a_scale_of_one_a_gradient_that_is_no_number_is_no_overflow() {
        let mut s = state(Some(2.0));
        assert_eq!(judge(&mut s, 0.5, f64::NAN), Verdict::Overflow);
        assert_eq!(judge(&mut s, 0.5, f64::NAN), Verdict::NotFinite);
        assert_eq!(loss_scale(&s), 1.0);
    }

    #[test]
    fn products_of_bf16_are_refused_where_they_cannot_be_had() {
        let train = |compute| TrainConfig { compute, ..TrainConfig::default() };
        assert!(check_compute(&train(Compute::Float), &Device::Cpu).is_ok());
        match check_compute(&train(Compute::Bf16), &Device::Cpu) {
            Ok(()) => assert!(ops::has_bf16()),
            Err(error) => {
                assert!(!ops::has_bf16() && error.to_string().contains("AVX-512 BF16"), "{error}");
                assert_eq!(error.hint().as_deref(), Some("set train.compute = \"float\""));
            }
        }
    }

    #[test]
    fn without_a_scaler_nothing_is_scaled() {
        let mut s = state(None);
        assert_eq!((judge(&mut s, 0.5, f64::NAN), judge(&mut s, 0.5, 1.0)), (Verdict::NotFinite, Verdict::Apply));
        assert_eq!(loss_scale(&s), 1.0);
    }

    #[test]
    fn the_scale_doubles_after_two_thousand_good_steps() {
        let mut s = state(Some(1024.0));
        for _ in 0..1999 {
            judge(&mut s, 0.5, 1.0);
        }
        assert_eq!(loss_scale(&s), 1024.0);
        judge(&mut s, 0.5, 1.0);
        assert_eq!(loss_scale(&s), 2048.0);
    }

    #[test]
    fn a_scaler_exists_in_f16_alone_and_goes_on_from_a_saved_one() {
        let train = |mixed_precision| TrainConfig { mixed_precision, ..TrainConfig::default() };
        assert_eq!(scaler(&train(MixedPrecision::Bf16), None).expect("fine"), None);
        assert_eq!(scaler(&train(MixedPrecision::Fp16), None).expect("fine").map(|s| s.scale), Some(65536.0));
        let saved = ScalerState { scale: 8.0, good_steps: 3, consecutive_skips: 1, total_skips: 9 };
        assert_eq!(scaler(&train(MixedPrecision::Fp16), Some(saved)).expect("fine"), Some(saved));
        assert_eq!(scaler(&train(MixedPrecision::No), Some(saved)).expect("fine"), None);
        assert!(scaler(&train(MixedPrecision::Fp16), Some(ScalerState { scale: f32::NAN, ..saved })).is_err());
    }
}
