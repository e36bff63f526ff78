//! The base model of a recipe, and the adapter on it.

use std::path::Path;

use candle_core::DType;
use lokr::{LokrNetwork, ParameterGroup, Preset, Trees};
use sdxl::Sdxl;
use sdxl::checkpoint::{Checkpoint, Part};

use crate::config::{ModelConfig, RunConfig, WeightDtype};
use crate::error::{Error, Result};
use crate::precision;

/// Opens the base model's files; the networks are built from them later.
///
/// # Errors
/// If a file cannot be read or is no SDXL model.
pub fn open_checkpoint(config: &ModelConfig, untransposed_projection: bool) -> Result<Checkpoint> {
    let mut checkpoint = Checkpoint::open(&config.base)?;
    if let Some(vae) = &config.vae {
        checkpoint = checkpoint.with_vae(vae)?;
    }
    checkpoint.untransposed_text_projection(untransposed_projection);
    let dims = config.head_dims(checkpoint.head_dims()?);
    Ok(checkpoint.with_head_dims(dims))
}

/// Builds the networks, their weights kept as the file has them.
///
/// # Errors
/// If a part has missing, misshapen or left-over tensors.
pub fn load_model(checkpoint: &Checkpoint) -> Result<Sdxl> {
    load_model_as(checkpoint, WeightDtype::Auto)
}

/// Builds the networks, their weights kept as `model.weight_dtype` says.
///
/// # Errors
/// If a part has missing, misshapen or left-over tensors.
pub fn load_model_as(checkpoint: &Checkpoint, dtype: WeightDtype) -> Result<Sdxl> {
    Ok(Sdxl::load(checkpoint, dtype.dtype())?)
}

/// Whether a run on the CPU leaves weights in the mapped file. What computes in half precision there would copy a mapped weight in every call.
pub fn maps_weights(config: &RunConfig) -> bool {
    !config.model.disable_mmap_load_safetensors && precision::compute_type(&config.train) == DType::F32
}

/// Builds the networks as a recipe trains them.
///
/// # Errors
/// If a part has missing, misshapen or left-over tensors.
pub fn load_for_training(config: &RunConfig, checkpoint: &Checkpoint) -> Result<Sdxl> {
    let compute = precision::compute_type(&config.train);
    let (text, unet) = precision::weight_types(config);
    let mut model = Sdxl::load_as(&checkpoint.clone().with_mapped_weights(maps_weights(config)), text, unet)?;
    model.compute_in(compute);
    Ok(model)
}

/// The base model's file that another program has changed since it was opened; one that was only touched is not, unless it is a separate
/// VAE's, of which no hash is known. Weights are read from the file as long as the run lasts: by every step where they are mapped, else by
/// exports and for the VAE.
///
/// # Errors
/// If the system does not say.
pub fn changed_file<'a>(checkpoint: &'a Checkpoint, sha256: &str) -> Result<Option<&'a Path>> {
    let Some(changed) = checkpoint.changed_file()? else { return Ok(None) };
    let of_vae = checkpoint.vae_path().is_some_and(|vae| changed.starts_with(vae));
    Ok((of_vae || checkpoint.hash()?.sha256 != sha256).then_some(changed))
}

/// The trees that a recipe adapts: a part with learning rate 0 is left out.
fn trees<'a>(config: &RunConfig, model: &'a Sdxl) -> Trees<'a> {
    let adapted = |group| learning_rate(config, group) > 0.0;
    Trees {
        te1: adapted(ParameterGroup::TextEncoder1).then_some(&model.te1.tree),
        te2: adapted(ParameterGroup::TextEncoder2).then_some(&model.te2.tree),
        unet: adapted(ParameterGroup::Unet).then_some(&model.unet.tree),
    }
}

/// All trees of a model.
pub fn all_trees(model: &Sdxl) -> Trees<'_> {
    Trees { te1: Some(&model.te1.tree), te2: Some(&model.te2.tree), unet: Some(&model.unet.tree) }
}

/// Base learning rate of a part; 0 where it is not trained.
pub fn learning_rate(config: &RunConfig, group: ParameterGroup) -> f64 {
    let (t, n) = (&config.train, &config.network);
    match group {
        ParameterGroup::Unet if n.train_unet => t.unet_lr,
        ParameterGroup::TextEncoder1 if n.train_text_encoder => t.text_encoder_lr.te1,
        ParameterGroup::TextEncoder2 if n.train_text_encoder => t.text_encoder_lr.te2,
        _ => 0.0,
    }
}

/// Makes the recipe's adapter on `model`, with the start values of `network.weights` if given.
///
/// # Errors
/// If the preset cannot be read or adapts nothing, or the start values do not fit.
pub fn create_network(config: &RunConfig, model: &Sdxl) -> Result<LokrNetwork> {
    let preset = Preset::load(&config.network.preset)?;
    let network = LokrNetwork::create(&config.adapter(preset), trees(config, model))?;
    if let Some(path) = &config.network.weights {
        start_from(&network, model, path)?;
    }
    Ok(network)
}

/// Copies the values of a LoKr file into the adapter; every tensor must have its counterpart.
fn start_from(network: &LokrNetwork, model: &Sdxl, path: &Path) -> Result<()> {
    let file = LokrNetwork::from_file(path, all_trees(model))?;
    let values: std::collections::HashMap<String, _> =
        file.parameters().into_iter().map(|(_, p)| (p.name().to_string(), p.tensor())).collect();
    file.detach();
    network.attach();
    let mut wrong = Vec::new();
    for (_, parameter) in network.parameters() {
        match values.get(parameter.name()) {
            Some(value) if value.dims() == parameter.tensor().dims() => parameter.set(value.clone())?,
            Some(value) => {
                wrong.push(format!("{}: {:?} in the file, {:?} here", parameter.name(), value.dims(), parameter.tensor().dims()))
            }
            None => wrong.push(format!("{}: not in the file", parameter.name())),
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let shown: Vec<String> = wrong.iter().take(10).map(|w| format!("\n  {w}")).collect();
    Err(Error::refused(
        format!(
            "network.weights = \"{}\" does not fit the adapter of the recipe, in {} tensors:{}",
            path.display(),
            wrong.len(),
            shown.concat()
        ),
        "take the preset, factor and dim that the file was trained with (`lokr inspect` shows them), or leave network.weights out",
    ))
}

/// The adapter's part that a checkpoint's part belongs to; the VAE has none.
pub fn group_of(part: Part) -> Option<ParameterGroup> {
    match part {
        Part::Unet => Some(ParameterGroup::Unet),
        Part::TextEncoder1 => Some(ParameterGroup::TextEncoder1),
        Part::TextEncoder2 => Some(ParameterGroup::TextEncoder2),
        Part::Vae => None,
    }
}

/// Name of a part in tables and messages.
pub fn part_name(group: ParameterGroup) -> &'static str {
    match group {
        ParameterGroup::TextEncoder1 => "te1",
        ParameterGroup::TextEncoder2 => "te2",
        ParameterGroup::Unet => "unet",
    }
}

/// The table before the first step: part, modules, parameters, learning rate, precision; then what matched nothing.
pub fn table(config: &RunConfig, network: &LokrNetwork) -> String {
    let mut text = format!("{:<6} {:>8} {:>6} {:>13} {:>9}  precision\n", "part", "modules", "norms", "parameters", "lr");
    let mut total = (0, 0, 0);
    for s in network.summary() {
        let lr = format!("{:e}", learning_rate(config, s.group));
        text += &format!("{:<6} {:>8} {:>6} {:>13} {lr:>9}  f32\n", part_name(s.group), s.modules, s.norms, thousands(s.parameters));
        total = (total.0 + s.modules, total.1 + s.norms, total.2 + s.parameters);
    }
    for group in ParameterGroup::ALL {
        if !network.summary().iter().any(|s| s.group == group) {
            text += &format!("{:<6} {:>8} {:>6} {:>13} {:>9}  frozen\n", part_name(group), 0, 0, 0, 0);
        }
    }
    text + &format!("{:<6} {:>8} {:>6} {:>13}", "total", total.0, total.1, thousands(total.2))
}

/// 1234567 as 1,234,567.
pub fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}
