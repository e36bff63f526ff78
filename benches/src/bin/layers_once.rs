//! Prints a table of all layer shapes of SDXL under a recipe's preset: FLOPs and time of a forward and backward pass by LyCORIS's
//! way and by both of ours.

use std::path::PathBuf;
use std::process::ExitCode;

use benches::layers::{self, WAYS, Way};
use benches::{Result, ended, in_pool};
use candle_core::DType;
use clap::{Parser, ValueEnum};
use lokr::functional::Path;
use trainer::config::RunConfig;

/// The allocator of the `lokr` binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Prints FLOPs and time of every layer shape of a recipe's model by LyCORIS's way and by both of ours.
#[derive(Parser)]
struct Args {
    /// The recipe whose preset says what is adapted; where its base model is not there, SDXL's shapes are taken.
    #[arg(long, default_value = "configs/kohaku-xl-epsilon.toml")]
    config: PathBuf,
    /// Width and height of the pictures.
    #[arg(long, default_value_t = 1024)]
    resolution: usize,
    /// Type of the frozen weights.
    #[arg(long, default_value = "f32")]
    weights: Stored,
    /// Passes that are timed, of each way in turn.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Threads; one per core if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Only layers whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum Stored {
    F32,
    F16,
}

fn main() -> ExitCode {
    let args = Args::parse();
    ended(in_pool(args.threads, || run(&args)))
}

fn run(args: &Args) -> Result<()> {
    let (weight, stored) = match args.weights {
        Stored::F32 => ("float", DType::F32),
        Stored::F16 => ("fp16", DType::F16),
    };
    let set = [
        format!("dataset.resolution={}", args.resolution),
        "train.batch_size=1".into(),
        "train.mixed_precision=no".into(),
        "train.initial_loss_scale=65536".into(),
        format!("model.weight_dtype={weight}"),
    ];
    let config = RunConfig::load(&args.config, &set)?;
    println!(
        "| layer | rows | a, b, c, d | layers | GFLOP LyCORIS | merged | factored | ms LyCORIS | merged | factored | auto takes | it against LyCORIS |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    let (mut flops, mut seconds, mut taken, mut best) = ([0.0; 3], [0.0; 3], 0.0, 0.0);
    for case in layers::cases(&config)?.into_iter().filter(|c| c.shape.name().contains(&args.only)) {
        let times = layers::time(case.shape, stored, args.runs)?;
        let work = WAYS.map(|way| case.shape.flops(way));
        let place = WAYS.iter().position(|&way| way == Way::Ours(case.chosen)).unwrap_or(1);
        let n = case.count as f64;
        for i in 0..3 {
            (flops[i], seconds[i]) = (flops[i] + n * work[i], seconds[i] + n * times[i]);
        }
        taken += n * times[place];
        best += n * times[1].min(times[2]);
        let name = if case.chosen == Path::Merged { "merged" } else { "factored" };
        println!(
            "| {} | {} | {} | {} | {:.3} | {:.3} | {:.3} | {:.2} | {:.2} | {:.2} | {name} | {:.2} |",
            case.shape.name(),
            case.shape.rows,
            case.shape.sides.map(|n| n.to_string()).join(", "),
            case.count,
            work[0] / 1e9,
            work[1] / 1e9,
            work[2] / 1e9,
            times[0] * 1e3,
            times[1] * 1e3,
            times[2] * 1e3,
            times[place] / times[0],
        );
    }
    println!(
        "| all layers | | | | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} ms | {:.2} |",
        flops[0] / 1e9,
        flops[1] / 1e9,
        flops[2] / 1e9,
        seconds[0] * 1e3,
        seconds[1] * 1e3,
        seconds[2] * 1e3,
        taken * 1e3,
        taken / seconds[0],
    );
    println!("\nThe faster path of each layer, chosen by these times: {:.0} ms; auto's choice: {:.0} ms.", best * 1e3, taken * 1e3);
    Ok(())
}
