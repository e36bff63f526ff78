//! The `lokr` binary: arguments in, messages and exit status out. What it does is in the crate `trainer`.
//!
//! Exit status: 0 done, 1 an error, 2 wrong arguments, 3 stopped by a signal with the state saved, 75 ended because of another
//! process of the run, 130 stopped at once. `lokr launch` ends with the status of the process that died.

mod args;
mod launch;
mod show;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use trainer::config::{RunConfig, template};
use trainer::dataset_tools;
use trainer::event::Event;
use trainer::init_base;
use trainer::interrupt::Interrupt;
use trainer::plan;
use trainer::tools;
use trainer::train::{Options, Outcome, in_pool, train};
use trainer::verify::verify;
use trainer::{Error, Result};

use args::{Cli, Command, Dataset, Export, Format, Precision};

/// Training allocates and frees the same large tensors at each step: an allocator that keeps freed memory saves the page faults,
/// which took half of the time of a step with the system's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Status of a run that a signal stopped, its state saved.
const INTERRUPTED: u8 = 3;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr).without_time().with_target(false).init();
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            show::error(&error);
            if error.is_peer_failure() { ExitCode::from(launch::PEER_FAILED) } else { ExitCode::FAILURE }
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Train(args) => return run_training(args),
        Command::Launch(args) => return launch::launch(args),
        Command::Sample(args) => sample(args)?,
        Command::Export(Export::Merged(args)) => merged(args)?,
        Command::Export(Export::Lokr(args)) => {
            let path = tools::export_lokr(&args.run, &args.out, args.precision.into())?;
            println!("wrote {} from {}", args.out.display(), path.display());
        }
        Command::Inspect(args) => print!("{}", tools::inspect(&args.file, args.metadata)?),
        Command::Dataset(command) => return dataset(command),
        Command::Verify(args) => {
            let report = verify(&args.run)?;
            report.good.iter().for_each(|line| println!("good  {line}"));
            report.bad.iter().for_each(|line| println!("BAD   {line}"));
            report.skipped.iter().for_each(|line| println!("skip  {line}"));
            println!("{} good, {} bad", report.good.len(), report.bad.len());
            if !report.bad.is_empty() {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::CheckGpu(args) => {
            let config = args.config.map(|file| RunConfig::load(&file, &args.set)).transpose()?;
            let report = in_pool(None, || trainer::gpu_check::check(config.as_ref()))?;
            print!("{}", report.text);
            if report.failed > 0 {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Recipe => print!("{}", template()),
        Command::Plan(args) => {
            let config = RunConfig::load(&args.recipe.config, &args.recipe.set)?;
            let request = plan::Request { device: plan::Device::named(&args.device)?, tflops: args.tflops, bandwidth: args.bandwidth };
            let plan = plan::plan(&config, &request)?;
            print!("{}", plan::Report { plan: &plan, config: &config, request: &request, layers: args.layers });
        }
        Command::InitBase(args) => {
            let diffusers = matches!(args.format, Format::Diffusers);
            let shapes = init_base::shapes(&args.config)?;
            let end = if diffusers { "" } else { ".safetensors" };
            let out = args.out.unwrap_or_else(|| format!("random-{}{end}", args.config).into());
            let parameters = in_pool(None, || init_base::init_base(&shapes, args.seed, &out, diffusers))?;
            println!("wrote {}: {parameters} random parameters", out.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run_training(args: args::Train) -> Result<ExitCode> {
    trainer::launch::end_with_launcher()?;
    let mut set = args.set;
    if let Some(resume) = args.resume {
        let resume = if resume == "latest" { "auto".to_string() } else { resume };
        // A TOML string in single quotes takes backslashes as they are.
        set.push(format!("output.resume='{resume}'"));
    }
    let config = RunConfig::load(&args.config, &set)?;
    let interrupt = listen()?;
    let mut watcher = show::Watcher::default();
    let options = Options { allow_recipe_change: args.allow_recipe_change, interrupt };
    let outcome = train(&config, &options, &mut |event| watcher.event(event))?;
    watcher.done();
    Ok(match outcome {
        Outcome::Finished => ExitCode::SUCCESS,
        Outcome::Interrupted => ExitCode::from(INTERRUPTED),
    })
}

fn dataset(command: Dataset) -> Result<ExitCode> {
    let interrupt = listen()?;
    let mut watcher = show::Watcher::default();
    let load = |recipe: &args::Recipe| RunConfig::load(&recipe.config, &recipe.set);
    match command {
        Dataset::Index(a) => {
            let observe = &mut |event| watcher.event(event);
            let text = dataset_tools::index(&a.out, &a.sources, a.counted, a.threads, &interrupt, observe)?;
            watcher.done();
            print!("{text}");
        }
        Dataset::Buckets(a) => print!("{}", dataset_tools::buckets(&load(&a.recipe)?, a.svg.as_deref())?),
        Dataset::Check(a) => {
            let config = load(&a.recipe)?;
            let (text, clean) = dataset_tools::check(&config, a.headers, &interrupt, &mut |event| watcher.event(event))?;
            watcher.done();
            println!("{}", text.trim_end());
            if !clean {
                return Ok(ExitCode::FAILURE);
            }
        }
        Dataset::Rules(a) => print!("{}", dataset_tools::rules(a.captions.as_deref(), a.selection.as_deref(), a.index.as_deref())?),
        Dataset::Caption(a) => print!("{}", dataset_tools::caption(&load(&a.recipe)?, a.id, a.step)?),
    }
    Ok(ExitCode::SUCCESS)
}

/// Listens to Ctrl-C and SIGTERM.
fn listen() -> Result<Interrupt> {
    Interrupt::listen()
        .map_err(|e| Error::refused(format!("signals cannot be listened to: {e}"), "this is not expected on this system: please report it"))
}

fn sample(args: args::Sample) -> Result<()> {
    let lokr = args.lokr.as_deref().map(file_and_strength).transpose()?;
    let request = tools::SampleRequest {
        base: args.base.base,
        vae: args.base.vae,
        lokr,
        prompts: args.prompt,
        negative_prompt: args.negative_prompt,
        size: (args.width, args.height),
        steps: args.steps,
        guidance_scale: args.guidance_scale,
        seed: args.seed,
        count: args.count,
        sampler: args.sampler,
        scheduler: args.scheduler,
        v_parameterization: args.v_parameterization,
        out: args.out,
    };
    let mut watcher = show::Watcher::default();
    in_pool(None, || tools::sample(&request, &mut |event| watcher.event(event)))
}

fn merged(args: args::Merged) -> Result<()> {
    let (lokr, multiplier) = file_and_strength(&args.lokr)?;
    let merge = tools::MergeRequest {
        base: args.base.base,
        vae: args.base.vae,
        lokr,
        multiplier,
        out: args.out.clone(),
        diffusers: matches!(args.format, Format::Diffusers),
        precision: args.precision.map(Into::into),
        lycoris_scale: args.lycoris_scale,
    };
    let mut watcher = show::Watcher::default();
    let merged = in_pool(None, || tools::export_merged(&merge))?;
    for key in merged.unmatched.iter().take(10) {
        watcher.event(Event::Warning(format!("the adapter's {key} fits no layer of the base model")));
    }
    println!("wrote {}: {} tensors merged", args.out.display(), merged.tensors);
    Ok(())
}

/// `file.safetensors:0.8` as path and strength. A file whose whole name exists is never cut.
fn file_and_strength(text: &str) -> Result<(PathBuf, f64)> {
    if Path::new(text).exists() {
        return Ok((text.into(), 1.0));
    }
    let Some((file, strength)) = text.rsplit_once(':') else { return Ok((text.into(), 1.0)) };
    match strength.parse::<f64>() {
        Ok(strength) if strength.is_finite() => Ok((file.into(), strength)),
        _ => Err(Error::refused(
            format!("--lokr {text}: there is no such file, and `{strength}` is no strength"),
            "write the file alone, or a number behind the colon: file.safetensors:0.8",
        )),
    }
}

impl From<Precision> for trainer::config::SavePrecision {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::Float => Self::Float,
            Precision::Fp16 => Self::Fp16,
            Precision::Bf16 => Self::Bf16,
        }
    }
}
