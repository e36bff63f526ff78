//! The JSON files of a diffusers folder, derived from the tensors' shapes and [`HeadDims`]: what
//! stabilityai/stable-diffusion-xl-base-1.0 has in its own, with a model's own numbers. A base that is a folder keeps the
//! configs that it came with.

use serde_json::{Value, json};

use super::{Checkpoint, HeadDims, Part};
use crate::config::{ClipConfig, UNetConfig, VaeConfig};
use crate::error::{Error, Result};

/// Marks a folder as written by an export, which a later one may replace.
pub(super) const EXPORT_MARK: &str = "_lokr_export";

/// The part's config.json.
pub(super) fn part_config(checkpoint: &Checkpoint, part: Part) -> Result<Value> {
    if let Some(config) = checkpoint.diffusers_config(part) {
        return Ok(config.clone());
    }
    let dims = checkpoint.head_dims()?;
    match part {
        Part::Unet => unet(checkpoint, dims),
        Part::TextEncoder1 | Part::TextEncoder2 => text_encoder(checkpoint, part, dims),
        Part::Vae => vae(checkpoint, dims),
    }
}

/// model_index.json.
pub(super) fn model_index() -> Value {
    json!({
        "_class_name": "StableDiffusionXLPipeline",
        EXPORT_MARK: true,
        "force_zeros_for_empty_prompt": true,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })
}

/// scheduler_config.json; `v` for a model that predicts velocity. Those trained for zero terminal SNR say so by the marker
/// tensor `ztsnr`.
pub(super) fn scheduler(checkpoint: &Checkpoint, v: bool) -> Value {
    if let Some(config) = checkpoint.scheduler_config() {
        return config.clone();
    }
    let zero_snr = checkpoint.asides.contains_key("ztsnr");
    json!({
        "_class_name": "EulerDiscreteScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": if v { "v_prediction" } else { "epsilon" },
        "rescale_betas_zero_snr": zero_snr,
        "steps_offset": 1,
        "timestep_spacing": if zero_snr { "trailing" } else { "leading" },
        "trained_betas": null,
        "use_karras_sigmas": false,
    })
}

/// How many numbered modules a part has under `prefix` (which ends in a dot).
fn count(checkpoint: &Checkpoint, prefix: &str) -> usize {
    let number = |name: &str| name.strip_prefix(prefix)?.split('.').next()?.parse::<usize>().ok();
    checkpoint.names(Part::Unet).filter_map(number).max().map_or(0, |last| last + 1)
}

/// Refuses what a diffusers config cannot say: transformers of several depths in one level, or a middle one that is not as
/// deep as the last level's.
fn check_depths(checkpoint: &Checkpoint, config: &UNetConfig) -> Result<()> {
    let depth = |block: String| count(checkpoint, &format!("{block}.1.transformer_blocks."));
    let refuse = |what: String| Err(Error::NotInDiffusers { path: checkpoint.path.clone(), what });
    let (levels, mid) = (config.transformer_depth.len(), config.mid_depth);
    if levels != 3 || config.layers_per_block != 2 {
        return refuse(format!("{levels} levels of {} ResNets, where SDXL has 3 of 2", config.layers_per_block));
    }
    for (level, &first) in config.transformer_depth.iter().enumerate() {
        let down = (1..3).map(|j| depth(format!("input_blocks.{}", 3 * level + j)));
        let up = (0..3).map(|j| depth(format!("output_blocks.{}", 3 * (2 - level) + j)));
        let depths: Vec<usize> = down.chain(up).collect();
        if depths.iter().any(|&depth| depth != first) {
            return refuse(format!("the transformers of level {level} have the depths {depths:?}, not one"));
        }
    }
    match config.transformer_depth.last() {
        Some(&last) if last != mid => refuse(format!("the middle transformer has depth {mid}, those of the last level {last}")),
        _ => Ok(()),
    }
}

fn unet(checkpoint: &Checkpoint, dims: HeadDims) -> Result<Value> {
    let config = UNetConfig::of_checkpoint(checkpoint, dims)?;
    check_depths(checkpoint, &config)?;
    let pooled = ClipConfig::of_checkpoint(checkpoint, Part::TextEncoder2, dims)?.projection.unwrap_or_default();
    let depths = &config.transformer_depth;
    let kinds = |plain: &str, crossed: &str| depths.iter().map(|&d| if d == 0 { plain } else { crossed }.to_owned()).collect::<Vec<_>>();
    let mut up = kinds("UpBlock2D", "CrossAttnUpBlock2D");
    up.reverse();
    Ok(json!({
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        // Six size values, each embedded alike, follow the pooled text.
        "addition_time_embed_dim": config.adm_dim.saturating_sub(pooled) / 6,
        // By an old mistake that diffusers keeps, this is the number of heads.
        "attention_head_dim": config.block_out_channels.iter().map(|width| width / config.head_dim).collect::<Vec<_>>(),
        "block_out_channels": config.block_out_channels,
        "center_input_sample": false,
        "cross_attention_dim": config.context_dim,
        "down_block_types": kinds("DownBlock2D", "CrossAttnDownBlock2D"),
        "downsample_padding": 1,
        "flip_sin_to_cos": true,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "projection_class_embeddings_input_dim": config.adm_dim,
        "sample_size": 128,
        "transformer_layers_per_block": depths.iter().map(|&depth| depth.max(1)).collect::<Vec<_>>(),
        "up_block_types": up,
        "use_linear_projection": true,
    }))
}

fn text_encoder(checkpoint: &Checkpoint, part: Part, dims: HeadDims) -> Result<Value> {
    let first = part == Part::TextEncoder1;
    let config = ClipConfig::of_checkpoint(checkpoint, part, dims)?;
    Ok(json!({
        "architectures": [if first { "CLIPTextModel" } else { "CLIPTextModelWithProjection" }],
        "attention_dropout": 0.0,
        // As in SDXL's own files: with these, transformers takes the pooled output at the largest id, which is EOS.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "dropout": 0.0,
        "hidden_act": if first { "quick_gelu" } else { "gelu" },
        "hidden_size": config.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config.ff,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": config.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "projection_dim": config.projection.unwrap_or(config.width),
        "vocab_size": config.vocabulary,
    }))
}

fn vae(checkpoint: &Checkpoint, dims: HeadDims) -> Result<Value> {
    let config = VaeConfig::of_checkpoint(checkpoint, dims)?;
    let levels = config.block_out_channels.len();
    Ok(json!({
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": config.block_out_channels,
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        // Nothing in the tensors tells a VAE that overflows in f16 (SDXL's own) from one that does not.
        "force_upcast": true,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
    }))
}
