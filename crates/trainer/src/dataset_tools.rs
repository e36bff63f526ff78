//! The commands about pictures: build an index, look at buckets, look for what would fail, see what a step sees, and the rules
//! that captions and selections follow.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use dataset::check::{CheckOptions, check as check_pictures};
use dataset::explain::{self, RunShape};
use dataset::index::{BuildOptions, BuildReport, Ids, Index, Phase, Source, build};
use dataset::select::SelectionConfig;
use dataset::tags::{CaptionRules, percentile_table};
use dataset::{Dataset, Named, histogram};

use crate::config::RunConfig;
use crate::error::Result;
use crate::event::{Event, Observer};
use crate::interrupt::Interrupt;

/// Builds an index from folders, shards and metadata, or brings it up to date, and tells what it holds. With `counted`, ids
/// count from 1 instead of being the numbers in the pictures' names.
///
/// # Errors
/// If a source cannot be understood, or the index cannot be written; if `interrupt` asks to stop, what was done is kept.
pub fn index(
    out: &Path,
    sources: &[PathBuf],
    counted: bool,
    threads: usize,
    interrupt: &Interrupt,
    observe: &mut Observer,
) -> Result<String> {
    // The index outlives the folder from which it is built, so it keeps whole paths (below its own folder, paths from there).
    let detect = |path: &PathBuf| Source::detect(&std::path::absolute(path).unwrap_or_else(|_| path.clone()));
    let sources = sources.iter().map(detect).collect::<dataset::Result<Vec<_>>>()?;
    let ids = if counted { Ids::Counted } else { Ids::Auto };
    let options = BuildOptions { index: out.into(), sources, ids, threads };
    let report = build(&options, &mut |p| {
        let what = match p.phase {
            Phase::Files => "pictures",
            Phase::Shards => "shards",
            Phase::Posts => "posts",
            Phase::Linking => "links",
            Phase::Fingerprint => "fingerprint",
        };
        observe(Event::Preparing(what, p.done as usize, p.total as usize));
        if interrupt.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok(index_text(out, &report))
}

fn index_text(out: &Path, report: &BuildReport) -> String {
    let (c, s) = (&report.changes, &report.summary);
    let mut text = format!(
        "{}: {} images, {} with a file, {} without, {} gone, {} broken; {} deleted posts, {} tagged ({} tags), {} captioned\n\
         this time: {} files added, {} read again, {} gone, {} posts read\n",
        out.display(),
        s.images,
        s.present,
        s.absent,
        s.gone,
        s.broken,
        s.deleted,
        s.tagged,
        s.tags,
        s.captioned,
        c.added,
        c.updated,
        c.gone,
        c.posts
    );
    if report.doubled > 0 {
        text += &format!("images with more than one file, of which the first is taken: {}\n", report.doubled);
    }
    for (what, named) in [
        ("broken", &c.broken),
        ("left out", &c.ignored),
        ("broken shards", &c.broken_shards),
        ("lines of metadata that cannot be read", &c.bad_lines),
    ] {
        text += &named_text(what, named);
    }
    text
}

fn named_text(what: &str, named: &Named) -> String {
    if named.count == 0 {
        return String::new();
    }
    let mut text = format!("{what}: {}\n", named.count);
    named.first.iter().for_each(|name| text += &format!("  {name}\n"));
    if named.count > named.first.len() {
        text += &format!("  and {} more\n", named.count - named.first.len());
    }
    text
}

/// The buckets of a recipe's pictures as a table; also as an SVG picture, if `svg` names a file.
///
/// # Errors
/// If the pictures cannot be opened or the file cannot be written.
pub fn buckets(config: &RunConfig, svg: Option<&Path>) -> Result<String> {
    let (dataset, report) = Dataset::open(&config.dataset)?;
    let (counts, batch) = (dataset.bucket_counts(), config.train.batch_size);
    if let Some(path) = svg {
        storage::write_whole(path, histogram::svg(&counts, batch).as_bytes())?;
    }
    let report = report.to_string();
    // The histogram tells the buckets, and more of each.
    let found = report.split_once("buckets: ").map_or(report.as_str(), |(found, _)| found);
    let wrote = svg.map_or_else(String::new, |path| format!("wrote {}\n", path.display()));
    Ok(format!("{found}{}{wrote}", histogram::text(&counts, batch)))
}

/// Reads every picture of a recipe and tells what would fail or teach nothing later, and whether nothing that costs a picture
/// was found. With `headers`, pictures are not decoded.
///
/// # Errors
/// If the pictures cannot be opened; nothing that is wrong with one of them is an error.
pub fn check(config: &RunConfig, headers: bool, interrupt: &Interrupt, observe: &mut Observer) -> Result<(String, bool)> {
    let (dataset, report) = Dataset::open(&config.dataset)?;
    let options = CheckOptions { decode: !headers, ..CheckOptions::default() };
    let found = check_pictures(&dataset, &options, &mut |done, all| {
        observe(Event::Preparing("pictures", done as usize, all as usize));
        if interrupt.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let lost = report.broken_images.count + report.broken_captions.count;
    Ok((format!("{}\n{found}", report.to_string().trim_end()), found.is_clean() && lost == 0))
}

/// What a visit of a picture sees, and why: the picture with `id` (of its index, or its number in the folder), or all of one
/// step.
///
/// # Errors
/// If the pictures cannot be opened or there is no such picture.
pub fn caption(config: &RunConfig, id: Option<u32>, step: Option<u64>) -> Result<String> {
    let t = &config.train;
    let (dataset, _) = Dataset::open(&config.dataset)?;
    let run = RunShape {
        seed: t.seed,
        batch_size: t.batch_size,
        gradient_accumulation_steps: t.gradient_accumulation_steps,
        max_train_steps: t.max_train_steps,
    };
    let visits = match id {
        Some(id) => explain::visits_of_sample(&dataset, &run, explain::sample_of_id(&dataset, id)?, step)?,
        None => explain::visits_of_step(&dataset, &run, step.unwrap_or(0))?,
    };
    let mut text = String::new();
    for visit in visits {
        let e = explain::explain(&dataset, &run, visit)?;
        text += &format!("step {}, epoch {}, {}\n  {}\n", visit.step, visit.epoch, e.name, e.caption);
        if e.written != e.caption {
            text += &format!("  written: {}\n", e.written);
        }
        if !e.dropped.is_empty() {
            text += &format!("  dropped: {}\n", e.dropped.join(", "));
        }
        if !e.left_out.is_empty() {
            text += &format!("  left out: {}\n", e.left_out.join(", "));
        }
        e.reasons.iter().for_each(|reason| text += &format!("  {reason}\n"));
    }
    Ok(text)
}

/// Caption rules or a selection, built in or from a file, complete and as TOML; without either, their names. With `index`, the
/// thresholds of the quality words are those of its posts.
///
/// # Errors
/// If there are no such rules, or the index cannot be read.
pub fn rules(captions: Option<&str>, selection: Option<&str>, index: Option<&Path>) -> Result<String> {
    let toml = |text: std::result::Result<String, toml::ser::Error>| text.unwrap_or_else(|e| e.to_string());
    Ok(match (captions, selection) {
        (Some(name), _) => {
            let mut rules = CaptionRules::load(name)?;
            if let Some(path) = index {
                let q = &mut rules.quality;
                let tables = percentile_table(&Index::open(path)?, &q.percentiles)?;
                let own = [&mut q.general, &mut q.sensitive, &mut q.questionable, &mut q.explicit];
                // A rating of which the index has no post keeps the thresholds that it had.
                own.into_iter().zip(tables).filter(|(_, table)| !table.is_empty()).for_each(|(own, table)| *own = table);
            }
            toml(toml::to_string(&rules))
        }
        (None, Some(name)) => toml(toml::to_string(&SelectionConfig::load(name)?)),
        (None, None) => {
            format!("caption rules: {}\nselections: {}\n", CaptionRules::BUILT_IN.join(", "), SelectionConfig::BUILT_IN.join(", "))
        }
    })
}
