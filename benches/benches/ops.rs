//! The single ops: forward, and forward with backward, at shapes of SDXL's first levels; Lion8bit beside a plain copy.

use std::process::ExitCode;
use std::time::Duration;

use benches::cases::{self, Work};
use benches::in_pool;
use criterion::{Criterion, Throughput};

/// The allocator of the `lokr` binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let ran = in_pool(None, || {
        let mut criterion = Criterion::default().configure_from_args();
        let mut group = criterion.benchmark_group("ops");
        group.sample_size(15).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
        for mut case in cases::all()? {
            group.throughput(match case.work {
                Work::Flops(n) => Throughput::Elements(n),
                Work::Bytes(n) => Throughput::Bytes(n),
            });
            let mut failed = None;
            group.bench_function(case.name, |bencher| bencher.iter(|| failed = (case.run)().err().or(failed.take())));
            if let Some(error) = failed {
                return Err(error);
            }
        }
        group.finish();
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
