//! An index of the full size of danbooru: built from generated metadata in HakuBooru's form, loaded for training, planned,
//! captioned. Each part runs in a process of its own, so that its peak of memory is its own.
//!
//! `cargo bench -p dataset --bench index` (5.2 million posts, about 3 GB in the temporary folder, deleted afterwards);
//! LOKR_BENCH_ROWS=100000 for a quick look, LOKR_BENCH_DIR for another folder, which is kept.
#![allow(clippy::disallowed_methods)] // a bench writes the files that the crate is to read

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dataset::index::{self, BuildOptions, Ids, Index, Source};
use dataset::{CaptionContext, Dataset, DatasetConfig, SubsetConfig};
use random::{Purpose, Stream};
use rusqlite::{Connection, params};

/// Tags of a post, about as many as danbooru's have.
const TAGS: u64 = 30;
/// Different tags.
const VOCABULARY: u64 = 400_000;

fn main() {
    let dir = std::env::var_os("LOKR_BENCH_DIR").map_or_else(|| std::env::temp_dir().join("lokr-bench-index"), PathBuf::from);
    let rows: u64 = std::env::var("LOKR_BENCH_ROWS").ok().and_then(|n| n.parse().ok()).unwrap_or(5_200_000);
    let (db, index) = (dir.join(format!("metadata-{rows}.db")), dir.join(format!("index-{rows}.sqlite")));
    match std::env::args().nth(1).as_deref() {
        Some("part-generate") => generate(&db, rows),
        Some("part-build") => build(&db, &index, rows),
        Some("part-load") => load(&index),
        Some("part-plan") => plan(&index),
        Some("part-captions") => captions(&index),
        Some("part-shards") => shards(&dir),
        // cargo bench passes --bench.
        _ => {
            std::fs::create_dir_all(&dir).expect("the folder can be made");
            for part in ["generate", "build", "load", "plan", "captions", "shards"] {
                let this = std::env::current_exe().expect("this program has a path");
                let status = Command::new(this).arg(format!("part-{part}")).status().expect("this program runs");
                assert!(status.success(), "{part} failed");
            }
            if std::env::var_os("LOKR_BENCH_DIR").is_none() {
                std::fs::remove_dir_all(&dir).expect("the folder can be deleted");
            }
        }
    }
}

/// Peak of this process's memory in MB, where the system tells it.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) / 1000
}

fn say(what: &str, time: Duration, more: String) {
    println!("{what:<28} {:>9.3} s   peak {:>5} MB   {more}", time.as_secs_f64(), peak());
}

/// A database as HakuBooru's, in the order in which it inserts.
fn generate(db: &Path, rows: u64) {
    if db.exists() {
        return;
    }
    let start = Instant::now();
    let unfinished = db.with_extension("part");
    let _ = std::fs::remove_file(&unfinished);
    let mut connection = Connection::open(&unfinished).expect("the database can be made");
    connection.execute_batch("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -200000;").expect("pragmas");
    connection
        .execute_batch(
            "CREATE TABLE post (id INTEGER NOT NULL PRIMARY KEY, created_at VARCHAR(255) NOT NULL, uploader_id INTEGER NOT NULL,
             source VARCHAR(255) NOT NULL, md5 VARCHAR(255), is_deleted INTEGER NOT NULL, is_banned INTEGER NOT NULL,
             image_width INTEGER NOT NULL, image_height INTEGER NOT NULL, file_size INTEGER NOT NULL, file_ext VARCHAR(255) NOT NULL,
             rating INTEGER NOT NULL, score INTEGER NOT NULL, fav_count INTEGER NOT NULL, file_url VARCHAR(255), large_file_url VARCHAR(255));
             CREATE TABLE tag (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(255) NOT NULL, type INTEGER NOT NULL, popularity INTEGER NOT NULL);
             CREATE TABLE posttagrelation (id INTEGER NOT NULL PRIMARY KEY, post_id INTEGER NOT NULL, tag_id INTEGER NOT NULL);",
        )
        .expect("tables");
    let mut stream = Stream::new(1, Purpose::Validation, 0, 0);
    let transaction = connection.transaction().expect("a transaction");
    {
        let mut tag = transaction.prepare("INSERT INTO tag VALUES (?, ?, ?, ?)").expect("sql");
        for id in 1..=VOCABULARY {
            let class = [0, 0, 0, 1, 1, 1, 2, 2, 3, 4][(id % 10) as usize];
            tag.execute(params![id as i64, format!("a_tag_of_number_{id}"), class, (VOCABULARY - id) as i64]).expect("a tag");
        }
        let mut post = transaction.prepare("INSERT INTO post VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)").expect("sql");
        let mut relation = transaction.prepare("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)").expect("sql");
        for id in 1..=rows as i64 {
            let side = |s: &mut Stream| 600 + s.below(3400) as i64;
            let (w, h) = (side(&mut stream), side(&mut stream));
            let (rating, favourites, year) = (stream.below(4) as i64, stream.below(200) as i64, 2005 + stream.below(20));
            let url = "https://example.invalid/original/95/c8/95c85017fabc9bbdb04495375e4ff982.jpg";
            let date = format!("{year}-05-19T01:30:25.096-04:00");
            let md5 = "95c85017fabc9bbdb04495375e4ff982";
            post.execute(params![id, date, 4441, url, md5, 0, 0, w, h, 1_000_000, "jpg", rating, favourites, favourites, url, url])
                .expect("a post");
            for _ in 0..TAGS {
                // Frequent tags are frequent: the square of a uniform number.
                let u = stream.uniform();
                relation.execute([id, 1 + (u * u * u * (VOCABULARY - 1) as f64) as i64]).expect("a relation");
            }
        }
    }
    transaction.commit().expect("the database can be written");
    drop(connection);
    std::fs::rename(unfinished, db).expect("the database can be named");
    let size = std::fs::metadata(db).map_or(0, |m| m.len());
    say("generate metadata", start.elapsed(), format!("{rows} posts, {} relations, {} MB", rows * TAGS, size / 1_000_000));
}

fn build(db: &Path, path: &Path, rows: u64) {
    let _ = std::fs::remove_file(path);
    let options = BuildOptions { index: path.into(), sources: vec![Source::Danbooru { file: db.into() }], ids: Ids::Auto, threads: 0 };
    let start = Instant::now();
    let mut phases = Vec::new();
    let report = index::build(&options, &mut |p| {
        if phases.last().is_none_or(|(phase, _)| *phase != p.phase) {
            phases.push((p.phase, start.elapsed()));
        }
        ControlFlow::Continue(())
    })
    .expect("the index can be built");
    let time = start.elapsed();
    assert_eq!(report.summary.images as u64, rows);
    let size = std::fs::metadata(path).map_or(0, |m| m.len());
    say("build from metadata", time, format!("{:.0} rows/s, {} MB; {phases:.1?}", rows as f64 / time.as_secs_f64(), size / 1_000_000));
    // Every post gets a picture, as far as loading looks.
    let connection = Connection::open(path).expect("the index can be opened");
    connection.execute_batch("UPDATE image SET state = 0, file = id").expect("rows can be changed");
}

fn config(path: &Path) -> DatasetConfig {
    let subset = SubsetConfig { index: Some(path.into()), caption_rules: Some("kohaku-epsilon".into()), ..SubsetConfig::default() };
    DatasetConfig { max_bucket_reso: 4096, subsets: vec![subset], ..DatasetConfig::default() }
}

fn load(path: &Path) {
    let start = Instant::now();
    let (dataset, report) = Dataset::open(&config(path)).expect("the index loads");
    say("load for training", start.elapsed(), format!("{} images in {} buckets", dataset.len(), report.buckets.len()));
}

fn plan(path: &Path) {
    let (dataset, _) = Dataset::open(&config(path)).expect("the index loads");
    let start = Instant::now();
    let plan = dataset.plan(1, 0, 4).expect("the plan can be made");
    say("epoch plan, batch 4", start.elapsed(), format!("{} batches of {} visits", plan.len(), plan.visits()));
    let start = Instant::now();
    // 4 processes x accumulation 16: 64 batches a step.
    let first = 15_300.min(plan.len() / 64 - 1) * 64;
    let samples: usize = (first..first + 64).filter_map(|k| plan.batch(k)).map(|b| b.entries.len()).sum();
    say("seek to step 15,300", start.elapsed(), format!("{samples} samples found in the plan"));
    let start = Instant::now();
    let fingerprint = dataset.fingerprint();
    say("fingerprint", start.elapsed(), fingerprint[..8].to_string());
}

fn captions(path: &Path) {
    let (dataset, _) = Dataset::open(&config(path)).expect("the index loads");
    const COUNT: u64 = 200_000;
    let context = |position| CaptionContext { seed: 1, epoch: 0, position, step: 0, max_train_steps: 1 };
    let mut stream = Stream::new(2, Purpose::Validation, 0, 0);
    let samples: Vec<u32> = (0..COUNT).map(|_| stream.below(dataset.len() as u64) as u32).collect();
    let run = || -> (Duration, usize) {
        let start = Instant::now();
        let length = samples.iter().zip(0..).map(|(&s, p)| dataset.caption(s, context(p)).expect("a caption").len()).sum();
        (start.elapsed(), length)
    };
    for what in ["captions, pages not cached", "captions, again"] {
        let (time, length) = run();
        let each = time.as_secs_f64() * 1e6 / COUNT as f64;
        say(what, time, format!("{each:.1} us each, one thread, random ids; {} characters on average", length as u64 / COUNT));
    }
    let index = Index::open(path).expect("the index opens");
    let rules = dataset::tags::CaptionRules::built_in("kohaku-epsilon").expect("it is built in");
    let captioner = dataset::tags::Captioner::new(rules, index.tags().expect("tags").clone());
    let posts: Vec<_> = samples.iter().take(20_000).map(|&s| index.post(s + 1).expect("a post")).collect();
    let start = Instant::now();
    let length: usize = posts.iter().zip(0..).map(|(p, i)| captioner.draw(p, &mut Stream::new(1, Purpose::Caption, 0, i)).len()).sum();
    let each = start.elapsed().as_secs_f64() * 1e6 / posts.len() as f64;
    say("captions, post in memory", start.elapsed(), format!("{each:.1} us each; {} characters on average", length / posts.len()));
}

/// Shards of small pictures: how fast headers are read.
fn shards(dir: &Path) {
    let (folder, path) = (dir.join("shards"), dir.join("shards.sqlite"));
    let picture = include_bytes!("../tests/golden/lossy.webp");
    const SHARDS: u64 = 40;
    const EACH: u64 = 5000;
    if !folder.exists() {
        std::fs::create_dir_all(&folder).expect("the folder can be made");
        for s in 0..SHARDS {
            let file = std::fs::File::create(folder.join(format!("data-{s:04}.tar"))).expect("the shard can be made");
            let mut builder = tar::Builder::new(std::io::BufWriter::new(file));
            for i in 0..EACH {
                let mut header = tar::Header::new_ustar();
                header.set_size(picture.len() as u64);
                builder.append_data(&mut header, format!("{}.webp", i * 1000 + s), picture.as_slice()).expect("a member");
            }
            builder.finish().expect("the shard can be written");
        }
    }
    let _ = std::fs::remove_file(&path);
    let options = BuildOptions { index: path, sources: vec![Source::Tars { path: folder }], ids: Ids::Names, threads: 0 };
    let start = Instant::now();
    let report = index::build(&options, &mut |_| ControlFlow::Continue(())).expect("the shards can be read");
    let time = start.elapsed();
    assert_eq!(report.summary.present as u64, SHARDS * EACH);
    say("headers in tar shards", time, format!("{:.0} pictures/s", (SHARDS * EACH) as f64 / time.as_secs_f64()));
}
