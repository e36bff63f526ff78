//! Building an index: pictures first (headers only), then metadata, then both are tied together. Every part goes on where
//! a build that was killed left off; a build of a complete index adds what is new and marks what is gone.
//!
//! # Determinism
//! The same sources give the same rows, whatever the number of threads and however often the build was interrupted.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::read::{Index, Summary};
use super::writer::{Changes, Writer};
use super::{Source, danbooru, finish, parquet, scan, schema, sd_scripts};
use crate::{Error, Result};

/// What to build, from what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildOptions {
    /// The index; made if absent.
    pub index: PathBuf,
    /// What to read. If empty, what the index was built from before is looked through again.
    pub sources: Vec<Source>,
    /// Where ids come from, for a new index.
    pub ids: Ids,
    /// Threads that read; 0: as many as there are cores.
    pub threads: usize,
}

/// Where the ids of an index come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ids {
    /// From names if a source tells of posts, else counted.
    #[default]
    Auto,
    /// The number that is the picture's name, as danbooru's files have; pictures with other names are left out.
    Names,
    /// Counted from 1 in the order in which pictures are found.
    Counted,
}

/// What a build is busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Pictures that are files of their own.
    Files,
    /// Tar shards.
    Shards,
    /// Posts of metadata.
    Posts,
    /// Tying pictures to posts.
    Linking,
    /// The fingerprint.
    Fingerprint,
}

/// How far a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What it is busy with.
    pub phase: Phase,
    /// Done of it, those of an earlier build included.
    pub done: u64,
    /// Of so many; 0 where that is not known.
    pub total: u64,
}

/// What a build did, and what the index holds now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildReport {
    /// What changed.
    pub changes: Changes,
    /// Images with more than one file: the first one is taken.
    pub doubled: usize,
    /// What the index holds.
    pub summary: Summary,
    /// [`Index::fingerprint`].
    pub fingerprint: String,
}

/// Passes progress on, and the wish to stop back.
pub(super) struct Reporter<'a>(&'a mut dyn FnMut(Progress) -> ControlFlow<()>);

impl Reporter<'_> {
    pub fn tell(&mut self, phase: Phase, done: u64, total: u64) -> Result<()> {
        match (self.0)(Progress { phase, done, total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Stopped),
        }
    }
}

/// Builds an index, or brings it up to date. `progress` is called often, from this thread; when it breaks, what was done
/// is kept and [`Error::Stopped`] given.
///
/// What is left: after an error, a kill or power loss, an index that [`Index::open`] refuses as unfinished, which the next
/// call goes on with; at most the last five seconds' work is lost.
///
/// # Errors
/// A source that is not there or cannot be understood; the index cannot be written, or belongs to another program.
pub fn build(options: &BuildOptions, progress: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<BuildReport> {
    let index = std::path::absolute(&options.index).unwrap_or_else(|_| options.index.clone());
    let home = super::sources::home(&index);
    for source in &options.sources {
        storage::stamp(source.path())?;
    }
    // Nothing is left behind where there is nothing to do.
    let nothing = || Error::Index {
        path: index.clone(),
        what: "there is nothing to build it from".into(),
        way_out: "name a folder of images, tar shards, or a file of metadata",
    };
    if options.sources.is_empty() && !index.exists() {
        return Err(nothing());
    }
    let connection = schema::open_for_building(&index)?;
    let failed = || Error::sqlite("write the index", &index);
    let sources: Vec<Source> = if options.sources.is_empty() {
        let mut specs = connection.prepare("SELECT spec FROM source ORDER BY id").map_err(failed())?;
        let specs: rusqlite::Result<Vec<String>> = specs.query_map([], |row| row.get(0)).and_then(Iterator::collect);
        specs.map_err(failed())?.iter().filter_map(|spec| Source::from_spec(spec)).map(|source| source.at(home)).collect()
    } else {
        options.sources.clone()
    };
    if sources.is_empty() {
        return Err(nothing());
    }
    let names = ids_from_names(schema::meta(&connection, "ids").map_err(failed())?.as_deref(), options.ids, &sources, &index)?;
    let mut writer = Writer::new(connection, &index, names)?;
    writer.set_meta("ids", if names { "posts" } else { "numbered" })?;
    writer.set_meta("state", "building")?;
    writer.commit()?;
    let mut report = Reporter(progress);
    match read_all(&mut writer, &sources, home, threads(options.threads), &mut report) {
        Ok((doubled, fingerprint)) => {
            let Writer { connection, changes, .. } = writer;
            let close = || -> rusqlite::Result<()> {
                connection.execute_batch("COMMIT")?;
                // A finished index is one file.
                connection.pragma_update(None, "journal_mode", "DELETE")
            };
            close().map_err(failed())?;
            drop(connection);
            Ok(BuildReport { changes, doubled, summary: Index::open(&index)?.summary()?, fingerprint })
        }
        Err(Error::Stopped) => {
            writer.commit()?;
            Err(Error::Stopped)
        }
        Err(error) => Err(error),
    }
}

/// Reads every source, pictures before posts, and ties them together; gives the number of doubled images and the
/// fingerprint.
fn read_all(writer: &mut Writer, sources: &[Source], home: &Path, threads: usize, report: &mut Reporter) -> Result<(usize, String)> {
    let mut numbered = Vec::new();
    for source in sources {
        numbered.push((source, writer.source(&source.spec(home))?));
    }
    for (source, id) in &numbered {
        match source {
            Source::Folder { path, caption_extension } => scan::folder(writer, *id, path, caption_extension, report)?,
            Source::Tars { path } => scan::shards(writer, *id, path, &source.root(home), threads, report)?,
            Source::SdScripts { caption_separator, .. } => sd_scripts::read(writer, *id, source, caption_separator, home, report)?,
            Source::Danbooru { .. } | Source::Posts { .. } | Source::Parquet { .. } => {}
        }
    }
    writer.commit()?;
    let files = finish::FileMap::load(writer)?;
    for (source, id) in &numbered {
        match source {
            Source::Danbooru { file } => danbooru::read_database(writer, *id, file, &files, threads, report)?,
            Source::Posts { file } => danbooru::read_lines(writer, *id, file, report)?,
            Source::Parquet { file } => parquet::read(writer, *id, file, report)?,
            _ => {}
        }
    }
    writer.commit()?;
    finish::link(writer, &files, report)?;
    let fingerprint = finish::fingerprint(writer, report)?;
    writer.set_meta("fingerprint", &fingerprint)?;
    writer.set_meta("state", "complete")?;
    Ok((files.doubled(), fingerprint))
}

fn ids_from_names(before: Option<&str>, wish: Ids, sources: &[Source], index: &Path) -> Result<bool> {
    let posts = sources.iter().any(Source::has_post_ids);
    let names = match (before, wish) {
        (Some(before), Ids::Auto) => before == "posts",
        (_, Ids::Auto) => posts,
        (_, wish) => wish == Ids::Names,
    };
    let contradicts = before.is_some_and(|before| (before == "posts") != names);
    if contradicts || (posts && !names) {
        return Err(Error::Index {
            path: index.into(),
            what: "its images are counted, and ids of posts cannot be mixed with that".into(),
            way_out: "build a second index, and name each in a [[dataset.subsets]] of its own",
        });
    }
    Ok(names)
}

fn threads(wish: usize) -> usize {
    if wish > 0 { wish } else { rayon::current_num_threads() }
}
