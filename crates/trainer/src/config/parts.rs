//! What the crates that do the work are asked for: the recipe's keys in their types.

use std::path::Path;

use diffusion::{LossConfig, NoiseConfig, Prediction, Schedule};
use lokr::Preset;
use optim::{Hyper, ScheduleOptions};
use sdxl::checkpoint::HeadDims;

use super::error::Problem;
use super::{ModelConfig, Resume, RunConfig};

impl ModelConfig {
    /// The heads and groups that a checkpoint says it has, with those that the recipe gives in their place.
    pub fn head_dims(&self, found: HeadDims) -> HeadDims {
        HeadDims {
            head_dim: self.head_dim.unwrap_or(found.head_dim),
            norm_num_groups: self.norm_num_groups.unwrap_or(found.norm_num_groups),
            te1_heads: self.te1_heads.unwrap_or(found.te1_heads),
            te2_heads: self.te2_heads.unwrap_or(found.te2_heads),
            vae_norm_num_groups: self.vae_norm_num_groups.unwrap_or(found.vae_norm_num_groups),
        }
    }
}

impl RunConfig {
    /// What the base model predicts.
    pub fn prediction(&self) -> Prediction {
        if self.model.v_parameterization { Prediction::V } else { Prediction::Epsilon }
    }

    /// The noise schedule, with the table that weighs losses.
    pub fn noise_schedule(&self) -> Schedule {
        if self.model.zero_terminal_snr { Schedule::zero_terminal_snr(self.train.compat.is_some()) } else { Schedule::sdxl() }
    }

    /// How training noise is drawn.
    pub fn noise(&self) -> NoiseConfig {
        let t = &self.train;
        let default = NoiseConfig::default();
        NoiseConfig {
            seed: t.seed,
            noise_offset: t.noise_offset.unwrap_or(default.noise_offset),
            noise_offset_random_strength: t.noise_offset_random_strength,
            adaptive_noise_scale: t.adaptive_noise_scale,
            multires_noise_iterations: t.multires_noise_iterations.unwrap_or(default.multires_noise_iterations),
            multires_noise_discount: t.multires_noise_discount.unwrap_or(default.multires_noise_discount),
            ip_noise_gamma: t.ip_noise_gamma.unwrap_or(default.ip_noise_gamma),
            ip_noise_gamma_random_strength: t.ip_noise_gamma_random_strength,
            min_timestep: t.min_timestep,
            max_timestep: t.max_timestep,
        }
    }

    /// How the loss is formed.
    pub fn loss(&self) -> LossConfig {
        let t = &self.train;
        let default = LossConfig::default();
        LossConfig {
            loss_type: t.loss_type,
            huber_schedule: t.huber_schedule.unwrap_or(default.huber_schedule),
            huber_c: t.huber_c.unwrap_or(default.huber_c),
            huber_scale: t.huber_scale.unwrap_or(default.huber_scale),
            prediction: self.prediction(),
            min_snr_gamma: t.min_snr_gamma,
            scale_v_pred_loss_like_noise_pred: t.scale_v_pred_loss_like_noise_pred,
            v_pred_like_loss: t.v_pred_like_loss,
            debiased_estimation_loss: t.debiased_estimation_loss,
        }
    }

    /// The optimizer's numbers.
    pub fn hyper(&self) -> Hyper {
        let t = &self.train;
        let default = Hyper::defaults(t.optimizer);
        Hyper {
            betas: t.betas.map_or(default.betas, |[b1, b2]| (b1, b2)),
            weight_decay: t.weight_decay.unwrap_or(default.weight_decay),
            eps: default.eps,
        }
    }

    /// The adapter's options under a preset, which is read from `network.preset` by the caller ([`Preset::load`]).
    pub fn adapter(&self, preset: Preset) -> lokr::NetworkConfig {
        let n = &self.network;
        lokr::NetworkConfig {
            dim: n.dim,
            alpha: n.alpha,
            conv_dim: n.conv_dim,
            conv_alpha: n.conv_alpha,
            factor: n.factor,
            full_matrix: n.full_matrix,
            decompose_both: n.decompose_both,
            use_tucker: n.use_tucker,
            use_scalar: n.use_scalar,
            rs_lora: n.rs_lora,
            unbalanced_factorization: n.unbalanced_factorization,
            train_norm: n.train_norm,
            path: n.forward.path(),
            seed: self.train.seed,
            ..lokr::NetworkConfig::new(preset)
        }
    }

    /// The learning-rate schedule of a part with the base rate `rate`, for a run of `total_steps` optimizer steps.
    pub fn lr_schedule(&self, total_steps: u64, rate: f64) -> optim::Result<optim::Schedule> {
        let t = &self.train;
        let default = ScheduleOptions::default();
        let options = ScheduleOptions {
            warmup_steps: t.lr_warmup_steps.resolve(total_steps),
            total_steps,
            num_cycles: t.lr_scheduler_num_cycles.unwrap_or(default.num_cycles),
            power: t.lr_scheduler_power.unwrap_or(default.power),
            min_lr_ratio: t.lr_scheduler_min_lr_ratio.unwrap_or(default.min_lr_ratio),
            timescale: t.lr_scheduler_timescale,
            learning_rate: rate,
        };
        optim::Schedule::new(t.lr_scheduler, options)
    }

    /// Checks that every path of the recipe leads somewhere, and the preset with it. Relative paths start at the current
    /// working directory.
    ///
    /// # Errors
    /// One problem for each key whose path does not exist, or whose preset cannot be used.
    pub fn check_paths(&self) -> Result<(), Vec<Problem>> {
        let mut problems = Vec::new();
        let mut look = |key: &str, path: &Path, folder: bool| {
            let found = if folder { path.is_dir() } else { path.exists() };
            if !found {
                let here = std::env::current_dir().map_or_else(|_| ".".to_owned(), |d| d.display().to_string());
                let what = if folder && path.exists() { "is not a folder" } else { "does not exist" };
                problems.push(Problem {
                    keys: vec![key.to_owned()],
                    what: format!("{key} = \"{}\" {what}", path.display()),
                    way_out: if path.is_absolute() {
                        format!("correct {key}")
                    } else {
                        format!("relative paths start at the current folder, {here}: go to another one or correct {key}")
                    },
                });
            }
        };
        look("model.base", &self.model.base, false);
        for (key, path) in [("model.vae", &self.model.vae), ("network.weights", &self.network.weights)] {
            if let Some(path) = path {
                look(key, path, false);
            }
        }
        for (i, subset) in self.dataset.subsets.iter().enumerate() {
            if let Some(index) = &subset.index {
                look(&format!("dataset.subsets[{i}].index"), index, false);
            }
            if subset.index.is_none() || !subset.image_dir.as_os_str().is_empty() {
                look(&format!("dataset.subsets[{i}].image_dir"), &subset.image_dir, true);
            }
        }
        if let Some(dir) = &self.validation.image_dir {
            look("validation.image_dir", dir, true);
        }
        if let Resume::From(path) = &self.output.resume {
            look("output.resume", path, true);
        }
        problems.extend(self.preset_problem());
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    /// What is wrong with the preset, or between it and the parts that are trained.
    fn preset_problem(&self) -> Option<Problem> {
        let n = &self.network;
        let key = "network.preset";
        let preset = match Preset::load(&n.preset) {
            Ok(preset) => preset,
            Err(e) => {
                let cause = std::error::Error::source(&e).map_or_else(String::new, |cause| format!(": {cause}"));
                let way_out = e.hint().unwrap_or_else(|| format!("correct {key}"));
                return Some(Problem { keys: vec![key.into()], what: format!("{key} = \"{}\": {e}{cause}", n.preset), way_out });
            }
        };
        let sides = [(n.train_unet, "train_unet", &preset.unet), (n.train_text_encoder, "train_text_encoder", &preset.text_encoder)];
        let (_, part, _) = sides.into_iter().find(|(on, _, targets)| *on && targets.classes.is_empty() && targets.names.is_empty())?;
        Some(Problem {
            keys: vec![key.into(), format!("network.{part}")],
            what: format!("network.{part} = true, but {key} = \"{}\" names no module of that part", n.preset),
            way_out: format!("set network.{part} = false, or choose a preset with modules for it"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ForwardPath;

    #[test]
    fn the_forward_path_can_be_forced() {
        let path = |forward: ForwardPath| {
            let mut config = RunConfig::default();
            config.network.forward = forward;
            config.adapter(Preset::load("full").expect("built in")).path
        };
        assert_eq!(path(ForwardPath::Auto), None);
        assert_eq!(path(ForwardPath::Merged), Some(lokr::functional::Path::Merged));
        assert_eq!(path(ForwardPath::Factored), Some(lokr::functional::Path::Factored));
    }
}
