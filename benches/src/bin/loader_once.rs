//! The loader alone: its speed beside PyTorch's (`benches/torch/loader.py`), and its memory over indexes of any length.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use benches::{Result, ended, in_pool, loader, memory, request};
use clap::Parser;
use dataset::Interpolation;
use dataset::index::{self, BuildOptions, Ids, Source};
use rusqlite::Connection;
use serde_json::json;
use trainer::data::Data;

/// The allocator of the `lokr` binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Loads pictures as a run does and prints how fast, or with how much memory.
#[derive(Parser)]
struct Args {
    /// Folder with folders `webp` and `jpeg` of pictures (`benches/torch/pictures.py` makes one).
    #[arg(long)]
    pictures: PathBuf,
    /// Threads that load; one per core if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Time one epoch of a case for each line of standard input.
    #[arg(long)]
    on_request: bool,
    /// Load from an index of so many images, which all are the folder's few files, and print the memory that it takes.
    #[arg(long)]
    images: Option<u32>,
    /// With `images`: batches that are loaded.
    #[arg(long, default_value_t = 100)]
    batches: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or_else(cores);
    let work = || match args.images {
        Some(images) => measure_memory(&args, images, threads),
        None => measure_speed(&args, threads),
    };
    ended(in_pool(Some(threads), work))
}

/// Cases: format, and how pictures are made smaller. Lanczos is what the PyTorch side does; the area mean is the default here.
const CASES: [(&str, &str, Option<Interpolation>); 4] = [
    ("webp, lanczos", "webp", Some(Interpolation::Lanczos)),
    ("jpeg, lanczos", "jpeg", Some(Interpolation::Lanczos)),
    ("webp, area", "webp", None),
    ("jpeg, area", "jpeg", None),
];

fn measure_speed(args: &Args, threads: usize) -> Result<()> {
    let open = |(name, folder, resize): (&'static str, &str, _)| -> Result<(&'static str, Arc<Data>)> {
        Ok((name, loader::open(loader::config(&args.pictures.join(folder), false, resize))?))
    };
    let cases = CASES.into_iter().map(open).collect::<Result<Vec<_>>>()?;
    let time = |name: &str| -> Result<(f64, usize)> {
        let data = &cases.iter().find(|(case, _)| *case == name).ok_or_else(|| format!("there is no case `{name}`"))?.1;
        loader::run(data, threads, usize::MAX)
    };
    if args.on_request {
        return request::serve(&CASES.map(|(name, ..)| name), |name| {
            let (seconds, pictures) = time(name)?;
            Ok(json!({ "seconds": seconds, "pictures_per_s": pictures as f64 / seconds }))
        });
    }
    for (name, ..) in CASES {
        time(name)?;
        let (seconds, pictures) = time(name)?;
        println!("{name:<14} {:>7.1} pictures/s", pictures as f64 / seconds);
    }
    Ok(())
}

fn measure_memory(args: &Args, images: u32, threads: usize) -> Result<()> {
    let index = std::env::temp_dir().join(format!("lokr-bench-loader-{images}-{}.sqlite", std::process::id()));
    make_index(&args.pictures.join("webp"), &index, images)?;
    // Nothing of the making counts.
    memory::reset_peak();
    let data = loader::open(loader::config(&index, true, None))?;
    data.plan(0)?;
    let (opened, opening) = (memory::resident_mib(), memory::peak_mib());
    memory::reset_peak();
    let (seconds, pictures) = loader::run(&data, threads, args.batches)?;
    let peak = memory::peak_mib();
    println!(
        "{images:>9} images: {opened:>5} MiB with dataset and plan (peak of opening {opening} MiB), peak while loading {peak} MiB, \
         so {} MiB for the loader; {pictures} pictures, {:.1} a second",
        peak.saturating_sub(opened),
        pictures as f64 / seconds
    );
    Ok(storage::remove_file(&index)?)
}

/// An index of a folder in which each file stands for many images.
fn make_index(folder: &Path, path: &Path, images: u32) -> Result<()> {
    let sources = vec![Source::folder(std::path::absolute(folder)?)];
    let options = BuildOptions { index: path.into(), sources, ids: Ids::Counted, threads: 1 };
    index::build(&options, &mut |_| std::ops::ControlFlow::Continue(()))?;
    let connection = Connection::open(path)?;
    connection.execute_batch(&format!(
        "CREATE TEMP TABLE few AS SELECT * FROM image WHERE state = 0;
         DELETE FROM image;
         WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n WHERE id < {images})
         INSERT INTO image SELECT n.id, f.state, f.format, f.width, f.height, f.rating, f.score, f.fav_count, f.date, f.flags, f.file
         FROM n JOIN few f ON f.rowid = 1 + n.id % (SELECT count(*) FROM few);
         INSERT OR REPLACE INTO caption SELECT id, 'a picture of many words, number ' || id FROM image;"
    ))?;
    Ok(())
}
