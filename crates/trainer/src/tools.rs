//! The commands besides training: sample, export, inspect.

use std::path::{Path, PathBuf};

use candle_core::DType;
use diffusion::{Prediction, Sampler, Schedule, Spacing};
use lokr::{LokrNetwork, MergeScale};
use sdxl::checkpoint::{Checkpoint, Layout, Part};
use sdxl::tokenizer::Tokenizer;

use crate::base::{self, all_trees, part_name, thousands};
use crate::checkpoint;
use crate::config::{DeviceChoice, ModelConfig, RunConfig, SavePrecision};
use crate::device;
use crate::error::{Error, Result};
use crate::event::{Event, Observer};
use crate::export::{self, Merge, Merged};
use crate::preview::{self, Request};

fn open_base(path: &Path, vae: Option<&PathBuf>) -> Result<Checkpoint> {
    let config = ModelConfig { base: path.into(), vae: vae.cloned(), ..ModelConfig::default() };
    base::open_checkpoint(&config, false)
}

/// What `lokr sample` is asked for.
pub struct SampleRequest {
    /// Base model.
    pub base: PathBuf,
    /// VAE in place of its own.
    pub vae: Option<PathBuf>,
    /// Adapter file and strength.
    pub lokr: Option<(PathBuf, f64)>,
    /// The texts.
    pub prompts: Vec<String>,
    /// What guidance leads away from.
    pub negative_prompt: String,
    /// Width and height.
    pub size: (u32, u32),
    /// Sampling steps.
    pub steps: u32,
    /// Classifier-free guidance.
    pub guidance_scale: f64,
    /// Seed of the first picture of each prompt.
    pub seed: u64,
    /// Pictures of each prompt.
    pub count: u64,
    /// Name of the sampler.
    pub sampler: String,
    /// Name of the spacing.
    pub scheduler: String,
    /// The base model predicts v.
    pub v_parameterization: bool,
    /// Folder, or PNG file for a single picture.
    pub out: PathBuf,
}

/// Draws the pictures and writes them.
///
/// # Errors
/// If a file cannot be read or written, or a name is not known.
pub fn sample(r: &SampleRequest, observe: &mut Observer) -> Result<()> {
    let unknown = |what: &str, name: &str, known: &[&str]| {
        Error::refused(format!("there is no {what} named `{name}`"), format!("choose one of {}", known.join(", ")))
    };
    let sampler = Sampler::from_name(&r.sampler).ok_or_else(|| unknown("sampler", &r.sampler, Sampler::NAMES))?;
    let scheduler = Spacing::from_name(&r.scheduler).ok_or_else(|| unknown("scheduler", &r.scheduler, Spacing::NAMES))?;
    if r.count == 0 {
        return Err(Error::refused("--count 0 draws nothing", "set it to 1 or more, or leave it out"));
    }
    let single = r.out.extension().is_some_and(|e| e.eq_ignore_ascii_case("png"));
    if single && r.prompts.len() as u64 * r.count != 1 {
        let what = format!("--out {} is one file, for {} pictures", r.out.display(), r.prompts.len() as u64 * r.count);
        return Err(Error::refused(what, "give a folder"));
    }
    let checkpoint = open_base(&r.base, r.vae.as_ref())?.with_device(device::choose(DeviceChoice::Auto)?);
    let model = base::load_model(&checkpoint)?;
    if let Some((file, strength)) = &r.lokr {
        let network = LokrNetwork::from_file(file, all_trees(&model))?;
        network.set_multiplier(*strength);
        for key in network.unmatched().iter().take(10) {
            observe(Event::Warning(format!("`{}`: {key} fits no layer of the base model", file.display())));
        }
    }
    let v = r.v_parameterization || checkpoint.prediction_type() == Some("v");
    let prediction = if v { Prediction::V } else { Prediction::Epsilon };
    let tokenizer = Tokenizer::new()?;
    if !single {
        storage::create_dir_all(&r.out)?;
    }
    for (i, prompt) in r.prompts.iter().enumerate() {
        for n in 0..r.count {
            let request = Request {
                prompt: prompt.clone(),
                negative_prompt: r.negative_prompt.clone(),
                size: r.size,
                seed: r.seed + n,
                steps: r.steps,
                guidance_scale: r.guidance_scale,
                sampler,
                scheduler,
            };
            let picture = preview::draw(&model, &tokenizer, &Schedule::sdxl(), prediction, &request)?;
            let path = if single { r.out.clone() } else { r.out.join(format!("{i:02}_{}.png", r.seed + n)) };
            preview::write_png(&path, &picture)?;
            observe(Event::Wrote("picture", path));
        }
    }
    Ok(())
}

/// What `lokr export merged` is asked for.
pub struct MergeRequest {
    /// Base model.
    pub base: PathBuf,
    /// VAE in place of its own.
    pub vae: Option<PathBuf>,
    /// Adapter file.
    pub lokr: PathBuf,
    /// Its strength.
    pub multiplier: f64,
    /// File or folder to write.
    pub out: PathBuf,
    /// A diffusers folder rather than a single file.
    pub diffusers: bool,
    /// Number format; `None` keeps the base model's.
    pub precision: Option<SavePrecision>,
    /// LyCORIS's double scale.
    pub lycoris_scale: bool,
}

/// Writes the merged model.
///
/// # Errors
/// If a file cannot be read or written, or the adapter fits nothing.
pub fn export_merged(r: &MergeRequest) -> Result<Merged> {
    let checkpoint = open_base(&r.base, r.vae.as_ref())?;
    // Only names and shapes of the layers are needed.
    let model = base::load_model(&checkpoint.clone().without_weights())?;
    let merge = Merge {
        lokr: &r.lokr,
        multiplier: r.multiplier,
        layout: if r.diffusers { Layout::Diffusers } else { Layout::SingleFile },
        dtype: r.precision.map(|p| match p {
            SavePrecision::Float => DType::F32,
            SavePrecision::Fp16 => DType::F16,
            SavePrecision::Bf16 => DType::BF16,
        }),
        scale: if r.lycoris_scale { MergeScale::LycorisTwice } else { MergeScale::Once },
    };
    export::write_merged(&checkpoint, &model, &r.out, &merge)
}

/// What the metadata of a run's own adapter tells of its pictures and its course. A checkpoint does not hold that: it is left out.
const OF_THE_RUN: &[&str] = &[
    "modelspec.date",
    "ss_training_started_at",
    "ss_training_finished_at",
    "ss_session_id",
    "ss_epoch",
    "ss_num_train_images",
    "ss_num_validation_images",
    "ss_num_batches_per_epoch",
    "ss_num_epochs",
    "ss_max_train_steps",
    "ss_datasets",
    "ss_tag_frequency",
    "ss_dataset_dirs",
];

/// Writes the adapter of a run's newest whole checkpoint, or of one checkpoint, and gives the checkpoint's folder.
///
/// # Errors
/// If there is no whole checkpoint, or its recipe's base model is gone.
pub fn export_lokr(run: &Path, out: &Path, precision: SavePrecision) -> Result<PathBuf> {
    let found = if run.join("manifest.json").exists() {
        checkpoint::open(run)?
    } else {
        let (found, passed) = checkpoint::find_newest_whole(run)?;
        found.ok_or_else(|| {
            let why = passed.first().map_or_else(String::new, |p| format!(": {p}"));
            Error::refused(format!("`{}` has no whole checkpoint{why}", run.display()), "name the folder of a run, its output.dir")
        })?
    };
    let config = RunConfig::parse(&found.recipe, &found.path.join("recipe.toml"), &[])?;
    let model = base::load_model(&base::open_checkpoint(&config.model, false)?.without_weights())?;
    let network = base::create_network(&config, &model)?;
    let trained: Vec<crate::step::Trained> =
        network.parameters().into_iter().map(|(group, parameter)| crate::step::Trained { group, parameter }).collect();
    found.restore_adapter(&trained)?;
    let facts = crate::metadata::RunFacts { steps: found.state.step, ..Default::default() };
    let mut metadata = crate::metadata::metadata(&config, &facts);
    metadata.retain(|key, _| !OF_THE_RUN.contains(&key.as_str()));
    export::write_lokr(&network, out, precision, &metadata)?;
    Ok(found.path)
}

/// Describes a model or adapter file.
///
/// # Errors
/// If it is neither.
pub fn inspect(path: &Path, metadata: bool) -> Result<String> {
    match lokr::inspect(path) {
        Ok(summary) => Ok(adapter_text(path, &summary, metadata)),
        // A base model is no LoKr file, and neither is a folder or something unreadable: let the base model's reader say what it is.
        Err(lokr::Error::NotLokr { .. } | lokr::Error::Storage(_)) => model_text(path, metadata),
        Err(error) => Err(error.into()),
    }
}

fn adapter_text(path: &Path, s: &lokr::FileSummary, metadata: bool) -> String {
    let mut text = format!("{}: {}\n", path.display(), s.algo);
    for g in &s.groups {
        let name = g.group.map_or("unknown", part_name);
        text += &format!("  {name:<5} {:>5} modules {:>4} norms {:>13} parameters\n", g.modules, g.norms, thousands(g.parameters));
    }
    let rank = |(r, n): (&usize, &usize)| if *r == 0 { format!("full ({n})") } else { format!("{r} ({n})") };
    text += &format!("  rank (modules): {}\n", s.ranks.iter().map(rank).collect::<Vec<_>>().join(", "));
    let factor = |((a, b), n): (&(usize, usize), &usize)| format!("{a}x{b} ({n})");
    text += &format!("  w1 (modules): {}\n", s.factors.iter().map(factor).collect::<Vec<_>>().join(", "));
    text += &format!("  types: {:?}\n", s.dtypes);
    for line in &s.suspicious {
        text += &format!("  suspicious: {line}\n");
    }
    if metadata {
        s.metadata.iter().for_each(|(k, v)| text += &format!("  {k} = {v}\n"));
    }
    text
}

fn model_text(path: &Path, metadata: bool) -> Result<String> {
    let c = Checkpoint::open(path)?;
    let layout = match c.layout() {
        Layout::SingleFile => "single file",
        Layout::Diffusers => "diffusers folder",
    };
    let mut text = format!("{}: SDXL, {layout}, predicts {}\n", path.display(), c.prediction_type().unwrap_or("epsilon (not said)"));
    for part in Part::ALL {
        if !c.has_part(part) {
            text += &format!("  {:<5} absent\n", part.name());
            continue;
        }
        let names: Vec<&str> = c.names(part).collect();
        let count: usize = names.iter().filter_map(|n| c.shape(part, n)).map(|s| s.iter().product::<usize>()).sum();
        let dtypes: std::collections::BTreeSet<String> = names.iter().filter_map(|n| Some(format!("{:?}", c.dtype(part, n)?))).collect();
        let dtypes = dtypes.into_iter().collect::<Vec<_>>().join(", ");
        text += &format!("  {:<5} {:>5} tensors {:>14} parameters  {dtypes}\n", part.name(), names.len(), thousands(count));
    }
    let dims = c.head_dims()?;
    let unet = sdxl::config::UNetConfig::of_checkpoint(&c, dims)?;
    text += &format!(
        "  unet channels {:?}, transformer depth {:?} + {}, heads of {}, {} groups, context {}, added condition {}\n",
        unet.block_out_channels,
        unet.transformer_depth,
        unet.mid_depth,
        unet.head_dim,
        unet.norm_num_groups,
        unet.context_dim,
        unet.adm_dim
    );
    if metadata {
        c.metadata().iter().for_each(|(k, v)| text += &format!("  {k} = {v}\n"));
    }
    Ok(text)
}
