//! The sections `[model]`, `[network]`, `[output]`, `[sample]`, `[validation]`: their keys with docs and defaults.
//! `[train]` is in `train.rs`, `[dataset]` in `dataset.rs`.

use std::path::PathBuf;

use candle_core::DType;
use diffusion::{Sampler, Spacing};
use lokr::functional::Path;
use toml::{Table, Value};

use super::key::{Section, Setting, choice, section};

choice! {
    /// Number format of the frozen weights in memory.
    WeightDtype {
        /// As in the file.
        Auto = "auto",
        /// f32.
        Float = "float",
        /// f16.
        Fp16 = "fp16",
        /// bf16.
        Bf16 = "bf16",
    }
}

impl WeightDtype {
    /// The type to convert to; `None`: the file's.
    pub fn dtype(self) -> Option<DType> {
        match self {
            Self::Auto => None,
            Self::Float => Some(DType::F32),
            Self::Fp16 => Some(DType::F16),
            Self::Bf16 => Some(DType::BF16),
        }
    }
}

choice! {
    /// How the forward pass and the input gradient of adapted layers are computed.
    ForwardPath {
        /// For each layer the cheaper one.
        Auto = "auto",
        /// One product with W + delta.
        Merged = "merged",
        /// The product with W, plus the chain through both factors.
        Factored = "factored",
    }
}

impl ForwardPath {
    /// The path of every layer; `None`: chosen for each.
    pub fn path(self) -> Option<Path> {
        match self {
            Self::Auto => None,
            Self::Merged => Some(Path::Merged),
            Self::Factored => Some(Path::Factored),
        }
    }
}

section! {
    /// The base model, which stays frozen.
    ModelConfig = "model" {
        /// The base model: a single-file safetensors checkpoint (SGM layout) or a diffusers folder.
        base: PathBuf = PathBuf::new(), sd("pretrained_model_name_or_path"), required;
        /// A VAE that replaces the base model's: a file or a folder.
        vae: Option<PathBuf> = None, same;
        /// Number format in which the weights of the UNet and the text encoders are kept in memory. Narrow ones are widened a layer at a time
        /// where they are used. "auto": as in the file. The VAE is f32, and in memory only while it is used.
        weight_dtype: WeightDtype = WeightDtype::Auto, ours;
        /// Copy all weights into memory at the start. Otherwise a run that computes in f32 on the CPU uses those of linear layers and
        /// convolutions where they lie in the mapped file, unless they are converted. For base models on a slow or unreliable file system.
        disable_mmap_load_safetensors: bool = false, same;
        /// The base model predicts velocity (v) instead of noise.
        v_parameterization: bool = false, same;
        /// Train with the schedule that leaves no signal at the last timestep. The base model must have been trained so.
        zero_terminal_snr: bool = false, same;
        /// Channels per attention head of the UNet, in place of what the checkpoint says (SDXL's 64 where it says nothing).
        head_dim: Option<usize> = None, ours;
        /// Groups of the UNet's group norms, in place of what the checkpoint says (SDXL's 32 where it says nothing).
        norm_num_groups: Option<usize> = None, ours;
        /// Attention heads of the first text encoder, in place of what the checkpoint says (SDXL's 12 where it says nothing).
        te1_heads: Option<usize> = None, ours;
        /// Attention heads of the second text encoder, in place of what the checkpoint says (SDXL's 20 where it says nothing).
        te2_heads: Option<usize> = None, ours;
        /// Groups of the VAE's group norms, in place of what the checkpoint says (SDXL's 32 where it says nothing).
        vae_norm_num_groups: Option<usize> = None, ours;
    }
}

section! {
    /// The adapter: a LoKr network in LyCORIS' terms. Keys that sd-scripts takes as `network_args` stand here by their own names.
    NetworkConfig = "network" {
        /// Which modules are adapted, and with which options: a built-in preset's name or the path of a preset file in LyCORIS' form.
        preset: String = "full".into(), same;
        /// Rank r of the factors that are not full; also what a preset's modules fall back to.
        dim: usize = 4, sd("network_dim");
        /// Strength: a low-rank module is scaled by alpha/dim. 0 means alpha = dim. Without meaning where both factors are full.
        alpha: f64 = 1.0, sd("network_alpha");
        /// Rank for convolutions with a kernel above 1x1; 0 leaves them out. If absent: `dim`.
        conv_dim: Option<usize> = None, same;
        /// Alpha for convolutions with a kernel above 1x1. If absent: `alpha`.
        conv_alpha: Option<f64> = None, same;
        /// How a layer's sides are split between the two factors: the size of the smaller one, or a cap for it; -1: as square as possible.
        factor: i64 = -1, same;
        /// Keep both factors whole, with no low-rank product. `dim` and `alpha` have no effect then.
        full_matrix: bool = false, same;
        /// Write the small factor as a low-rank product too, where `dim` is small enough.
        decompose_both: bool = false, same;
        /// Tucker form for low-rank convolutions with a kernel above 1x1.
        use_tucker: bool = false, sd("use_tucker", "use_cp", "use_conv_cp");
        /// A trained scalar per module, from 0; the factors then start away from 0.
        use_scalar: bool = false, same;
        /// Divide alpha by the square root of `dim` instead of `dim`.
        rs_lora: bool = false, same;
        /// Give the larger share of a layer's outputs to the first factor.
        unbalanced_factorization: bool = false, same;
        /// Train the norms inside the adapted blocks as well.
        train_norm: bool = false, same;
        /// How adapted layers are computed. "merged": one product with W + delta, as in LyCORIS. "factored": the product with W, plus the chain
        /// through both factors (LyCORIS' `bypass_mode`). "auto": for each layer the faster one; `lokr plan` shows which. The function is
        /// the same; in half precision only "factored", which "auto" takes there, keeps a delta that W + delta would round away.
        forward: ForwardPath = ForwardPath::Auto, ours;
        /// Start from the values of this LoKr file.
        weights: Option<PathBuf> = None, sd("network_weights");
        /// Adapt the UNet.
        train_unet: bool = true, ours;
        /// Adapt the text encoders.
        train_text_encoder: bool = true, ours;
    }
}

choice! {
    /// Number format of a written adapter.
    SavePrecision {
        /// f32, as trained.
        Float = "float",
        /// f16.
        Fp16 = "fp16",
        /// bf16.
        Bf16 = "bf16",
    }
}

/// From what a run starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// From the newest whole checkpoint of `output.dir`, if there is one.
    Auto,
    /// From the beginning; an error if `output.dir` holds checkpoints.
    Never,
    /// From this checkpoint.
    From(PathBuf),
}

impl Setting for Resume {
    fn kind() -> String {
        "\"auto\", \"never\" or the path of a checkpoint".into()
    }
    fn read(value: &Value) -> Option<Self> {
        Some(match value.as_str()? {
            "auto" => Resume::Auto,
            "never" => Resume::Never,
            path => Resume::From(path.into()),
        })
    }
    fn write(&self) -> Option<Value> {
        match self {
            Resume::Auto => Some("auto".into()),
            Resume::Never => Some("never".into()),
            Resume::From(path) => path.write(),
        }
    }
}

section! {
    /// What the run leaves behind, and where.
    OutputConfig = "output" {
        /// The run's folder: checkpoints, the adapter, metrics, previews, the recipe as run.
        dir: PathBuf = PathBuf::new(), sd("output_dir"), required;
        /// File name of the adapter, without extension; also its title in the metadata.
        name: String = "lokr".into(), sd("output_name");
        /// Optimizer steps between saves. If absent: only at the end and at an interruption.
        save_every_n_steps: Option<u64> = None, same;
        /// How many checkpoints are kept; older ones are deleted after a newer one is whole on the disk.
        keep_last: u64 = 2, ours;
        /// Checkpoints after a multiple of so many steps are kept for good. If absent: none.
        keep_every: Option<u64> = None, ours;
        /// Number format of the adapter that is written for others. Checkpoints are always f32.
        save_precision: SavePrecision = SavePrecision::Float, same;
        /// "auto": go on from the newest whole checkpoint of `output.dir`, if there is one. "never": begin anew, refuse a folder with
        /// checkpoints. A path: go on from that checkpoint. Totals in `[train]` count from the beginning of the run, not from the resume.
        resume: Resume = Resume::Auto, same;
        /// A comment for the file's metadata.
        training_comment: Option<String> = None, same;
        /// Write start, end and date of the run into the metadata. Off, equal runs give equal files, resumed or not.
        timestamps: bool = false, ours;
        /// Write only the metadata that readers need to recognise the file.
        no_metadata: bool = false, same;
        /// Title in the metadata. If absent: `name`.
        metadata_title: Option<String> = None, same;
        /// Author in the metadata.
        metadata_author: Option<String> = None, same;
        /// Description in the metadata.
        metadata_description: Option<String> = None, same;
        /// License in the metadata.
        metadata_license: Option<String> = None, same;
        /// Tags in the metadata, separated by commas.
        metadata_tags: Option<String> = None, same;
        /// Trigger phrase in the metadata.
        metadata_trigger_phrase: Option<String> = None, same;
        /// Usage hint in the metadata.
        metadata_usage_hint: Option<String> = None, same;
    }
}

section! {
    /// Previews while training. With neither `sample_every_n_steps` nor `sample_at_first`, none are made.
    SampleConfig = "sample" {
        /// What is sampled: texts, or tables with `prompt` and any of `negative_prompt`, `width`, `height`, `seed`, `steps`,
        /// `guidance_scale`, which replace the keys of this section for that prompt.
        prompts: Vec<PromptConfig> = Vec::new(), sd("sample_prompts");
        /// Optimizer steps between previews.
        sample_every_n_steps: Option<u64> = None, same;
        /// Also before the first step.
        sample_at_first: bool = false, same;
        /// Sampler.
        sampler: Sampler = Sampler::Euler, sd("sample_sampler");
        /// How the noise levels are spaced. "uniform" and "karras" are what image tools use, the "leading" ones are diffusers'.
        scheduler: Spacing = Spacing::Uniform, ours;
        /// Sampling steps.
        steps: u32 = 30, sd("sample_steps");
        /// Classifier-free guidance; 1 or less: none.
        guidance_scale: f64 = 7.5, sd("scale");
        /// Width of a preview in pixels, a multiple of 8.
        width: u32 = 1024, same;
        /// Height of a preview in pixels, a multiple of 8.
        height: u32 = 1024, same;
        /// What guidance leads away from.
        negative_prompt: String = String::new(), same;
        /// Seed of the previews; the same at each preview, so that they can be compared.
        seed: u64 = 0, ours;
    }
}

section! {
    /// One prompt. What is absent is taken from `[sample]`.
    PromptConfig = "sample.prompts" {
        /// The text.
        prompt: String = String::new(), same, required;
        /// What guidance leads away from.
        negative_prompt: Option<String> = None, same;
        /// Width in pixels.
        width: Option<u32> = None, same;
        /// Height in pixels.
        height: Option<u32> = None, same;
        /// Seed.
        seed: Option<u64> = None, same;
        /// Sampling steps.
        steps: Option<u32> = None, sd("sample_steps");
        /// Classifier-free guidance.
        guidance_scale: Option<f64> = None, sd("scale");
    }
}

impl Setting for PromptConfig {
    fn kind() -> String {
        "text or table with `prompt`".into()
    }
    fn read(value: &Value) -> Option<Self> {
        let mut prompt = Self::default();
        match value {
            Value::String(text) => prompt.prompt = text.clone(),
            Value::Table(table) => {
                table.get("prompt")?;
                for (key, value) in table {
                    prompt.set(key, value).filter(|fits| *fits)?;
                }
            }
            _ => return None,
        }
        Some(prompt)
    }
    fn write(&self) -> Option<Value> {
        let set: Table = self.values().into_iter().filter_map(|(k, v)| Some((k.to_owned(), v?))).collect();
        Some(if set.len() == 1 { self.prompt.as_str().into() } else { Value::Table(set) })
    }
}

section! {
    /// The loss on pictures that are not trained on, at fixed timesteps and with fixed noise.
    ValidationConfig = "validation" {
        /// A folder of held-out pictures with captions, read like a subset's `image_dir`.
        image_dir: Option<PathBuf> = None, ours;
        /// The timesteps at which the loss is taken.
        timesteps: Vec<u32> = vec![200, 400, 600, 800], ours;
        /// Optimizer steps between evaluations.
        every_n_steps: Option<u64> = None, sd("validate_every_n_steps");
        /// Seed of the evaluation's noise.
        seed: u64 = 0, sd("validation_seed");
    }
}
