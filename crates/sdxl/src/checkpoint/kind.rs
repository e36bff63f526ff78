//! Telling what a file or folder is when it is no SDXL base model, from its tensor names alone, so that the message can say
//! what to give instead.

use serde_json::Value;

/// What was given where an SDXL base model was wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Stable Diffusion 1.x, whole.
    Sd1,
    /// Stable Diffusion 2.x, whole.
    Sd2,
    /// The SDXL refiner: a UNet and te2 without te1.
    Refiner,
    /// Flux, alone or whole.
    Flux,
    /// Stable Diffusion 3, alone or whole.
    Sd3,
    /// LoRA, LoKr, LoHa and their like.
    Adapter,
    /// A ControlNet.
    ControlNet,
    /// A textual inversion embedding.
    Embedding,
    /// A VAE and nothing else.
    VaeOnly,
    /// A UNet and nothing else.
    UnetOnly,
    /// A text encoder and nothing else.
    TextEncoderOnly,
    /// A diffusers folder of another pipeline class.
    Pipeline(String),
    /// A folder whose weights are pickled.
    PickledFolder,
    /// A folder without a `unet` folder in it.
    OtherFolder,
    /// A safetensors file without tensors.
    Empty,
    /// Something else; holds its first tensor names.
    Unknown(String),
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::Sd1 => "a Stable Diffusion 1.x model",
            Kind::Sd2 => "a Stable Diffusion 2.x model",
            Kind::Refiner => "the SDXL refiner, which has no first text encoder",
            Kind::Flux => "a Flux model",
            Kind::Sd3 => "a Stable Diffusion 3 model",
            Kind::Adapter => "an adapter (LoRA, LoKr or alike)",
            Kind::ControlNet => "a ControlNet",
            Kind::Embedding => "a textual inversion embedding",
            Kind::VaeOnly => "a VAE alone",
            Kind::UnetOnly => "a UNet alone",
            Kind::TextEncoderOnly => "a text encoder alone",
            Kind::Pipeline(class) => return write!(f, "a folder for diffusers' {class}"),
            Kind::PickledFolder => "a diffusers folder whose weights are pickled .bin files",
            Kind::OtherFolder => "a folder without `unet` in it",
            Kind::Empty => "a safetensors file without tensors",
            Kind::Unknown(names) => return write!(f, "a file with tensors as {names}"),
        })
    }
}

impl Kind {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Kind::Adapter => {
                "give the SDXL model that the adapter was made for as the base; the adapter itself goes where an adapter is asked for"
            }
            Kind::VaeOnly => "give an SDXL model as the base and this file as its VAE",
            Kind::UnetOnly | Kind::TextEncoderOnly => {
                "give the whole model: a single .safetensors file, or the diffusers folder that holds model_index.json, unet, vae and both text encoders"
            }
            Kind::Refiner => "give the SDXL base model; the refiner cannot be trained here",
            Kind::PickledFolder => "convert the weights to safetensors, or fetch the model's safetensors variant",
            Kind::OtherFolder => "give a single .safetensors file, or the diffusers folder that holds model_index.json",
            Kind::Empty => "the file was not fully written; fetch it again",
            _ => "only Stable Diffusion XL and its fine-tunes can be trained here; give an SDXL model",
        }
    }
}

const ADAPTER_MARKS: &[&str] = &[
    ".lora_up.",
    ".lora_down.",
    ".lora_A.",
    ".lora_B.",
    ".lora.up.",
    ".lora.down.",
    ".lokr_w1",
    ".lokr_w2",
    ".hada_w1",
    ".hada_w2",
    ".oft_blocks",
    ".oft_diag",
    ".dora_scale",
    ".w_norm",
];

/// What a file with these tensor names is, unless it has the UNet and both text encoders of an SDXL model.
pub(super) fn wrong_kind(names: &[&str]) -> Option<Kind> {
    let starts = |prefix: &str| names.iter().any(|name| name.starts_with(prefix));
    let has = |mark: &str| names.iter().any(|name| name.contains(mark));
    let any = |prefixes: &[&str]| prefixes.iter().any(|prefix| starts(prefix));
    if names.is_empty() {
        return Some(Kind::Empty);
    }
    if ADAPTER_MARKS.iter().any(|mark| has(mark)) || any(&["lora_unet_", "lora_te", "lycoris_"]) {
        return Some(Kind::Adapter);
    }
    if any(&["control_model.", "controlnet_", "input_hint_block."]) {
        return Some(Kind::ControlNet);
    }
    if has("double_blocks.") {
        return Some(Kind::Flux);
    }
    if has("joint_blocks.") {
        return Some(Kind::Sd3);
    }
    if starts("conditioner.embedders.0.model.") && !starts(super::TE1_PREFIX) {
        return Some(Kind::Refiner);
    }
    if starts("cond_stage_model.") {
        return Some(if starts("cond_stage_model.transformer.") { Kind::Sd1 } else { Kind::Sd2 });
    }
    let (unet, text) = (starts(super::UNET_PREFIX), starts(super::TE1_PREFIX) || starts(super::TE2_PREFIX));
    if unet && text {
        return None;
    }
    if unet || any(&["input_blocks.", "down_blocks.", "middle_block."]) {
        return Some(Kind::UnetOnly);
    }
    if is_vae(names) {
        return Some(Kind::VaeOnly);
    }
    if text || any(&["text_model.", "transformer.resblocks."]) {
        return Some(Kind::TextEncoderOnly);
    }
    if any(&["emb_params", "string_to_param", "clip_g", "clip_l"]) {
        return Some(Kind::Embedding);
    }
    Some(Kind::Unknown(names.iter().take(3).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")))
}

/// Whether these are the names of a VAE, in either naming, without a prefix or with that of the single file.
pub(super) fn is_vae(names: &[&str]) -> bool {
    let has = |mark: &str| names.iter().any(|name| name.strip_prefix(super::VAE_PREFIX).unwrap_or(name).starts_with(mark));
    has("encoder.conv_in.") && has("decoder.conv_in.")
}

/// What a diffusers folder is by its model_index.json, unless it is one of SDXL.
pub(super) fn wrong_pipeline(index: &Value) -> Option<Kind> {
    let class = index.get("_class_name")?.as_str()?;
    if class.starts_with("StableDiffusionXL") {
        let absent = index.get("text_encoder").and_then(|entry| entry.get(0)).is_some_and(Value::is_null);
        return absent.then_some(Kind::Refiner);
    }
    Some(match class {
        "StableDiffusion3Pipeline" => Kind::Sd3,
        "FluxPipeline" => Kind::Flux,
        "StableDiffusionPipeline" => Kind::Sd1,
        other => Kind::Pipeline(other.into()),
    })
}
