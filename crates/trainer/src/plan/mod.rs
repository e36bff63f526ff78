//! `lokr plan`: what a run will take, from shapes alone. Adapters and their paths, the size of the file, memory by kind, FLOPs, steps,
//! and the least time on a device. No weight is read; where the base model is not there yet, SDXL's own shapes stand in.
//!
//! Memory comes from a run of the networks without numbers ([`tape`]) at the batch that takes the most; what the allocator keeps and
//! what the program itself takes is a measured allowance ([`OVERHEAD`]).

mod bytes;
mod device;
mod inputs;
mod network;
mod tape;
mod text;

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use candle_core::DType;
use lokr::functional::Path;
use lokr::{ParameterGroup, PlannedKind, PlannedModule, Preset, Trees};
use optim::Optimizer;
use sdxl::Sdxl;
use sdxl::layers::{Leaf, ModuleTree};

use bytes::{kernel_buffers, layer_bytes, threads, weight_bytes};
pub use device::Device;
use network::{Adapted, Layer, Net};
use tape::{Meter, Speed, backward};
pub use text::Report;

use crate::base;
use crate::config::{ConfigError, MixedPrecision, RunConfig, SavePrecision};
use crate::data::chunks;
use crate::error::Result;
use crate::precision;
use crate::timeline::Timeline;

/// What the program takes beside tensors: code, tokenizer, threads, pictures in flight. Measured as what a run of the tiny model takes
/// above its tensors.
const OVERHEAD: u64 = 75 << 20;
/// The allocator gives freed memory back after a while (a second), so that the last freed buffers still count: so many of the
/// largest.
const FREED: u64 = 2;

/// What is planned for.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The device.
    pub device: Device,
    /// TFLOP/s in place of what is known of it.
    pub tflops: Option<f64>,
    /// GB/s in place of what is known of it.
    pub bandwidth: Option<f64>,
}

/// One adapted layer.
#[derive(Clone, Debug)]
pub struct Planned {
    /// What it is.
    pub module: PlannedModule,
    /// Trained numbers.
    pub parameters: usize,
    /// How it is computed; `None` for norms and for layers that the loss does not depend on.
    pub path: Option<Path>,
    /// Rows of its product: samples times tokens or output pixels; `None` where `path` is.
    pub rows: Option<u64>,
}

/// Memory by kind, in bytes, at the moment of the peak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Frozen weights.
    pub weights: u64,
    /// The adapter in f32.
    pub masters: u64,
    /// Its gradients, as far as they are there at that moment.
    pub gradients: u64,
    /// The optimizer's state.
    pub optimizer: u64,
    /// Activations, and what ops need while they run.
    pub activations: u64,
    /// A checkpoint's copy while it is written.
    pub snapshot: u64,
    /// The program itself; 0 on a GPU.
    pub program: u64,
    /// What the run does then.
    pub when: &'static str,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.masters + self.gradients + self.optimizer + self.activations + self.snapshot + self.program
    }
}

/// What a run will take.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What should be known about how it was planned.
    pub notes: Vec<String>,
    /// The adapted layers, in the order of the file.
    pub modules: Vec<Planned>,
    /// Trained numbers.
    pub parameters: usize,
    /// Bytes of the tensors of the written adapter.
    pub file_bytes: u64,
    /// Width, height and samples of the batch that takes the most.
    pub largest: (u32, u32, usize),
    /// The peak.
    pub memory: Memory,
    /// FLOPs of an optimizer step at that batch.
    pub flops: f64,
    /// The least time of an optimizer step, in seconds.
    pub seconds: Option<f64>,
    /// The run's steps; `None` where pictures are not there and the recipe counts epochs.
    pub timeline: Option<Timeline>,
}

/// The trees that the recipe adapts, and the networks around them.
struct Model {
    sdxl: Sdxl,
    modules: Vec<PlannedModule>,
    /// Every module by this path.
    path: Option<Path>,
}

impl Model {
    /// The model that a recipe trains, its weights not read.
    fn new(config: &RunConfig, notes: &mut Vec<String>) -> Result<Self> {
        let checkpoint = inputs::checkpoint(config, notes)?;
        let sdxl = base::load_for_training(config, &checkpoint)?;
        let adapted = |group| base::learning_rate(config, group) > 0.0;
        let trees = Trees {
            te1: adapted(ParameterGroup::TextEncoder1).then_some(&sdxl.te1.tree),
            te2: adapted(ParameterGroup::TextEncoder2).then_some(&sdxl.te2.tree),
            unet: adapted(ParameterGroup::Unet).then_some(&sdxl.unet.tree),
        };
        let adapter = config.adapter(Preset::load(&config.network.preset)?);
        let (modules, unmatched) = lokr::plan(&adapter, trees)?;
        notes.extend(unmatched.iter().map(|p| format!("the preset's {p} matches nothing in this model")));
        Ok(Self { sdxl, modules, path: adapter.path })
    }

    fn tree(&self, group: ParameterGroup) -> &ModuleTree {
        match group {
            ParameterGroup::TextEncoder1 => &self.sdxl.te1.tree,
            ParameterGroup::TextEncoder2 => &self.sdxl.te2.tree,
            ParameterGroup::Unet => &self.sdxl.unet.tree,
        }
    }

    /// The layers of a network by path, with their adapters.
    fn layers(&self, group: ParameterGroup) -> HashMap<String, Layer> {
        let mut layers = layers(self.tree(group));
        for (id, module) in self.modules.iter().enumerate().filter(|(_, m)| m.group == group) {
            let (sides, path) = match &module.kind {
                PlannedKind::Lokr { shape, bypass, .. } => {
                    ([shape.a, shape.b, shape.c, shape.d], self.path.or(bypass.then_some(Path::Factored)))
                }
                PlannedKind::Norm(_) => ([1; 4], None),
            };
            if let Some(layer) = layers.get_mut(&module.path) {
                layer.adapted = Some(Adapted { sides, path, parameters: module.parameters() as u64, id });
            }
        }
        layers
    }
}

fn layers(tree: &ModuleTree) -> HashMap<String, Layer> {
    let of = |leaf: &Leaf| {
        let (dims, stored) = match leaf {
            Leaf::Linear(l) => (l.weight.dims(), l.weight.dtype()),
            Leaf::Conv2d(l) => (l.weight.dims(), l.weight.dtype()),
            Leaf::Norm(l) => (l.weight.dims(), l.weight.dtype()),
            Leaf::Other => return None,
        };
        let d = |i: usize| dims.get(i).map_or(1, |&n| n as u64);
        Some(Layer { out: d(0), inp: d(1), area: d(2) * d(3), stored, adapted: None })
    };
    tree.nodes.iter().filter_map(|n| Some((n.path.clone(), of(&n.leaf)?))).collect()
}

/// Plans a run.
///
/// # Errors
/// If the recipe contradicts itself, or a file that is there is no SDXL model.
pub fn plan(config: &RunConfig, request: &Request) -> Result<Plan> {
    config.check().map_err(ConfigError::Problems)?;
    let mut notes = Vec::new();
    let model = Model::new(config, &mut notes)?;
    let (largest, timeline) = inputs::data(config, &mut notes)?;
    let half = config.train.mixed_precision != MixedPrecision::No;
    let speed = request.device.speed(half, request.tflops, request.bandwidth)?;
    let run = Run { config, model: &model, device: request.device, half, largest };
    let (moments, flops, seconds, taken) = run.measure(speed, timeline);
    let memory = moments.into_iter().max_by_key(Memory::total).unwrap_or_default();
    let parameters = model.modules.iter().map(PlannedModule::parameters).sum();
    let size = if config.output.save_precision == SavePrecision::Float { 4 } else { 2 };
    let alphas = model.modules.iter().filter(|m| matches!(m.kind, PlannedKind::Lokr { .. })).count();
    let modules = model.modules.iter().map(|m| {
        let (rows, path) = taken.get(&(m.group, m.path.clone())).copied().unzip();
        Planned { parameters: m.parameters(), path, rows, module: m.clone() }
    });
    Ok(Plan {
        notes,
        modules: modules.collect(),
        parameters,
        file_bytes: ((parameters + alphas) * size) as u64,
        largest,
        memory,
        flops,
        seconds,
        timeline,
    })
}

/// Bytes that forward and backward of one batch (width, height, pictures) take on a GPU, between two steps, with nothing else of the run.
///
/// # Errors
/// If the base or the preset cannot be read.
pub(crate) fn gpu_step_bytes(config: &RunConfig, largest: (u32, u32, usize)) -> Result<u64> {
    let mut config = config.clone();
    (config.train.gradient_accumulation_steps, config.cache.cache_latents) = (1, true);
    let model = Model::new(&config, &mut Vec::new())?;
    let half = config.train.mixed_precision != MixedPrecision::No;
    let run = Run { config: &config, model: &model, device: Device::named("h100")?, half, largest };
    Ok(run.measure(None, None).0.first().map_or(0, Memory::total))
}

/// A run to be measured.
struct Run<'a> {
    config: &'a RunConfig,
    model: &'a Model,
    device: Device,
    half: bool,
    largest: (u32, u32, usize),
}

/// Rows and path of each adapted layer.
type Taken = HashMap<(ParameterGroup, String), (u64, Path)>;

impl Run<'_> {
    fn meter(&self, speed: Option<Speed>) -> Rc<Meter> {
        Meter::new(if self.half { 2 } else { 4 }, !self.device.is_cpu(), speed)
    }

    fn net(&self, meter: &Rc<Meter>, layers: HashMap<String, Layer>, compute: DType) -> Rc<Net> {
        let checkpointing = self.config.train.gradient_checkpointing;
        Rc::new(Net { meter: meter.clone(), layers, compute, checkpointing, taken: RefCell::default() })
    }

    fn compute(&self) -> DType {
        match self.config.train.mixed_precision {
            MixedPrecision::No => DType::F32,
            MixedPrecision::Fp16 => DType::F16,
            MixedPrecision::Bf16 => DType::BF16,
        }
    }

    /// Forward and backward of the largest batch, `times` in a row, and the paths that were taken.
    fn micro_steps(&self, speed: Option<Speed>, times: usize) -> (Rc<Meter>, Taken) {
        let meter = self.meter(speed);
        let (model, groups) = (&self.model.sdxl, ParameterGroup::ALL);
        let nets = groups.map(|g| (g, self.net(&meter, self.model.layers(g), self.compute())));
        let net = |group| &nets.iter().find(|(g, _)| *g == group).unwrap_or(&nets[0]).1;
        let (te1, te2, unet) = (net(ParameterGroup::TextEncoder1), net(ParameterGroup::TextEncoder2), net(ParameterGroup::Unet));
        let trains_text = self.model.modules.iter().any(|m| m.group.is_text_encoder());
        let (width, height, n) = self.largest;
        let factor = model.vae.factor() as u64;
        let (h, w, n) = (u64::from(height) / factor, u64::from(width) / factor, n as u64);
        let rows = chunks(self.config.train.max_token_length) as u64;
        for _ in 0..times {
            let encode = || unet.text([(te1, &model.te1.config), (te2, &model.te2.config)], n, rows, model.unet.config.adm_dim as u64);
            let (context, vector, tokens) = if trains_text { encode() } else { meter.without_recording(encode) };
            let prediction = unet.unet(&model.unet.config, &context, &vector, [n, h, w, tokens]);
            backward(&meter, prediction);
        }
        let mut taken = Taken::new();
        for (group, net) in &nets {
            taken.extend(net.taken.borrow().iter().map(|(path, way)| ((*group, path.clone()), *way)));
        }
        (meter, taken)
    }

    /// Peak of encoding pictures with the VAE, its weights included.
    fn encoding(&self) -> u64 {
        let vae = &self.model.sdxl.vae;
        let meter = Meter::new(4, !self.device.is_cpu(), None);
        let Ok(tree) = vae.tree() else { return 0 };
        let (width, height, n) = self.largest;
        let n = if self.config.cache.cache_latents { self.config.cache.vae_batch_size.min(n.max(1)) } else { n };
        self.net(&meter, layers(&tree), DType::F32).encode(&vae.config, [n as u64, u64::from(height), u64::from(width)]);
        let scores = if self.device.is_cpu() { ops::attention_buffers(meter.keys(), threads(self.config)) } else { 0 };
        meter.peak().0 + scores as u64 + self.freed(&meter) + weight_bytes(&tree)
    }

    /// Bytes of weights that lie in the mapped file and are not read before the first step.
    fn unread(&self) -> u64 {
        if !self.device.is_cpu() || !base::maps_weights(self.config) {
            return 0;
        }
        let (sdxl, (text, unet)) = (&self.model.sdxl, precision::weight_types(self.config));
        let text_encoders = [&sdxl.te1.tree, &sdxl.te2.tree].map(|tree| (text, tree));
        let as_in_file = text_encoders.into_iter().chain([(unet, &sdxl.unet.tree)]).filter(|(dtype, _)| dtype.is_none());
        as_in_file.map(|(_, tree)| layer_bytes(tree)).sum()
    }

    fn freed(&self, meter: &Meter) -> u64 {
        if self.device.is_cpu() { FREED * meter.largest() } else { 0 }
    }

    /// Memory at each moment of the run, FLOPs and least seconds of a step, and the paths that layers take.
    fn measure(&self, speed: Option<Speed>, timeline: Option<Timeline>) -> (Vec<Memory>, f64, Option<f64>, Taken) {
        let t = &self.config.train;
        let (first, taken) = self.micro_steps(speed, 1);
        let accumulation = t.gradient_accumulation_steps;
        let (peak, gradients) = if accumulation > 1 { self.micro_steps(None, 2).0.peak() } else { first.peak() };
        let sdxl = &self.model.sdxl;
        let embeddings = |c: &sdxl::config::ClipConfig, tree: &ModuleTree| {
            let stored = tree.nodes.iter().find_map(|n| if let Leaf::Linear(l) = &n.leaf { Some(l.weight.dtype()) } else { None });
            ((c.vocabulary + c.positions) * c.width * stored.map_or(4, |d| d.size_in_bytes())) as u64
        };
        let weights = weight_bytes(&sdxl.unet.tree)
            + weight_bytes(&sdxl.te1.tree)
            + weight_bytes(&sdxl.te2.tree)
            + embeddings(&sdxl.te1.config, &sdxl.te1.tree)
            + embeddings(&sdxl.te2.config, &sdxl.te2.tree);
        let sizes: Vec<usize> = self.model.modules.iter().flat_map(PlannedModule::sizes).collect();
        let masters = 4 * sizes.iter().sum::<usize>() as u64;
        let optimizer = Optimizer::new(t.optimizer, self.config.hyper(), &sizes).state_bytes() as u64;
        let largest = 4 * sizes.iter().max().copied().unwrap_or(0) as u64;
        let buffers = || kernel_buffers(&sdxl.unet.tree, first.keys(), threads(self.config));
        let program = if self.device.is_cpu() { OVERHEAD + buffers() } else { 0 };
        let base = Memory { weights, masters, program, ..Memory::default() };
        // The state is made by the first update; a run of one step has none before it.
        let state = if timeline.is_some_and(|t| t.total_steps == 1) { 0 } else { optimizer };
        let cached = self.config.cache.cache_latents || self.config.cache.cache_latents_to_disk;
        let snapshot = if self.device.is_cpu() { masters + optimizer } else { 0 };
        let overlapping = if self.config.output.save_every_n_steps.is_some() { snapshot } else { 0 };
        let vae = if cached { 0 } else { sdxl.vae.tree().map_or(0, |tree| weight_bytes(&tree)) };
        let mut moments = vec![
            Memory {
                optimizer: state,
                gradients,
                activations: peak - gradients + self.freed(&first) + vae,
                snapshot: overlapping,
                when: "forward and backward",
                ..base
            },
            Memory { optimizer, gradients: masters, activations: 2 * largest + vae, snapshot: overlapping, when: "the update", ..base },
            Memory { optimizer, snapshot, activations: largest + vae, when: "writing a checkpoint", ..base },
        ];
        let encoding = self.encoding();
        moments.push(match cached {
            true => Memory { weights: weights - self.unread(), activations: encoding, when: "encoding pictures", ..base },
            false => {
                let gradients = if accumulation > 1 { masters } else { 0 };
                Memory { optimizer: state, gradients, activations: encoding, when: "encoding pictures", ..base }
            }
        });
        // What the update reads and writes: master, gradient and state.
        let update = speed.map(|s| (3 * masters + masters + 2 * optimizer) as f64 / (s.bandwidth * 1e9));
        let seconds = first.seconds().zip(update).map(|(micro, update)| micro * accumulation as f64 + update);
        (moments, first.flops() * accumulation as f64, seconds, taken)
    }
}
