//! Times the single ops and prints one JSON line for each, with the fields of `benches/torch/ops.py`. The criterion bench
//! `ops` measures the same with statistics; this program is for running both sides alternately.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use benches::cases::{self, Case};
use benches::{Result, ended, in_pool, median, request};
use clap::Parser;
use serde_json::{Value, json};

/// The allocator of the `lokr` binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Times single ops and prints one JSON line for each.
#[derive(Parser)]
struct Args {
    /// Runs that are timed; two more, and as many as take 30 milliseconds, go before them.
    #[arg(long, default_value_t = 15)]
    runs: usize,
    /// Threads; one per core if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Only ops whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Time one op for each line of standard input, which names it.
    #[arg(long)]
    on_request: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    ended(in_pool(args.threads, || run(&args)))
}

fn run(args: &Args) -> Result<()> {
    let mut cases: Vec<Case> = cases::all()?.into_iter().filter(|case| case.name.contains(&args.only)).collect();
    let names: Vec<&str> = cases.iter().map(|case| case.name).collect();
    let mut timed = |name: &str| {
        let case = cases.iter_mut().find(|case| case.name == name).ok_or_else(|| format!("there is no op {name}"))?;
        // As in a step of the trainer.
        ops::awake(|| time(case, args.runs))
    };
    if args.on_request {
        return request::serve(&names, timed);
    }
    for name in &names {
        println!("{}", timed(name)?);
    }
    Ok(())
}

/// A core that slept needs some time to run, and a thread to be put on it.
const WARM: Duration = Duration::from_millis(30);

fn time(case: &mut Case, runs: usize) -> Result<Value> {
    let mut times = Vec::with_capacity(runs);
    let (begin, mut before) = (Instant::now(), 0);
    while before < 2 || begin.elapsed() < WARM {
        (case.run)()?;
        before += 1;
    }
    for _ in 0..runs {
        let start = Instant::now();
        (case.run)()?;
        times.push(start.elapsed().as_secs_f64());
    }
    let seconds = median(&times);
    Ok(json!({
        "program": "lokr",
        "op": case.name,
        "threads": rayon::current_num_threads(),
        "seconds": seconds,
        "min_seconds": times.iter().copied().fold(f64::INFINITY, f64::min),
        case.work.unit(): (case.work.rate(seconds) * 10.0).round() / 10.0,
    }))
}
