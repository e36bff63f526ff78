//! What can run but is probably not meant, or has a price that is easily overlooked: told at the start, never an error.

use optim::OptimizerKind;

use super::RunConfig;
use super::error::Problem;
use super::read::written;
use super::sections::NetworkConfig;

/// Above this, a rate is rarely meant. Lion moves every weight by the whole rate at each step, whatever the gradient (Chen
/// et al. 2023 advise a third to a tenth of AdamW's).
fn high_rate(optimizer: OptimizerKind) -> f64 {
    match optimizer {
        OptimizerKind::Lion | OptimizerKind::Lion8bit => 3e-4,
        OptimizerKind::AdamW => 5e-3,
    }
}

impl RunConfig {
    /// Everything that deserves a line at the start of the run.
    pub fn warnings(&self) -> Vec<Problem> {
        let (t, n, s) = (&self.train, &self.network, &self.sample);
        let mut found = Vec::new();
        let mut warn = |when: bool, keys: &[&str], what: String, way_out: &str| {
            if when {
                found.push(Problem { keys: keys.iter().map(|k| (*k).to_owned()).collect(), what, way_out: way_out.to_owned() });
            }
        };
        let limit = high_rate(t.optimizer);
        for (key, rate) in [("train.unet_lr", t.unet_lr), ("train.text_encoder_lr", t.text_encoder_lr.te1.max(t.text_encoder_lr.te2))] {
            let what = format!("{key} = {} is high for train.optimizer = {}", written(&rate), written(&t.optimizer));
            warn(rate > limit, &[key, "train.optimizer"], what, "losses that turn NaN early usually have this cause");
        }
        let alpha_given = n.alpha != NetworkConfig::default().alpha && n.alpha != n.dim as f64;
        let what = format!("network.alpha = {} has no effect with network.full_matrix = true", written(&n.alpha));
        warn(n.full_matrix && alpha_given && !n.rs_lora, &["network.alpha", "network.full_matrix"], what, "remove network.alpha");
        warn(
            n.full_matrix && n.rs_lora,
            &["network.rs_lora", "network.full_matrix"],
            "network.rs_lora = true with network.full_matrix = true scales by sqrt(network.dim), which other programs read as 1".into(),
            "set network.rs_lora = false",
        );
        for (key, on) in [("network.use_tucker", n.use_tucker), ("network.unbalanced_factorization", n.unbalanced_factorization)] {
            warn(on, &[key], format!("{key} = true makes a file that few programs can read"), "remove it, unless you know that yours can");
        }
        warn(
            t.min_snr_gamma.is_some() && t.debiased_estimation_loss,
            &["train.min_snr_gamma", "train.debiased_estimation_loss"],
            "train.min_snr_gamma and train.debiased_estimation_loss both weigh the loss, one after the other".into(),
            "use one of them",
        );
        warn(
            !s.prompts.is_empty() && s.sample_every_n_steps.is_none() && !s.sample_at_first,
            &["sample.prompts", "sample.sample_every_n_steps"],
            "sample.prompts are given, but neither sample.sample_every_n_steps nor sample.sample_at_first: no previews are made".into(),
            "set sample.sample_every_n_steps",
        );
        warn(
            self.output.save_every_n_steps.is_none() && t.max_train_steps.is_none_or(|n| n > 1000),
            &["output.save_every_n_steps"],
            format!(
                "output.save_every_n_steps is not set, train.max_train_steps = {}: a crash would cost the whole run",
                written(&t.max_train_steps)
            ),
            "set output.save_every_n_steps, to 500 for example",
        );
        found
    }
}
