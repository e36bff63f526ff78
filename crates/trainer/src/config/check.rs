//! Rules between keys: what can be read but makes no run. Every message names the keys with their values, and the way out.
//!
//! Two kinds of rule stand here: what cannot work, and what would silently have no effect. The second kind is an error as
//! well: a key that does nothing is a run other than the one that was meant.

use diffusion::LossType;
use optim::ScheduleKind;

use super::error::Problem;
use super::key::Setting;
use super::read::written;
use super::sections::{PromptConfig, WeightDtype};
use super::train::{Compute, DeviceChoice, MixedPrecision, TrainConfig};
use super::{RunConfig, StepCount};

/// Collects problems.
#[derive(Default)]
struct Report(Vec<Problem>);

impl Report {
    /// A problem unless `fine`.
    fn require(&mut self, fine: bool, keys: &[&str], what: impl Into<String>, way_out: impl Into<String>) {
        if !fine {
            let keys = keys.iter().map(|k| (*k).to_owned()).collect();
            self.0.push(Problem { keys, what: what.into(), way_out: way_out.into() });
        }
    }

    /// `key` = `value` does nothing because `other` is `found`, unless `fine`.
    fn no_effect<T: Setting, U: Setting>(&mut self, fine: bool, (key, value): (&str, &T), (other, found): (&str, &U), way_out: &str) {
        let what = format!("{key} = {} has no effect with {other} = {}", written(value), written(found));
        self.require(fine, &[key, other], what, way_out);
    }

    fn at_least_one(&mut self, key: &str, value: Option<u64>) {
        self.require(value != Some(0), &[key], format!("{key} = 0"), format!("set {key} to 1 or more, or remove it"));
    }

    fn not_negative(&mut self, key: &str, value: Option<f64>) {
        let what = format!("{key} = {} is negative", written(&value));
        self.require(value.is_none_or(|v| v >= 0.0), &[key], what, format!("set {key} to 0 or more"));
    }
}

impl RunConfig {
    /// Checks every rule that needs no file.
    ///
    /// # Errors
    /// All broken rules, each with the keys that it is about and a way out.
    pub fn check(&self) -> Result<(), Vec<Problem>> {
        let mut report = Report::default();
        self.check_length(&mut report);
        self.check_parts(&mut report);
        self.check_precision(&mut report);
        self.check_network(&mut report);
        self.check_optimizer(&mut report);
        self.check_loss(&mut report);
        self.check_noise(&mut report);
        self.check_dataset(&mut report);
        self.check_output(&mut report);
        self.check_sample(&mut report);
        self.check_validation(&mut report);
        if report.0.is_empty() { Ok(()) } else { Err(report.0) }
    }

    fn check_length(&self, report: &mut Report) {
        let t = &self.train;
        let keys = ["train.max_train_steps", "train.max_train_epochs"];
        match (t.max_train_steps, t.max_train_epochs) {
            (None, None) => {
                report.require(false, &keys, "neither train.max_train_steps nor train.max_train_epochs is set", "set one of them");
            }
            (Some(steps), Some(epochs)) => {
                let what = format!("train.max_train_steps = {steps} and train.max_train_epochs = {epochs} both set the length of the run");
                report.require(false, &keys, what, "remove one of them");
            }
            _ => (),
        }
        report.at_least_one(keys[0], t.max_train_steps);
        report.at_least_one(keys[1], t.max_train_epochs);
        report.at_least_one("train.batch_size", Some(t.batch_size as u64));
        let fine = t.ddp_timeout.is_none_or(|minutes| minutes > 0.0 && minutes <= 1e6);
        let what = format!("train.ddp_timeout = {}", written(&t.ddp_timeout));
        report.require(fine, &["train.ddp_timeout"], what, "set it above 0 and to at most 1000000 minutes");
        let what = format!("train.ddp_bucket_cap_mb = {}", written(&t.ddp_bucket_cap_mb));
        report.require(t.ddp_bucket_cap_mb > 0.0, &["train.ddp_bucket_cap_mb"], what, "set it above 0");
        report.at_least_one("train.gradient_accumulation_steps", Some(t.gradient_accumulation_steps as u64));
        report.at_least_one("train.threads", t.threads.map(|n| n as u64));
        if let (StepCount::Steps(warmup), Some(steps)) = (t.lr_warmup_steps, t.max_train_steps) {
            report.require(
                warmup < steps || warmup == 0,
                &["train.lr_warmup_steps", keys[0]],
                format!(
                    "train.lr_warmup_steps = {warmup} leaves nothing of train.max_train_steps = {steps}: the rate would never be reached"
                ),
                "lower train.lr_warmup_steps; optimizer steps are counted, not micro-batches or processes",
            );
        }
    }

    fn check_parts(&self, report: &mut Report) {
        let (t, n) = (&self.train, &self.network);
        report.require(
            n.train_unet || n.train_text_encoder,
            &["network.train_unet", "network.train_text_encoder"],
            "network.train_unet = false and network.train_text_encoder = false leave nothing to train",
            "set one of them to true",
        );
        report.not_negative("train.unet_lr", Some(t.unet_lr));
        let rates = t.text_encoder_lr;
        report.not_negative("train.text_encoder_lr", Some(rates.te1.min(rates.te2)));
        for (part, lr, on, zero) in [
            ("network.train_unet", "train.unet_lr", n.train_unet, t.unet_lr == 0.0),
            ("network.train_text_encoder", "train.text_encoder_lr", n.train_text_encoder, rates.te1 == 0.0 && rates.te2 == 0.0),
        ] {
            let what = format!("{lr} = 0 with {part} = true would train a part that cannot move");
            report.require(!(on && zero), &[lr, part], what, format!("set {part} = false, or give a rate"));
        }
        report.require(
            matches!(t.max_token_length, 75 | 150 | 225),
            &["train.max_token_length"],
            format!("train.max_token_length = {} is not a whole number of 75-token rows", t.max_token_length),
            "use 75, 150 or 225",
        );
    }

    fn check_precision(&self, report: &mut Report) {
        let t = &self.train;
        let (precision, scale) = (("train.mixed_precision", &t.mixed_precision), ("train.initial_loss_scale", &t.initial_loss_scale));
        report.require(
            (1.0..=f64::from(f32::MAX)).contains(&t.initial_loss_scale),
            &[scale.0],
            format!("train.initial_loss_scale = {} must be 1 or more", written(scale.1)),
            "use 65536, or less if the first steps of your runs are skipped",
        );
        report.no_effect(
            t.mixed_precision == MixedPrecision::Fp16 || t.initial_loss_scale == TrainConfig::default().initial_loss_scale,
            scale,
            precision,
            "remove it, or set train.mixed_precision = \"fp16\"",
        );
        report.no_effect(
            t.compute == Compute::Float || t.mixed_precision == MixedPrecision::No,
            ("train.compute", &t.compute),
            precision,
            "remove one of them: train.mixed_precision for a GPU, train.compute for a CPU",
        );
        report.require(
            t.compute == Compute::Float || t.device != DeviceChoice::Cuda,
            &["train.compute", "train.device"],
            "train.compute = \"bf16\" is of the CPU, train.device = \"cuda\" is not",
            "set train.mixed_precision = \"bf16\" in place of train.compute",
        );
        let auto = self.model.weight_dtype == WeightDtype::Auto;
        report.require(
            auto || !t.fp8_base,
            &["model.weight_dtype", "train.fp8_base"],
            format!("model.weight_dtype = {} and train.fp8_base = true both say how weights are kept", written(&self.model.weight_dtype)),
            "remove one of them",
        );
        report.require(
            !(t.fp8_base && t.fp8_base_unet),
            &["train.fp8_base", "train.fp8_base_unet"],
            "train.fp8_base = true keeps the text encoders in 8 bits, train.fp8_base_unet = true does not",
            "remove one of them: train.fp8_base_unet for all parts in 8 bits, train.fp8_base for the UNet alone",
        );
    }

    fn check_network(&self, report: &mut Report) {
        let n = &self.network;
        let full = ("network.full_matrix", &n.full_matrix);
        let way_out = "set network.full_matrix = false, or remove the other key";
        report.no_effect(!(n.full_matrix && n.decompose_both), ("network.decompose_both", &n.decompose_both), full, way_out);
        report.no_effect(!(n.full_matrix && n.use_tucker), ("network.use_tucker", &n.use_tucker), full, way_out);
        report.require(
            n.factor == -1 || n.factor > 0,
            &["network.factor"],
            format!("network.factor = {} is no size", n.factor),
            "use 1 or more, or -1 for factors as square as possible",
        );
        report.require(
            n.dim > 0 || n.conv_dim.is_some_and(|d| d > 0),
            &["network.dim", "network.conv_dim"],
            "network.dim = 0 and network.conv_dim = 0 leave every layer out",
            "set one of them to 1 or more",
        );
        report.not_negative("network.alpha", Some(n.alpha));
        report.not_negative("network.conv_alpha", n.conv_alpha);
        report.require(!n.preset.trim().is_empty(), &["network.preset"], "network.preset is empty", "use \"full\", or remove it");
    }

    fn check_optimizer(&self, report: &mut Report) {
        use ScheduleKind::{Constant, CosineWithMinLr, CosineWithRestarts, InverseSqrt, Polynomial};
        let t = &self.train;
        let schedule = ("train.lr_scheduler", &t.lr_scheduler);
        report.require(
            t.lr_scheduler != Constant || t.lr_warmup_steps == StepCount::Steps(0),
            &["train.lr_scheduler", "train.lr_warmup_steps"],
            format!("train.lr_warmup_steps = {} with train.lr_scheduler = \"constant\", which has no warmup", written(&t.lr_warmup_steps)),
            "set train.lr_scheduler = \"constant_with_warmup\", or remove train.lr_warmup_steps",
        );
        let unused = "remove it, or set train.lr_scheduler to";
        let used = |kinds: &[ScheduleKind]| kinds.contains(&t.lr_scheduler);
        let (cycles, power, ratio, unit) =
            (t.lr_scheduler_num_cycles, t.lr_scheduler_power, t.lr_scheduler_min_lr_ratio, t.lr_scheduler_timescale);
        let fine = cycles.is_none() || used(&[CosineWithRestarts, CosineWithMinLr]);
        report.no_effect(fine, ("train.lr_scheduler_num_cycles", &cycles), schedule, &format!("{unused} \"cosine_with_restarts\""));
        let fine = power.is_none() || used(&[Polynomial]);
        report.no_effect(fine, ("train.lr_scheduler_power", &power), schedule, &format!("{unused} \"polynomial\""));
        let fine = ratio.is_none() || used(&[CosineWithMinLr]);
        report.no_effect(fine, ("train.lr_scheduler_min_lr_ratio", &ratio), schedule, &format!("{unused} \"cosine_with_min_lr\""));
        let fine = unit.is_none() || used(&[InverseSqrt]);
        report.no_effect(fine, ("train.lr_scheduler_timescale", &unit), schedule, &format!("{unused} \"inverse_sqrt\""));
        for error in [self.hyper().check().err(), self.lr_schedule(1, t.unet_lr).err()].into_iter().flatten() {
            if let optim::Error::Range { key, value, wants } = error {
                // `polynomial` ends at a fixed rate; its `learning_rate` is the part's rate here.
                let key = if key == "learning_rate" { "train.unet_lr".to_owned() } else { format!("train.{key}") };
                report.require(false, &[&key], format!("{key} = {value} must be {wants}"), format!("change {key}"));
            }
        }
        report.not_negative("train.max_grad_norm", Some(t.max_grad_norm));
    }

    fn check_loss(&self, report: &mut Report) {
        let (t, m) = (&self.train, &self.model);
        let v = ("model.v_parameterization", &m.v_parameterization);
        report.no_effect(
            !t.scale_v_pred_loss_like_noise_pred || m.v_parameterization,
            ("train.scale_v_pred_loss_like_noise_pred", &t.scale_v_pred_loss_like_noise_pred),
            v,
            "remove it, or set model.v_parameterization = true if the base model predicts v",
        );
        let fine = t.v_pred_like_loss.is_none() || !m.v_parameterization;
        report.no_effect(fine, ("train.v_pred_like_loss", &t.v_pred_like_loss), v, "remove train.v_pred_like_loss");
        report.require(
            !m.zero_terminal_snr || m.v_parameterization || t.compat.is_some(),
            &["model.zero_terminal_snr", "model.v_parameterization"],
            "model.zero_terminal_snr = true with model.v_parameterization = false: at the last timestep the input is the answer",
            "set model.v_parameterization = true if the base model predicts v, or model.zero_terminal_snr = false",
        );
        let robust = matches!(t.loss_type, LossType::Huber | LossType::SmoothL1);
        let loss = ("train.loss_type", &t.loss_type);
        let way_out = "remove it, or set train.loss_type = \"huber\" or \"smooth_l1\"";
        report.no_effect(robust || t.huber_schedule.is_none(), ("train.huber_schedule", &t.huber_schedule), loss, way_out);
        report.no_effect(robust || t.huber_c.is_none(), ("train.huber_c", &t.huber_c), loss, way_out);
        report.no_effect(robust || t.huber_scale.is_none(), ("train.huber_scale", &t.huber_scale), loss, way_out);
        for (key, value) in [("train.min_snr_gamma", t.min_snr_gamma), ("train.huber_c", t.huber_c), ("train.huber_scale", t.huber_scale)] {
            let what = format!("{key} = {} must be above 0", written(&value));
            report.require(value.is_none_or(|v| v > 0.0), &[key], what, format!("change or remove {key}"));
        }
        report.require(
            t.min_timestep < t.max_timestep && t.max_timestep <= 1000,
            &["train.min_timestep", "train.max_timestep"],
            format!("train.min_timestep = {} and train.max_timestep = {} leave no timestep in 0..1000", t.min_timestep, t.max_timestep),
            "use train.min_timestep < train.max_timestep <= 1000",
        );
    }

    fn check_noise(&self, report: &mut Report) {
        let t = &self.train;
        let offset = ("train.noise_offset", &t.noise_offset);
        let on = t.noise_offset.is_some_and(|o| o != 0.0);
        let give = "give train.noise_offset a value, or remove the other key";
        report.no_effect(on || t.adaptive_noise_scale.is_none(), ("train.adaptive_noise_scale", &t.adaptive_noise_scale), offset, give);
        let random = ("train.noise_offset_random_strength", &t.noise_offset_random_strength);
        report.no_effect(on || !t.noise_offset_random_strength, random, offset, give);
        let multires = t.multires_noise_iterations.is_some_and(|n| n > 0);
        report.no_effect(
            multires || t.multires_noise_discount.is_none(),
            ("train.multires_noise_discount", &t.multires_noise_discount),
            ("train.multires_noise_iterations", &t.multires_noise_iterations),
            "give train.multires_noise_iterations a value, or remove the other key",
        );
        report.no_effect(
            t.ip_noise_gamma.is_some_and(|g| g != 0.0) || !t.ip_noise_gamma_random_strength,
            ("train.ip_noise_gamma_random_strength", &t.ip_noise_gamma_random_strength),
            ("train.ip_noise_gamma", &t.ip_noise_gamma),
            "give train.ip_noise_gamma a value, or remove the other key",
        );
        report.not_negative("train.noise_offset", t.noise_offset);
        report.not_negative("train.multires_noise_discount", t.multires_noise_discount);
        report.not_negative("train.ip_noise_gamma", t.ip_noise_gamma);
    }

    fn check_dataset(&self, report: &mut Report) {
        report.at_least_one("dataset.vae_batch_size", Some(self.cache.vae_batch_size as u64));
        let cacheable = || if self.cache.cache_latents { self.dataset.check_cacheable() } else { Ok(()) };
        for error in [self.dataset.check(), cacheable()].into_iter().filter_map(Result::err) {
            match error {
                // `subsets[0].image_dir ...`: the key is the first word.
                dataset::Error::Config { what, way_out } => {
                    let key = what.split([' ', '=']).next().unwrap_or_default();
                    let key = if key.starts_with(|c: char| c.is_ascii_lowercase()) { format!("dataset.{key}") } else { "dataset".into() };
                    report.require(false, &[&key], format!("[dataset]: {what}"), way_out);
                }
                other => report.require(false, &["dataset"], other.to_string(), "see [dataset]"),
            }
        }
    }

    fn check_output(&self, report: &mut Report) {
        let o = &self.output;
        report.at_least_one("output.save_every_n_steps", o.save_every_n_steps);
        report.at_least_one("output.keep_last", Some(o.keep_last));
        report.require(
            !o.name.is_empty() && !o.name.contains(['/', '\\']) && o.name != "." && o.name != "..",
            &["output.name"],
            format!("output.name = \"{}\" is no file name", o.name),
            "use a name without slashes; folders belong in output.dir",
        );
    }

    fn check_sample(&self, report: &mut Report) {
        let s = &self.sample;
        report.at_least_one("sample.sample_every_n_steps", s.sample_every_n_steps);
        let cadence = if s.sample_at_first { "sample.sample_at_first" } else { "sample.sample_every_n_steps" };
        report.require(
            !s.prompts.is_empty() || (s.sample_every_n_steps.is_none() && !s.sample_at_first),
            &[cadence, "sample.prompts"],
            format!("{cadence} is set, but sample.prompts is empty"),
            format!("add sample.prompts = [\"...\"], or remove {cadence}"),
        );
        let own = PromptConfig {
            prompt: "all".into(),
            width: Some(s.width),
            height: Some(s.height),
            steps: Some(s.steps),
            guidance_scale: Some(s.guidance_scale),
            ..Default::default()
        };
        let prompts = s.prompts.iter().enumerate().map(|(i, p)| (format!("sample.prompts[{i}]"), p));
        for (place, p) in std::iter::once(("sample".to_owned(), &own)).chain(prompts) {
            report.require(
                !p.prompt.trim().is_empty(),
                &[&place],
                format!("{place}.prompt is empty"),
                "write a prompt, or remove the entry",
            );
            for (side, pixels) in [("width", p.width), ("height", p.height)] {
                let key = format!("{place}.{side}");
                let fine = pixels.is_none_or(|n| n >= 64 && n.is_multiple_of(8));
                let what = format!("{key} = {} is not a multiple of 8 from 64 on", written(&pixels));
                report.require(fine, &[&key], what, format!("use {}", pixels.map_or(64, |n| (n / 8 * 8).max(64))));
            }
            let key = format!("{place}.steps");
            let fine = p.steps.is_none_or(|n| (1..=998).contains(&n));
            report.require(fine, &[&key], format!("{key} = {} is outside of 1 to 998", written(&p.steps)), "20 to 40 are usual");
            report.not_negative(&format!("{place}.guidance_scale"), p.guidance_scale);
        }
    }

    fn check_validation(&self, report: &mut Report) {
        let v = &self.validation;
        report.at_least_one("validation.every_n_steps", v.every_n_steps);
        let keys = ["validation.image_dir", "validation.every_n_steps"];
        let way_out = "set both, or neither";
        match (&v.image_dir, v.every_n_steps) {
            (None, Some(n)) => report.require(false, &keys, format!("{} = {n} without {}", keys[1], keys[0]), way_out),
            (Some(dir), None) => report.require(false, &keys, format!("{} = {} without {}", keys[0], written(dir), keys[1]), way_out),
            _ => (),
        }
        report.require(
            !v.timesteps.is_empty() && v.timesteps.iter().all(|t| *t < 1000),
            &["validation.timesteps"],
            format!("validation.timesteps = {} must name timesteps below 1000", written(&v.timesteps)),
            "use [200, 400, 600, 800]",
        );
    }
}
