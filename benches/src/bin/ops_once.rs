//! Times the single ops and prints one JSON line for each, with the fields of `benches/torch/ops.py`. The criterion bench
//! `ops` measures the same with statistics; this program is for running both sides alternately.

use std::process::ExitCode;
use std::time::Instant;

use benches::{Result, cases, in_pool, median};
use clap::Parser;
use serde_json::json;

/// The allocator of the `lokr` binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Times single ops and prints one JSON line for each.
#[derive(Parser)]
struct Args {
    /// Runs that are timed; two more go before them.
    #[arg(long, default_value_t = 15)]
    runs: usize,
    /// Threads; one per core if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Only ops whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match in_pool(args.threads, || run(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    for mut case in cases::all()?.into_iter().filter(|case| case.name.contains(&args.only)) {
        let mut times = Vec::with_capacity(args.runs);
        for i in 0..args.runs + 2 {
            let start = Instant::now();
            (case.run)()?;
            if i >= 2 {
                times.push(start.elapsed().as_secs_f64());
            }
        }
        let seconds = median(&times);
        let line = json!({
            "program": "lokr",
            "op": case.name,
            "threads": rayon::current_num_threads(),
            "median_ms": (seconds * 1e6).round() / 1e3,
            case.work.unit(): (case.work.rate(seconds) * 10.0).round() / 10.0,
        });
        println!("{line}");
    }
    Ok(())
}
