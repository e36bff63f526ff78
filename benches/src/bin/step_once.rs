//! Times one training step in a process of its own and prints one JSON line, with the fields of `benches/torch/step.py`.
//!
//! `peak_rss_mib` is the whole process's, reading the model included; `step_peak_rss_mib` that of the steps alone.

use std::process::ExitCode;
use std::time::Instant;

use benches::model::Config;
use benches::step::{Setup, Step};
use benches::{Result, ended, in_pool, median, memory, request};
use clap::{Parser, ValueEnum};
use lokr::functional::Path;
use sdxl::GradientCheckpointing;
use serde_json::json;

/// The allocator of the `lokr` binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Times one training step (forward, backward, Lion8bit) of a UNet under LoKr and prints one JSON line.
#[derive(Parser)]
struct Args {
    /// Model: the golden data's tiny one, or 208 M parameters.
    #[arg(long, default_value = "tiny")]
    config: Size,
    /// Height and width of the latents.
    #[arg(long, default_value_t = 32)]
    latent: usize,
    /// Samples per step.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Steps that are timed; one more goes before them.
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Threads; one per core if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Recompute activations in the backward pass.
    #[arg(long)]
    checkpointing: bool,
    /// How adapted layers are computed.
    #[arg(long, default_value = "auto")]
    path: Way,
    /// Number format of products: "bf16" where the CPU multiplies it.
    #[arg(long, default_value = "f32")]
    dtype: Type,
    /// Run two steps for each line of standard input, time the second, and print the JSON line when it ends.
    #[arg(long)]
    on_request: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Size {
    Tiny,
    Mid,
}

#[derive(Clone, Copy, ValueEnum)]
enum Way {
    Auto,
    Merged,
    Factored,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Type {
    F32,
    Bf16,
}

fn main() -> ExitCode {
    let args = Args::parse();
    ended(in_pool(args.threads, || run(&args)).map(|line| println!("{line}")))
}

fn run(args: &Args) -> Result<String> {
    let config = match args.config {
        Size::Tiny => Config::Tiny,
        Size::Mid => Config::Mid,
    };
    let (path, way) = match args.path {
        Way::Auto => (None, "auto"),
        Way::Merged => (Some(Path::Merged), "merged"),
        Way::Factored => (Some(Path::Factored), "factored"),
    };
    // Writing it needs memory that is no part of the measurement, so a first call only writes.
    config.file()?;
    let checkpointing = if args.checkpointing { GradientCheckpointing::Block } else { GradientCheckpointing::None };
    let bf16 = args.dtype == Type::Bf16;
    if bf16 && !ops::has_bf16() {
        return Err("this CPU does not multiply bf16".into());
    }
    let setup = Setup { config, latent: args.latent, batch: args.batch, checkpointing, path, bf16 };
    let mut step = Step::new(&setup)?;
    let load_peak = memory::peak_mib();
    memory::reset_peak();
    let loaded = memory::resident_mib();
    let (mut times, mut loss) = (Vec::new(), 0.0);
    let mut timed = || -> Result<f64> {
        let start = Instant::now();
        loss = step.run()?;
        times.push(start.elapsed().as_secs_f64());
        Ok(times[times.len() - 1])
    };
    timed()?;
    if args.on_request {
        // While it waited, the allocator gave memory back; the first step fetches it again, as no step of a run does.
        request::serve(&["step"], |_| timed().and_then(|_| Ok(json!({ "seconds": timed()? }))))?;
    } else {
        for _ in 0..args.steps {
            timed()?;
        }
    }
    let step_peak = memory::peak_mib();
    let line = json!({
        "program": "lokr",
        "config": config.name(),
        "dtype": if bf16 { "bf16" } else { "f32" },
        "latent": args.latent,
        "batch": args.batch,
        "threads": args.threads.unwrap_or_else(rayon::current_num_threads),
        "checkpointing": args.checkpointing,
        "path": way,
        "base_parameters": step.base_parameters(),
        "lokr_parameters": step.lokr_parameters(),
        "steps": times.len() - 1,
        "median_s": round(median(&times[1..])),
        "min_s": round(times[1..].iter().copied().fold(f64::INFINITY, f64::min)),
        "first_s": round(times[0]),
        "peak_rss_mib": load_peak.max(step_peak),
        "step_peak_rss_mib": step_peak,
        "loaded_rss_mib": loaded,
        "loss": loss,
    });
    Ok(line.to_string())
}

fn round(seconds: f64) -> f64 {
    (seconds * 1e4).round() / 1e4
}
