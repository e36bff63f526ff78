//! Building the parts of a run, in the order in which their mistakes are cheapest to find: recipe, pictures, base model,
//! adapter, latents.

use std::sync::Arc;

use candle_core::Device;
use dataset::Dataset;
use lokr::{LokrNetwork, ParameterGroup};
use ops::F32;
use optim::Optimizer;
use sdxl::Sdxl;
use sdxl::checkpoint::{Checkpoint, ModelHash};
use sdxl::tokenizer::Tokenizer;

use crate::base;
use crate::config::{Compat, ConfigError, RunConfig};
use crate::data::Data;
use crate::ddp::Buckets;
use crate::device;
use crate::error::{Error, Result};
use crate::event::{Event, Observer};
use crate::latents;
use crate::outputs::Outputs;
use crate::precision;
use crate::ranks::Ranks;
use crate::step::{Objective, Trained};

/// Everything that a run works with.
pub struct Parts {
    /// The base model with the adapter attached.
    pub model: Sdxl,
    /// The adapter.
    pub network: LokrNetwork,
    /// Its tensors.
    pub trained: Vec<Trained>,
    /// The optimizer, its state empty.
    pub optimizer: Optimizer,
    /// Batches.
    pub data: Arc<Data>,
    /// What the run leaves behind; on rank 0, which alone writes.
    pub outputs: Option<Outputs>,
    /// The loss.
    pub objective: Objective,
    /// The base model's files.
    pub base: Checkpoint,
    /// SHA-256 of the base model.
    pub base_hash: String,
}

/// What the parts are built from.
pub struct Sources {
    /// The pictures.
    pub dataset: Dataset,
    checkpoint: Checkpoint,
    /// Identity of the base model.
    pub hash: ModelHash,
    /// Pictures that were found and cannot be used, as their headers or captions show.
    pub left_out: usize,
    /// Where the run computes.
    pub device: Device,
}

/// Checks the recipe, lists the pictures and opens the base model's files.
///
/// # Errors
/// If the recipe cannot be run, a folder cannot be read, or the base is no model.
pub fn open(config: &RunConfig, observe: &mut Observer) -> Result<Sources> {
    config.check().map_err(ConfigError::Problems)?;
    config.check_paths().map_err(ConfigError::Problems)?;
    for problem in config.warnings() {
        observe(Event::Warning(format!("{problem}; {}", problem.way_out)));
    }
    let (dataset, report) = Dataset::open(&config.dataset)?;
    observe(Event::Note(report.to_string().trim_end().to_string()));

    let checkpoint = base::open_checkpoint(&config.model, config.train.compat == Some(Compat::SdScripts))?;
    let device = device::choose(config.train.device)?;
    precision::check_compute(&config.train, &device)?;
    let checkpoint = checkpoint.with_device(device.clone());
    let hash = checkpoint.hash()?;
    let left_out = report.broken_images.count + report.broken_captions.count;
    Ok(Sources { dataset, checkpoint, hash, left_out, device })
}

/// Builds all parts and tells what was derived.
///
/// # Errors
/// Anything that keeps the run from starting.
pub fn build(config: &RunConfig, sources: Sources, ranks: &Ranks, observe: &mut Observer) -> Result<Parts> {
    let Sources { dataset, checkpoint, hash, .. } = sources;
    let model = base::load_for_training(config, &checkpoint)?;
    let network = base::create_network(config, &model)?;
    observe(Event::Note(base::table(config, &network)));
    for pattern in network.unmatched() {
        observe(Event::Warning(format!("the preset's {pattern} matches nothing in this model")));
    }

    let cache = latents::open(config, &dataset, &vae_identity(config, &hash.sha256)?, observe)?;
    if let Some(cache) = &cache {
        latents::encode_ahead(config, &dataset, cache, &model.vae, (ranks.rank(), ranks.count()), observe)?;
        // None needs the others' latents: but none shall wait at a gradient for a rank that still encodes.
        ranks.wait("the latents")?;
    }
    for (sample, why) in dataset.broken() {
        observe(Event::Warning(format!("left out: {}: {why}", dataset.name(sample).display())));
    }

    let trained: Vec<Trained> = network.parameters().into_iter().map(|(group, parameter)| Trained { group, parameter }).collect();
    let sizes: Vec<usize> = trained.iter().map(|t| t.parameter.tensor().elem_count()).collect();
    let optimizer = optimizer(config, &sizes, model.device())?;
    let objective = Objective::new(config, &trained);
    let data = Arc::new(Data::new(config, dataset, cache, ranks.rank(), ranks.count())?);
    let outputs = ranks.is_first().then(|| Outputs::new(config, &model, Tokenizer::new()?, &data, &hash)).transpose()?;
    if data.caches_latents() {
        model.vae.release();
        ops::give_back_freed_memory();
    }
    observe(Event::Note(derived(config, &data, &sizes, &optimizer, model.device())));
    Ok(Parts { model, network, trained, optimizer, data, outputs, objective, base: checkpoint, base_hash: hash.sha256 })
}

/// The recipe's optimizer for tensors of these sizes, its state empty, on the GPU if the model is there and it can be.
///
/// # Errors
/// If a hyperparameter is out of range, or the device refuses the optimizer's kernels.
pub fn optimizer(config: &RunConfig, sizes: &[usize], device: &Device) -> Result<Optimizer> {
    let hyper = config.hyper();
    hyper.check()?;
    #[cfg_attr(not(feature = "cuda"), allow(unused_mut))]
    let mut optimizer = Optimizer::new(config.train.optimizer, hyper, sizes);
    #[cfg(feature = "cuda")]
    crate::on_gpu::use_device(&mut optimizer, device)?;
    let _ = device;
    Ok(optimizer)
}

/// What the latent cache is keyed by: the file that the VAE comes from.
fn vae_identity(config: &RunConfig, base: &str) -> Result<String> {
    match &config.model.vae {
        Some(file) if file.is_file() => Ok(storage::sha256_file(file)?),
        Some(folder) => Ok(format!("{base} {}", folder.display())),
        None => Ok(base.to_string()),
    }
}

/// The numbers that follow from the recipe.
fn derived(config: &RunConfig, data: &Data, sizes: &[usize], optimizer: &Optimizer, device: &Device) -> String {
    let t = &config.train;
    let line = data.timeline;
    let batch = t.batch_size as u64 * line.batches_per_step();
    let shared = if line.ranks > 1 { format!(" x processes {}", line.ranks) } else { String::new() };
    format!(
        "compute {} on {}; batch {} x accumulation {}{shared} = {batch} images per step\n\
         {} batches and {} steps per epoch; {} steps in all ({:.2} epochs)\n\
         {} with {} trained numbers; gradient checkpointing {}",
        precision::describe(config),
        device::describe(device),
        t.batch_size,
        t.gradient_accumulation_steps,
        line.batches_per_epoch,
        line.steps_per_epoch(),
        line.total_steps,
        line.total_steps as f64 / line.steps_per_epoch() as f64,
        optimizer.kind().name(),
        base::thousands(sizes.iter().sum()),
        t.gradient_checkpointing.name(),
    )
}

/// Waits until all ranks are ready, makes sure that they hold the same weights, and tells what the sum of the gradients costs.
///
/// # Errors
/// If a rank is lost, or holds other weights.
pub fn make_ready(
    ranks: &Ranks,
    trained: &[Trained],
    optimizer: &Optimizer,
    buckets: &Buckets,
    step: u64,
    observe: &mut Observer,
) -> Result<()> {
    ranks.wait("the first step")?;
    ranks.check_equal(trained, optimizer, step)?;
    if ranks.count() > 1 {
        let lengths = buckets.lengths();
        let device = trained.first().map_or(Device::Cpu, |t| t.parameter.tensor().device().clone());
        let millis = ranks.measure_sum(&lengths, &device)?;
        observe(Event::Note(format!(
            "{} processes over {}: {:.2} MB of gradients per step in {} buckets, summed in {millis:.2} ms (measured)",
            ranks.count(),
            ranks.carrier(),
            lengths.iter().sum::<usize>() as f64 * 4.0 / 1e6,
            lengths.len(),
        )));
    }
    Ok(())
}

/// Refuses a run in which a part is trained and its gradient, that of the first step, is exactly zero.
///
/// # Errors
/// [`Error::NoGradient`] naming the part.
pub fn check_gradients(config: &RunConfig, trained: &[Trained]) -> Result<()> {
    for group in ParameterGroup::ALL {
        let mut of_part = trained.iter().filter(|t| t.group == group).peekable();
        if of_part.peek().is_none() {
            continue;
        }
        let mut moved = false;
        for gradient in of_part.filter_map(|t| t.parameter.grad()) {
            moved |= F32::new(&gradient.to_device(&Device::Cpu)?)?.iter().any(|&v| v != 0.0);
        }
        if !moved {
            return Err(Error::NoGradient { part: base::part_name(group), lr: base::learning_rate(config, group) });
        }
    }
    Ok(())
}
