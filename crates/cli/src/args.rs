//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Fine-tune SDXL with LoKr.
#[derive(Parser)]
#[command(name = "lokr", version, about, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand)]
pub enum Command {
    /// Train the adapter of a recipe. Run again, it goes on where it stopped.
    Train(Train),
    /// Start one process for each device, and stop all when one dies.
    Launch(Launch),
    /// Draw pictures with a base model and, if given, an adapter.
    Sample(Sample),
    /// Write a merged checkpoint, or the adapter of a run.
    #[command(subcommand)]
    Export(Export),
    /// Show what a model or adapter file holds.
    Inspect(Inspect),
    /// Index pictures, and look at what a recipe makes of them.
    #[command(subcommand)]
    Dataset(Dataset),
    /// Check every file of a run: hashes, finite values, and that exported adapters equal their checkpoints.
    Verify(Verify),
    /// Compare this machine's GPU with the CPU, and time a training step; the report can be pasted into an issue.
    CheckGpu(CheckGpu),
    /// Print a recipe with every key, its meaning and its default.
    Recipe,
    /// Say what a run will take before it starts: adapters, memory, FLOPs, time. No weights are read.
    Plan(Plan),
    /// Write a base model of random weights, for measuring and for trying a recipe.
    InitBase(InitBase),
}

/// Arguments of `lokr train`.
#[derive(Args)]
pub struct Train {
    /// The recipe.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Replace a key of the recipe, as `train.unet_lr=1e-4`. May be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Go on from this checkpoint, or from `latest`, the newest whole one of output.dir. (Replaces output.resume.)
    #[arg(long, value_name = "CHECKPOINT|latest", overrides_with = "resume")]
    pub resume: Option<String>,
    /// Resume although the recipe differs from the checkpoint's in what changes the result.
    #[arg(long)]
    pub allow_recipe_change: bool,
}

/// Arguments of `lokr launch`; the names are torchrun's.
#[derive(Args)]
pub struct Launch {
    /// Processes on this machine: one for each of its devices.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub nproc_per_node: usize,
    /// Machines. Run the same command on each, with its own --node-rank.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub nnodes: usize,
    /// Number of this machine, from 0.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub node_rank: usize,
    /// Where the processes meet: a name or address of machine 0, and a free port there. On one machine, a free port is taken.
    #[arg(long, value_name = "HOST:PORT")]
    pub rdzv_endpoint: Option<String>,
    /// How often all processes are started again, from the newest whole checkpoint, after one died.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub max_restarts: u32,
    /// What each process runs: `train` and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<std::ffi::OsString>,
}

/// Arguments of `lokr check-gpu`.
#[derive(Args)]
pub struct CheckGpu {
    /// A recipe whose step is compared and timed as well; its pictures are not read.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Replace a key of the recipe.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", requires = "config")]
    pub set: Vec<String>,
}

/// The base model, for commands without a recipe.
#[derive(Args)]
pub struct Base {
    /// Base model: a single-file checkpoint or a diffusers folder.
    #[arg(long, value_name = "PATH")]
    pub base: PathBuf,
    /// A VAE that replaces the base model's.
    #[arg(long, value_name = "PATH")]
    pub vae: Option<PathBuf>,
}

/// Arguments of `lokr sample`.
#[derive(Args)]
pub struct Sample {
    /// The base model.
    #[command(flatten)]
    pub base: Base,
    /// An adapter file, with its strength behind a colon if it is not 1: `kohaku.safetensors:0.8`.
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    pub lokr: Option<String>,
    /// The text; `(tag:1.1)` and `\(` are understood. May be given several times.
    #[arg(long, required = true)]
    pub prompt: Vec<String>,
    /// What guidance leads away from.
    #[arg(long, default_value = "")]
    pub negative_prompt: String,
    /// Folder or, for one picture, PNG file to write.
    #[arg(long, value_name = "PATH", default_value = "samples")]
    pub out: PathBuf,
    /// Width in pixels.
    #[arg(long, default_value_t = 1024)]
    pub width: u32,
    /// Height in pixels.
    #[arg(long, default_value_t = 1024)]
    pub height: u32,
    /// Sampling steps.
    #[arg(long, default_value_t = 30)]
    pub steps: u32,
    /// Classifier-free guidance; 1 or less: none.
    #[arg(long, default_value_t = 7.5)]
    pub guidance_scale: f64,
    /// Seed; the n-th picture of a prompt takes seed + n.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Pictures of each prompt.
    #[arg(long, default_value_t = 1)]
    pub count: u64,
    /// euler, euler_ancestral, dpmpp_2m or ddim.
    #[arg(long, default_value = "euler")]
    pub sampler: String,
    /// Spacing of the noise levels: uniform, karras, sgm_uniform, leading or leading_karras.
    #[arg(long, default_value = "uniform")]
    pub scheduler: String,
    /// The base model predicts v.
    #[arg(long)]
    pub v_parameterization: bool,
}

/// Kinds of export.
#[derive(Subcommand)]
pub enum Export {
    /// The base model with an adapter merged.
    Merged(Merged),
    /// The adapter of a run's checkpoint, as a file that other programs load.
    Lokr(Lokr),
}

/// Arguments of `lokr export merged`.
#[derive(Args)]
pub struct Merged {
    /// The base model.
    #[command(flatten)]
    pub base: Base,
    /// The adapter file, with its strength behind a colon if it is not 1.
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    pub lokr: String,
    /// File or folder to write.
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// Layout to write.
    #[arg(long, value_enum, default_value_t = Format::Single)]
    pub format: Format,
    /// Number format to write; without it, the base model's.
    #[arg(long, value_enum)]
    pub precision: Option<Precision>,
    /// Multiply by the scale twice, as LyCORIS's own merge does: for comparison with files merged there.
    #[arg(long)]
    pub lycoris_scale: bool,
}

/// Arguments of `lokr export lokr`.
#[derive(Args)]
pub struct Lokr {
    /// The run's folder, or one of its checkpoints.
    #[arg(long, value_name = "FOLDER")]
    pub run: PathBuf,
    /// File to write.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Number format to write.
    #[arg(long, value_enum, default_value_t = Precision::Fp16)]
    pub precision: Precision,
}

/// Arguments of `lokr inspect`.
#[derive(Args)]
pub struct Inspect {
    /// A checkpoint, a diffusers folder, or an adapter file.
    pub file: PathBuf,
    /// Print the metadata too.
    #[arg(long)]
    pub metadata: bool,
}

/// The commands about pictures.
#[derive(Subcommand)]
pub enum Dataset {
    /// Build an index of pictures, or bring it up to date: from folders, tar shards, and metadata of posts.
    Index(Index),
    /// Show the buckets of a recipe's pictures: images, crop loss, left-overs.
    Buckets(Buckets),
    /// Read every picture of a recipe and name what would fail or teach nothing later.
    Check(Check),
    /// Show the captions that a step sees, or those of one picture.
    Caption(Caption),
    /// Print built-in rules as TOML, to start one's own from.
    Rules(Rules),
}

/// Arguments of `lokr dataset index`.
#[derive(Args)]
pub struct Index {
    /// The index (SQLite); made if absent.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Folders, shards, databases, JSON and parquet files. None: look through those of the last time again.
    pub sources: Vec<PathBuf>,
    /// Number the pictures from 1, whatever their names are.
    #[arg(long)]
    pub counted: bool,
    /// Threads that read; 0: one for each core.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
}

/// A recipe, of which the pictures are looked at.
#[derive(Args)]
pub struct Recipe {
    /// The recipe.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Replace a key of the recipe. May be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
}

/// Arguments of `lokr dataset buckets`.
#[derive(Args)]
pub struct Buckets {
    /// The recipe.
    #[command(flatten)]
    pub recipe: Recipe,
    /// Also draw them into this SVG file.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// Arguments of `lokr dataset check`.
#[derive(Args)]
pub struct Check {
    /// The recipe.
    #[command(flatten)]
    pub recipe: Recipe,
    /// Look at headers only, without decoding.
    #[arg(long)]
    pub headers: bool,
}

/// Arguments of `lokr dataset caption`.
#[derive(Args)]
pub struct Caption {
    /// The recipe.
    #[command(flatten)]
    pub recipe: Recipe,
    /// A picture: its id in the index, or its number in the folder, from 0.
    #[arg(long)]
    pub id: Option<u32>,
    /// The step, from 0; with --id, the epoch of this step.
    #[arg(long)]
    pub step: Option<u64>,
}

/// Arguments of `lokr dataset rules`.
#[derive(Args)]
pub struct Rules {
    /// Caption rules (`caption_rules` of a subset): a built-in name, or a TOML file to see it complete.
    #[arg(long, value_name = "NAME")]
    pub captions: Option<String>,
    /// A selection (`selection` of a subset): a built-in name, or a TOML file to see it complete.
    #[arg(long, value_name = "NAME", conflicts_with = "captions")]
    pub selection: Option<String>,
    /// With --captions: thresholds of the quality words from the favourites of this index's posts.
    #[arg(long, value_name = "FILE", requires = "captions")]
    pub index: Option<PathBuf>,
}

/// Arguments of `lokr plan`.
#[derive(Args)]
pub struct Plan {
    /// The recipe.
    #[command(flatten)]
    pub recipe: Recipe,
    /// Plan for this device: cpu, or a GPU by name (rtx3090, rtx4090, a100, h100).
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Its speed in matrix products, TFLOP/s, in place of what is known of it.
    #[arg(long)]
    pub tflops: Option<f64>,
    /// Its memory bandwidth in GB/s, in place of what is known of it.
    #[arg(long)]
    pub bandwidth: Option<f64>,
    /// Print every adapted layer, not only their kinds.
    #[arg(long)]
    pub layers: bool,
}

/// Arguments of `lokr init-base`.
#[derive(Args)]
pub struct InitBase {
    /// Shapes: sdxl (about 7 GB), mid or tiny.
    #[arg(long, default_value = "sdxl")]
    pub config: String,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// File or folder to write; "random-" and the name of the shapes if not given.
    #[arg(long, value_name = "PATH")]
    pub out: Option<PathBuf>,
    /// Layout to write.
    #[arg(long, value_enum, default_value_t = Format::Single)]
    pub format: Format,
}

/// Arguments of `lokr verify`.
#[derive(Args)]
pub struct Verify {
    /// The run's folder.
    pub run: PathBuf,
}

/// Layout of a checkpoint.
#[derive(Clone, Copy, ValueEnum)]
pub enum Format {
    /// One safetensors file, SGM names.
    Single,
    /// A diffusers folder.
    Diffusers,
}

/// Number format of written tensors.
#[derive(Clone, Copy, ValueEnum)]
pub enum Precision {
    /// f32.
    Float,
    /// f16.
    Fp16,
    /// bf16.
    Bf16,
}
