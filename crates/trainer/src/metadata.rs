//! The `ss_*` and `modelspec.*` metadata of a written adapter, as sd-scripts writes them (`train_network.py`,
//! `library/train_util.py`, `library/sai_model_spec.py`), so that every site and tool that reads those shows our files too.
//!
//! All values are texts made as Python's `str()` makes them: `None`, `True`, `2e-05`, `(1024, 1024)`; tables are JSON as
//! `json.dumps` writes it. Two values are not imitated: `ss_optimizer` names our optimizer, not a Python class of
//! bitsandbytes, and `ss_sd_scripts_commit_hash` is left out, since no such commit wrote the file.

mod python;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;

use sdxl::GradientCheckpointing;
use serde_json::{Map, Value, json};

use self::python::{Python, dumps};
use crate::config::{RunConfig, Setting};

/// Hashes of a model file, as sd-scripts computes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelHashes {
    /// First 8 hex digits of the SHA-256 of bytes 0x100000..0x110000 of the file.
    pub short: String,
    /// SHA-256 of the whole file in hex.
    pub whole: String,
}

/// What one subset of the dataset turned out to hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SubsetFacts {
    /// Number of pictures, without repeats.
    pub img_count: u64,
    /// How often each tag occurs in its captions.
    pub tag_frequency: BTreeMap<String, u64>,
}

/// What only the run knows; the rest of the metadata comes from the recipe.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunFacts {
    /// A random number that names the run.
    pub session_id: u64,
    /// Unix time of the start, in seconds.
    pub started_at: f64,
    /// Unix time of this save, in seconds.
    pub finished_at: f64,
    /// This save's local time as `2024-05-19T01:30:25`.
    pub date: String,
    /// Optimizer steps behind this save.
    pub steps: u64,
    /// Epoch of this save: counted from 1 at the end of an epoch, from 0 inside one.
    pub epoch: u64,
    /// Pictures in an epoch, repeats counted.
    pub num_train_images: u64,
    /// Held-out pictures.
    pub num_validation_images: u64,
    /// Batches in an epoch, over all processes.
    pub num_batches_per_epoch: u64,
    /// Epochs of the whole run.
    pub num_epochs: u64,
    /// Optimizer steps of the whole run.
    pub max_train_steps: u64,
    /// Hashes of the base model, where it is a file.
    pub model: Option<ModelHashes>,
    /// Hashes of the VAE, where the recipe gives a file.
    pub vae: Option<ModelHashes>,
    /// One entry per subset of the recipe, in order.
    pub subsets: Vec<SubsetFacts>,
    /// Width, height and number of pictures (repeats counted) of each bucket in use.
    pub buckets: Vec<(u32, u32, u64)>,
    /// Mean difference between a picture's aspect ratio and its bucket's.
    pub mean_img_ar_error: f64,
}

/// Last part of a path, as `os.path.basename` gives it.
fn basename(path: &Path) -> String {
    path.file_name().map_or_else(|| path.to_string_lossy().into_owned(), |n| n.to_string_lossy().into_owned())
}

/// Keys that stay with `no_metadata` (besides `modelspec.*`).
const MINIMUM: [&str; 6] = ["ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"];

/// The metadata of an adapter that this run writes now.
pub fn metadata(config: &RunConfig, facts: &RunFacts) -> BTreeMap<String, String> {
    let mut map = BTreeMap::new();
    run(config, facts, &mut map);
    training(config, &mut map);
    model(config, facts, &mut map);
    data(config, facts, &mut map);
    if config.output.no_metadata {
        map.retain(|key, _| MINIMUM.contains(&key.as_str()));
    }
    modelspec(config, facts, &mut map);
    map
}

type Metadata = BTreeMap<String, String>;

fn put(map: &mut Metadata, key: &str, value: impl Python) {
    map.insert(key.to_owned(), value.py());
}

fn run(config: &RunConfig, facts: &RunFacts, map: &mut Metadata) {
    let t = &config.train;
    put(map, "ss_session_id", facts.session_id);
    put(map, "ss_training_started_at", facts.started_at);
    put(map, "ss_training_finished_at", facts.finished_at);
    put(map, "ss_output_name", &config.output.name);
    put(map, "ss_training_comment", config.output.training_comment.as_deref());
    put(map, "ss_seed", t.seed);
    put(map, "ss_steps", facts.steps);
    put(map, "ss_epoch", facts.epoch);
    put(map, "ss_lowram", false);
    put(map, "ss_num_train_images", facts.num_train_images);
    put(map, "ss_num_validation_images", facts.num_validation_images);
    put(map, "ss_num_reg_images", 0u32);
    put(map, "ss_num_batches_per_epoch", facts.num_batches_per_epoch);
    put(map, "ss_num_epochs", facts.num_epochs);
    put(map, "ss_max_train_steps", facts.max_train_steps);
    put(map, "ss_gradient_accumulation_steps", t.gradient_accumulation_steps);
    put(map, "ss_gradient_checkpointing", t.gradient_checkpointing != GradientCheckpointing::None);
}

fn training(config: &RunConfig, map: &mut Metadata) {
    let (t, n, v) = (&config.train, &config.network, &config.validation);
    let (noise, loss, hyper) = (config.noise(), config.loss(), config.hyper());
    // One rate for both encoders is a number there as well; two are a Python list.
    let rates = t.text_encoder_lr;
    let te_lr = if rates.te1 == rates.te2 { rates.te1.py() } else { format!("[{}, {}]", rates.te1.py(), rates.te2.py()) };
    put(map, "ss_learning_rate", t.unet_lr);
    put(map, "ss_unet_lr", n.train_unet.then_some(t.unet_lr));
    put(map, "ss_text_encoder_lr", n.train_text_encoder.then_some(te_lr));
    put(map, "ss_lr_warmup_steps", t.lr_warmup_steps.write().map(|v| v.as_float().map_or_else(|| v.to_string(), |r| r.py())));
    put(map, "ss_lr_scheduler", t.lr_scheduler.name());
    let (b1, b2) = hyper.betas;
    let optimizer = format!("lokr.{}(weight_decay={},betas=({}, {}))", t.optimizer.name(), hyper.weight_decay.py(), b1.py(), b2.py());
    put(map, "ss_optimizer", optimizer);
    put(map, "ss_max_grad_norm", t.max_grad_norm);
    put(map, "ss_network_module", "lycoris.kohya");
    put(map, "ss_network_dim", n.dim);
    put(map, "ss_network_alpha", n.alpha);
    put(map, "ss_network_dropout", None::<f64>);
    put(map, "ss_network_args", dumps(&network_args(config)));
    put(map, "ss_scale_weight_norms", None::<f64>);
    put(map, "ss_mixed_precision", t.mixed_precision.name());
    put(map, "ss_full_fp16", false);
    put(map, "ss_fp8_base", t.fp8_base);
    put(map, "ss_fp8_base_unet", t.fp8_base_unet);

    put(map, "ss_noise_offset", t.noise_offset);
    put(map, "ss_noise_offset_random_strength", noise.noise_offset_random_strength);
    put(map, "ss_multires_noise_iterations", t.multires_noise_iterations);
    put(map, "ss_multires_noise_discount", noise.multires_noise_discount);
    put(map, "ss_adaptive_noise_scale", t.adaptive_noise_scale);
    put(map, "ss_ip_noise_gamma", t.ip_noise_gamma);
    put(map, "ss_ip_noise_gamma_random_strength", noise.ip_noise_gamma_random_strength);
    put(map, "ss_zero_terminal_snr", config.model.zero_terminal_snr);
    put(map, "ss_min_snr_gamma", t.min_snr_gamma);
    put(map, "ss_debiased_estimation", t.debiased_estimation_loss);
    put(map, "ss_loss_type", loss.loss_type.name());
    put(map, "ss_huber_schedule", loss.huber_schedule.name());
    put(map, "ss_huber_scale", loss.huber_scale);
    put(map, "ss_huber_c", loss.huber_c);
    put(map, "ss_prior_loss_weight", 1.0);

    put(map, "ss_validation_seed", v.image_dir.is_some().then_some(v.seed));
    put(map, "ss_validation_split", 0.0);
    put(map, "ss_max_validation_steps", None::<u64>);
    put(map, "ss_validate_every_n_epochs", None::<u64>);
    put(map, "ss_validate_every_n_steps", v.every_n_steps);
}

/// The `network_args` with which sd-scripts would build the same network: texts, as its command line gives them.
fn network_args(config: &RunConfig) -> Value {
    let n = &config.network;
    let mut args = Map::new();
    let mut arg = |key: &str, value: String| _ = args.insert(key.to_owned(), Value::String(value));
    arg("algo", "lokr".into());
    arg("preset", n.preset.clone());
    arg("factor", n.factor.py());
    arg("conv_dim", n.conv_dim.unwrap_or(n.dim).py());
    arg("conv_alpha", n.conv_alpha.unwrap_or(n.alpha).py());
    // Only those that are on: LyCORIS takes any text for `decompose_both`, "False" too, as true.
    for (key, on) in [
        ("full_matrix", n.full_matrix),
        ("decompose_both", n.decompose_both),
        ("use_tucker", n.use_tucker),
        ("use_scalar", n.use_scalar),
        ("rs_lora", n.rs_lora),
        ("unbalanced_factorization", n.unbalanced_factorization),
        ("train_norm", n.train_norm),
    ] {
        if on {
            arg(key, on.py());
        }
    }
    args.insert("dropout".into(), Value::Null);
    Value::Object(args)
}

fn model(config: &RunConfig, facts: &RunFacts, map: &mut Metadata) {
    put(map, "ss_v2", false);
    put(map, "ss_base_model_version", "sdxl_base_v1-0");
    put(map, "ss_clip_skip", None::<u32>);
    // 75 tokens are the absence of the option there.
    put(map, "ss_max_token_length", Some(config.train.max_token_length).filter(|n| *n != 75));
    put(map, "ss_sd_model_name", basename(&config.model.base));
    if let Some(hashes) = &facts.model {
        put(map, "ss_sd_model_hash", &hashes.short);
        put(map, "ss_new_sd_model_hash", &hashes.whole);
    }
    if let Some(vae) = &config.model.vae {
        put(map, "ss_vae_name", basename(vae));
    }
    if let Some(hashes) = &facts.vae {
        put(map, "ss_vae_hash", &hashes.short);
        put(map, "ss_new_vae_hash", &hashes.whole);
    }
}

fn data(config: &RunConfig, facts: &RunFacts, map: &mut Metadata) {
    let d = &config.dataset;
    // Rates are one value for the run there, per subset here: the value if all subsets agree.
    let common = |of: fn(&dataset::SubsetConfig) -> f64| {
        let mut values = d.subsets.iter().map(of);
        values.next().filter(|first| values.all(|v| v == *first))
    };
    put(map, "ss_caption_dropout_rate", common(|s| s.caption_dropout_rate));
    put(map, "ss_caption_tag_dropout_rate", common(|s| s.caption_tag_dropout_rate));
    put(map, "ss_caption_dropout_every_n_epochs", common(|s| s.caption_dropout_every_n_epochs as f64).map(|n| n as u64));
    put(map, "ss_cache_latents", config.cache.cache_latents);
    put(map, "ss_face_crop_aug_range", None::<f64>);
    let interpolation = d.resize_interpolation.and_then(|i| serde_json::to_value(i).ok());
    put(map, "ss_resize_interpolation", interpolation.as_ref().and_then(Value::as_str));

    let (mut dirs, mut frequency, mut subsets) = (Map::new(), Map::new(), Vec::new());
    for (subset, found) in d.subsets.iter().zip(&facts.subsets) {
        let dir = basename(&subset.image_dir);
        let mut name = dir.clone();
        for i in 2.. {
            if !dirs.contains_key(&name) {
                break;
            }
            name = format!("{dir} ({i})");
        }
        dirs.insert(name.clone(), json!({ "n_repeats": subset.num_repeats, "img_count": found.img_count }));
        frequency.insert(name, json!(found.tag_frequency));
        subsets.push(json!({
            "img_count": found.img_count,
            "num_repeats": subset.num_repeats,
            "color_aug": false,
            "flip_aug": subset.flip_aug,
            "random_crop": subset.random_crop,
            "shuffle_caption": subset.shuffle_caption,
            "keep_tokens": subset.keep_tokens,
            "keep_tokens_separator": subset.keep_tokens_separator,
            "secondary_separator": subset.secondary_separator,
            "enable_wildcard": subset.enable_wildcard,
            "caption_prefix": subset.caption_prefix,
            "caption_suffix": subset.caption_suffix,
            "resize_interpolation": interpolation,
            "image_dir": dir,
            "class_tokens": subset.class_tokens,
            "is_reg": false,
        }));
    }
    let buckets: Vec<Value> = facts.buckets.iter().map(|(w, h, n)| json!({ "resolution": [w, h], "count": n })).collect();
    let buckets: Map<String, Value> = buckets.into_iter().enumerate().map(|(i, b)| (i.to_string(), b)).collect();
    let datasets = json!([{
        "is_dreambooth": true,
        "batch_size_per_device": config.train.batch_size,
        "num_train_images": facts.num_train_images,
        "num_reg_images": 0,
        "resolution": [d.resolution.0, d.resolution.1],
        "enable_bucket": d.enable_bucket,
        "min_bucket_reso": d.min_bucket_reso,
        "max_bucket_reso": d.max_bucket_reso,
        "tag_frequency": frequency,
        "bucket_info": { "buckets": buckets, "mean_img_ar_error": facts.mean_img_ar_error },
        "resize_interpolation": interpolation,
        "subsets": subsets,
    }]);
    put(map, "ss_datasets", dumps(&datasets));
    put(map, "ss_tag_frequency", dumps(&Value::Object(frequency)));
    put(map, "ss_dataset_dirs", dumps(&Value::Object(dirs)));
}

/// Stability AI's ModelSpec 1.0.1.
fn modelspec(config: &RunConfig, facts: &RunFacts, map: &mut Metadata) {
    let (o, t) = (&config.output, &config.train);
    let (w, h) = config.dataset.resolution;
    put(map, "modelspec.sai_model_spec", "1.0.1");
    put(map, "modelspec.architecture", "stable-diffusion-xl-v1-base/lora");
    put(map, "modelspec.implementation", "https://github.com/Stability-AI/generative-models");
    put(map, "modelspec.implementation_version", format!("lokr/{}", env!("CARGO_PKG_VERSION")));
    put(map, "modelspec.title", o.metadata_title.as_ref().unwrap_or(&o.name));
    put(map, "modelspec.resolution", format!("{w}x{h}"));
    put(map, "modelspec.date", &facts.date);
    put(map, "modelspec.prediction_type", config.prediction().name());
    if (t.min_timestep, t.max_timestep) != (0, 1000) {
        put(map, "modelspec.timestep_range", format!("{},{}", t.min_timestep, t.max_timestep));
    }
    for (key, value) in [
        ("author", &o.metadata_author),
        ("description", &o.metadata_description),
        ("license", &o.metadata_license),
        ("tags", &o.metadata_tags),
        ("trigger_phrase", &o.metadata_trigger_phrase),
        ("usage_hint", &o.metadata_usage_hint),
    ] {
        if let Some(value) = value {
            put(map, &format!("modelspec.{key}"), value);
        }
    }
}
