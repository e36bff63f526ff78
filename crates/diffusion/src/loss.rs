//! The training loss, and its gradient with respect to the prediction.
//!
//! Per sample: mean over channels and pixels of an element loss of d = pred - target, times weights from the
//! signal-to-noise ratio; then the mean over the batch. Formulas and their order: sd-scripts `library/train_util.py`
//! (`conditional_loss`) and `library/custom_train_functions.py`. The gradient is written by hand: the trainer hands it
//! to its own backward, and no tape has to hold the loss.
//!
//! # Determinism
//! Elements are computed in f32 and summed in f64; a sample's loss does not depend on the rest of its batch.

use candle_core::{DType, Tensor};

use crate::choice::choice;
use crate::{Error, Prediction, Result, Schedule};

choice! {
    /// Loss of one element, with d = pred - target and c from [`HuberSchedule`].
    LossType {
        /// d².
        L2 = "l2",
        /// |d|.
        L1 = "l1",
        /// 2c (√(d² + c²) - c): quadratic near 0, linear far away (pseudo-Huber, Charbonnier et al. 1997).
        Huber = "huber",
        /// 2 (√(d² + c²) - c).
        SmoothL1 = "smooth_l1",
    }
}

choice! {
    /// How c of the Huber losses depends on the timestep t.
    HuberSchedule {
        /// huber_c * huber_scale.
        Constant = "constant",
        /// huber_scale * exp(ln(huber_c) t / 1000).
        Exponential = "exponential",
        /// (1 - huber_c)/(1 + σ)² + huber_c with σ = √((1-ᾱ)/ᾱ); `huber_scale` has no part in it.
        Snr = "snr",
    }
}

/// How a loss is formed. Field names are those of sd-scripts' options.
#[derive(Clone, Debug, PartialEq)]
pub struct LossConfig {
    /// Element loss.
    pub loss_type: LossType,
    /// Schedule of c for the Huber losses.
    pub huber_schedule: HuberSchedule,
    /// c of the Huber losses.
    pub huber_c: f64,
    /// Factor of c for the constant and the exponential schedule.
    pub huber_scale: f64,
    /// What the network predicts; the weights below depend on it.
    pub prediction: Prediction,
    /// Min-SNR-γ weighting (Hang et al. 2023): min(snr, γ)/snr for ε, min(snr, γ)/(snr + 1) for v.
    pub min_snr_gamma: Option<f64>,
    /// v only: times s/(s + 1), s = min(snr, 1000).
    pub scale_v_pred_loss_like_noise_pred: bool,
    /// ε only: the loss plus this times loss * (s + 1)/s.
    pub v_pred_like_loss: Option<f64>,
    /// Debiased estimation (Yu et al. 2023): times 1/√s for ε, 1/(s + 1) for v.
    pub debiased_estimation_loss: bool,
}

impl Default for LossConfig {
    fn default() -> Self {
        Self {
            loss_type: LossType::L2,
            huber_schedule: HuberSchedule::Snr,
            huber_c: 0.1,
            huber_scale: 1.0,
            prediction: Prediction::Epsilon,
            min_snr_gamma: None,
            scale_v_pred_loss_like_noise_pred: false,
            v_pred_like_loss: None,
            debiased_estimation_loss: false,
        }
    }
}

/// A loss and all that a step needs of it.
#[derive(Debug)]
pub struct LossOutput {
    /// Mean over the batch of the weighted losses.
    pub loss: f64,
    /// Weighted loss of each sample.
    pub per_sample: Vec<f64>,
    /// Loss of each sample before any weight.
    pub unweighted: Vec<f64>,
    /// Weight of each sample.
    pub weights: Vec<f64>,
    /// d loss / d pred, [B, C, H, W] f32: not yet divided by accumulation steps nor multiplied by a loss scale.
    pub gradient: Tensor,
}

/// The values of a loss where they were computed, so that a GPU need not be waited for.
#[derive(Debug)]
pub struct PendingLoss {
    /// Loss of each sample before any weight, [B] f64.
    pub unweighted: Tensor,
    /// Weight of each sample.
    pub weights: Vec<f64>,
}

impl PendingLoss {
    /// Loss of each sample before any weight, copied to the host.
    pub fn read(&self) -> Result<Vec<f64>> {
        Ok(self.unweighted.to_vec1()?)
    }

    /// Weighted loss of each sample, from what [`PendingLoss::read`] gave.
    pub fn weighted(&self, unweighted: &[f64]) -> Vec<f64> {
        unweighted.iter().zip(&self.weights).map(|(l, w)| l * w).collect()
    }
}

impl LossConfig {
    /// Weight that the loss of a sample at `timestep` gets from the signal-to-noise ratio.
    ///
    /// At a ratio of 0 (last timestep of a zero terminal SNR schedule) min-SNR gives its limit, 1 for ε and 0 for v;
    /// the weights that have no limit there (`debiased_estimation_loss` and `v_pred_like_loss` for ε) become infinite.
    pub fn weight(&self, schedule: &Schedule, timestep: u32) -> Result<f64> {
        let snr = f64::from(schedule.snr(timestep)?);
        let s = snr.min(1000.0);
        let v = self.prediction == Prediction::V;
        let mut weight = 1.0;
        if let Some(gamma) = self.min_snr_gamma {
            weight *= if v { snr.min(gamma) / (snr + 1.0) } else { (gamma / snr).min(1.0) };
        }
        if v && self.scale_v_pred_loss_like_noise_pred {
            weight *= s / (s + 1.0);
        }
        if let (false, Some(k)) = (v, self.v_pred_like_loss) {
            weight += weight * (s + 1.0) / s * k;
        }
        if self.debiased_estimation_loss {
            weight *= if v { 1.0 / (s + 1.0) } else { 1.0 / s.sqrt() };
        }
        Ok(weight)
    }

    /// c of the Huber losses at `timestep`.
    pub fn huber_threshold(&self, schedule: &Schedule, timestep: u32) -> Result<f64> {
        let alpha = f64::from(schedule.alpha_cumprod(timestep)?);
        Ok(match self.huber_schedule {
            HuberSchedule::Constant => self.huber_c * self.huber_scale,
            HuberSchedule::Exponential => {
                self.huber_scale * (self.huber_c.ln() * f64::from(timestep) / crate::TRAIN_TIMESTEPS as f64).exp()
            }
            HuberSchedule::Snr => (1.0 - self.huber_c) / (1.0 + ((1.0 - alpha) / alpha).sqrt()).powi(2) + self.huber_c,
        })
    }

    /// Loss and gradient of a batch.
    ///
    /// `pred`, `target`: [B, C, H, W], any float type. `timesteps`: B entries. `sample_weights`: a further factor per
    /// sample (prior_loss_weight of regularisation images); `mask`: [B, 1, H, W] or [B, C, H, W] in 0..1, multiplied on
    /// the element losses without renormalisation.
    pub fn loss(
        &self,
        schedule: &Schedule,
        pred: &Tensor,
        target: &Tensor,
        timesteps: &[u32],
        sample_weights: Option<&[f64]>,
        mask: Option<&Tensor>,
    ) -> Result<LossOutput> {
        let (pending, gradient) = self.pending_loss(schedule, pred, target, timesteps, sample_weights, mask)?;
        let unweighted = pending.read()?;
        let per_sample = pending.weighted(&unweighted);
        let loss = per_sample.iter().sum::<f64>() / per_sample.len() as f64;
        Ok(LossOutput { loss, per_sample, unweighted, weights: pending.weights, gradient })
    }

    /// As [`LossConfig::loss`], without waiting for the values; with [`LossOutput::gradient`].
    pub fn pending_loss(
        &self,
        schedule: &Schedule,
        pred: &Tensor,
        target: &Tensor,
        timesteps: &[u32],
        sample_weights: Option<&[f64]>,
        mask: Option<&Tensor>,
    ) -> Result<(PendingLoss, Tensor)> {
        let batch = pred.dim(0)?;
        if timesteps.len() != batch {
            return Err(Error::BatchSize { what: "timesteps", got: timesteps.len(), batch });
        }
        if let Some(w) = sample_weights.filter(|w| w.len() != batch) {
            return Err(Error::BatchSize { what: "sample weights", got: w.len(), batch });
        }
        let difference = (pred.to_dtype(DType::F32)? - target.to_dtype(DType::F32)?)?;
        let (mut element, mut slope) = self.element(schedule, &difference, timesteps)?;
        if let Some(mask) = mask {
            let mask = mask.to_dtype(DType::F32)?;
            element = element.broadcast_mul(&mask)?;
            slope = slope.broadcast_mul(&mask)?;
        }
        // f64: a naive f32 sum over 65,536 elements would lose digits that the comparison of losses needs.
        let unweighted = element.flatten_from(1)?.to_dtype(DType::F64)?.mean(1)?;
        let mut weights = timesteps.iter().map(|&t| self.weight(schedule, t)).collect::<Result<Vec<f64>>>()?;
        if let Some(given) = sample_weights {
            weights.iter_mut().zip(given).for_each(|(w, g)| *w *= g);
        }
        let share = 1.0 / difference.elem_count() as f64;
        let factors: Vec<f32> = weights.iter().map(|w| (w * share) as f32).collect();
        let gradient = slope.broadcast_mul(&column(factors, &difference)?)?;
        Ok((PendingLoss { unweighted, weights }, gradient))
    }

    /// Element loss and its derivative, both shaped as `d` ([B, C, H, W] f32).
    fn element(&self, schedule: &Schedule, d: &Tensor, timesteps: &[u32]) -> Result<(Tensor, Tensor)> {
        let huber = |factor: fn(f64) -> f64| -> Result<(Tensor, Tensor)> {
            let c = timesteps.iter().map(|&t| self.huber_threshold(schedule, t)).collect::<Result<Vec<f64>>>()?;
            let c_column = column(c.iter().map(|&c| c as f32).collect(), d)?;
            let factor = column(c.iter().map(|&c| factor(c) as f32).collect(), d)?;
            let root = d.sqr()?.broadcast_add(&c_column.sqr()?)?.sqrt()?;
            let slope = (d / &root)?.broadcast_mul(&factor)?;
            // d²/(root + c) is root - c without the cancellation of two nearly equal numbers when d is small.
            let element = (d.sqr()? / root.broadcast_add(&c_column)?)?.broadcast_mul(&factor)?;
            Ok((element, slope))
        };
        match self.loss_type {
            LossType::L2 => Ok((d.sqr()?, (d * 2.0)?)),
            LossType::L1 => Ok((d.abs()?, d.sign()?)),
            LossType::Huber => huber(|c| 2.0 * c),
            LossType::SmoothL1 => huber(|_| 2.0),
        }
    }
}

/// One value per sample as [B, 1, 1, ...] beside `like`.
fn column(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; like.rank()];
    shape[0] = values.len();
    Ok(Tensor::from_vec(values, shape, like.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use random::{Purpose, Stream};

    const SHAPE: (usize, usize, usize, usize) = (3, 4, 3, 5);
    const TIMESTEPS: [u32; 3] = [20, 480, 950];

    fn field(seed: u64) -> Tensor {
        Tensor::from_vec(Stream::new(seed, Purpose::Noise, 0, 0).normal(180), SHAPE, &Device::Cpu).unwrap()
    }

    /// The loss in f64 from the formulas as written, one element at a time.
    fn reference(config: &LossConfig, schedule: &Schedule, pred: &[f64], target: &[f64]) -> f64 {
        let mut sum = 0.0;
        for (b, &t) in TIMESTEPS.iter().enumerate() {
            let c = config.huber_threshold(schedule, t).unwrap();
            let mean = (b * 60..(b + 1) * 60)
                .map(|i| {
                    let d = pred[i] - target[i];
                    match config.loss_type {
                        LossType::L2 => d * d,
                        LossType::L1 => d.abs(),
                        LossType::Huber => 2.0 * c * ((d * d + c * c).sqrt() - c),
                        LossType::SmoothL1 => 2.0 * ((d * d + c * c).sqrt() - c),
                    }
                })
                .sum::<f64>()
                / 60.0;
            sum += mean * config.weight(schedule, t).unwrap();
        }
        sum / 3.0
    }

    #[test]
    fn loss_and_gradient_equal_the_formula_and_its_finite_differences() {
        let schedule = Schedule::sdxl();
        let (pred, target) = (field(1), field(2));
        let wide = |t: &Tensor| -> Vec<f64> { t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap() };
        let (p, y) = (wide(&pred), wide(&target));
        for loss_type in LossType::NAMES {
            for huber_schedule in HuberSchedule::NAMES {
                for prediction in [Prediction::Epsilon, Prediction::V] {
                    let config = LossConfig {
                        loss_type: LossType::from_name(loss_type).unwrap(),
                        huber_schedule: HuberSchedule::from_name(huber_schedule).unwrap(),
                        huber_scale: 1.5,
                        prediction,
                        min_snr_gamma: Some(5.0),
                        ..Default::default()
                    };
                    let got = config.loss(&schedule, &pred, &target, &TIMESTEPS, None, None).unwrap();
                    let want = reference(&config, &schedule, &p, &y);
                    // f32 elements, each within a few ulp of 6e-8.
                    assert!((got.loss - want).abs() < 1e-6 * want, "{config:?}: {} {want}", got.loss);
                    let gradient = wide(&got.gradient);
                    let largest = gradient.iter().fold(0f64, |m, g| m.max(g.abs()));
                    for i in (0..180).step_by(7) {
                        // Central differences in f64 with step 1e-5: error about 1e-10 of the value, and 1e-16/1e-5 of the loss.
                        let mut moved = p.clone();
                        moved[i] += 1e-5;
                        let up = reference(&config, &schedule, &moved, &y);
                        moved[i] -= 2e-5;
                        let numeric = (up - reference(&config, &schedule, &moved, &y)) / 2e-5;
                        assert!((gradient[i] - numeric).abs() < 2e-6 * largest, "{config:?} [{i}]: {} {numeric}", gradient[i]);
                    }
                }
            }
        }
    }

    #[test]
    fn weights_are_those_of_the_papers() {
        let schedule = Schedule::sdxl();
        let plain = LossConfig::default();
        let weight = |config: LossConfig, t: u32| config.weight(&schedule, t).unwrap();
        for t in [0, 20, 480, 950, 999] {
            let snr = f64::from(schedule.snr(t).unwrap());
            let s = snr.min(1000.0);
            let cases = [
                (plain.clone(), 1.0),
                (LossConfig { min_snr_gamma: Some(5.0), ..plain.clone() }, snr.min(5.0) / snr),
                (LossConfig { v_pred_like_loss: Some(0.25), ..plain.clone() }, 1.0 + 0.25 / (s / (s + 1.0))),
                (LossConfig { debiased_estimation_loss: true, ..plain.clone() }, 1.0 / s.sqrt()),
                (LossConfig { debiased_estimation_loss: true, min_snr_gamma: Some(1.0), ..plain.clone() }, snr.min(1.0) / snr / s.sqrt()),
            ];
            for (config, want) in cases {
                assert!((weight(config.clone(), t) - want).abs() <= 1e-12 * want, "{config:?} at {t}");
            }
            let v = LossConfig { prediction: Prediction::V, ..plain.clone() };
            let cases = [
                (LossConfig { min_snr_gamma: Some(5.0), ..v.clone() }, snr.min(5.0) / (snr + 1.0)),
                (LossConfig { scale_v_pred_loss_like_noise_pred: true, ..v.clone() }, s / (s + 1.0)),
                (LossConfig { debiased_estimation_loss: true, ..v.clone() }, 1.0 / (s + 1.0)),
                (LossConfig { v_pred_like_loss: Some(1.0), ..v.clone() }, 1.0),
            ];
            for (config, want) in cases {
                assert!((weight(config.clone(), t) - want).abs() <= 1e-12 * want, "{config:?} at {t}");
            }
        }
        let zero = Schedule::zero_terminal_snr(false);
        let gamma = LossConfig { min_snr_gamma: Some(5.0), ..plain };
        assert_eq!(gamma.weight(&zero, 999).unwrap(), 1.0);
        assert_eq!(LossConfig { prediction: Prediction::V, ..gamma }.weight(&zero, 999).unwrap(), 0.0);
    }

    #[test]
    fn mask_and_sample_weights_scale_loss_and_gradient_alike() {
        let schedule = Schedule::sdxl();
        let (pred, target) = (field(1), field(2));
        let config = LossConfig::default();
        let plain = config.loss(&schedule, &pred, &target, &TIMESTEPS, None, None).unwrap();
        let half = Tensor::full(0.5f32, (3, 1, 3, 5), &Device::Cpu).unwrap();
        let got = config.loss(&schedule, &pred, &target, &TIMESTEPS, Some(&[2.0, 1.0, 0.0]), Some(&half)).unwrap();
        for (b, factor) in [1.0, 0.5, 0.0].into_iter().enumerate() {
            assert_eq!(got.per_sample[b], plain.per_sample[b] * factor);
            let rows = |o: &LossOutput| o.gradient.get(b).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (g, p) in rows(&got).iter().zip(rows(&plain)) {
                // Scaling by powers of two is exact but for the rounding of w/n.
                assert!((f64::from(*g) - f64::from(p) * factor).abs() <= 1e-7 * f64::from(p.abs()));
            }
        }
        let short = config.loss(&schedule, &pred, &target, &TIMESTEPS[..2], None, None);
        assert!(matches!(short, Err(Error::BatchSize { what: "timesteps", got: 2, batch: 3 })));
    }
}
