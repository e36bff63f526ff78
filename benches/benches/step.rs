//! One training step (forward, backward, Lion8bit) with and without recomputed activations: the golden data's tiny model and
//! the 208 M one, 32x32 latents, batch 1, f32.

use std::process::ExitCode;
use std::time::Duration;

use benches::model::Config;
use benches::step::{Setup, Step};
use benches::{Result, in_pool};
use criterion::{Criterion, SamplingMode};
use sdxl::GradientCheckpointing;

/// The allocator of the `lokr` binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let ran = in_pool(None, || {
        let mut criterion = Criterion::default().configure_from_args();
        for config in Config::ALL {
            steps(&mut criterion, config)?;
        }
        criterion.final_summary();
        Ok(())
    });
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn steps(criterion: &mut Criterion, config: Config) -> Result<()> {
    let mut group = criterion.benchmark_group(format!("step/{}", config.name()));
    // Criterion takes ten samples at least; a mid step runs once for each.
    group.sample_size(10).sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(if config == Config::Mid { 1 } else { 3 }));
    for (name, checkpointing) in [("plain", GradientCheckpointing::None), ("checkpointing", GradientCheckpointing::Block)] {
        let mut step: Option<Step> = None;
        let setup = Setup { config, latent: 32, batch: 1, checkpointing, path: None, bf16: false };
        let mut failed = None;
        group.bench_function(name, |bencher| {
            // Made here, so that a bench that the filter leaves out loads no model.
            if step.is_none() {
                step = Step::new(&setup).map_err(|error| failed = Some(error)).ok();
            }
            let Some(step) = &mut step else { return bencher.iter(|| ()) };
            bencher.iter(|| failed = step.run().err().or(failed.take()));
        });
        if let Some(error) = failed {
            return Err(error);
        }
    }
    group.finish();
    Ok(())
}
