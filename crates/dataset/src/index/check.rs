//! Whether an index still tells the truth, and what in it would fail later: shards and files that are gone or changed
//! since, headers that were broken, images of which nothing is known.

use std::ops::ControlFlow;
use std::path::Path;

use rayon::prelude::*;

use super::build::{Phase, Progress};
use super::read::{Index, Summary};
use super::{Source, State};
use crate::report::Named;
use crate::{Error, Result};

/// What [`check`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IndexCheck {
    /// What the index holds.
    pub summary: Summary,
    /// Shards and files that are not where the index says.
    pub missing: Named,
    /// Shards and files whose length or time is another than when they were read: build again.
    pub changed: Named,
    /// Files whose header could not be read, with the reason.
    pub broken: Named,
    /// Shards that were cut or no tar, with the reason.
    pub broken_shards: Named,
    /// Present images with neither tags nor a caption.
    pub without_text: Named,
}

impl IndexCheck {
    /// Whether nothing was found.
    pub fn is_clean(&self) -> bool {
        [&self.missing, &self.changed, &self.broken, &self.broken_shards, &self.without_text].iter().all(|n| n.count == 0)
    }
}

/// Files looked at between two calls of `progress`.
const CHUNK: usize = 1 << 14;

/// Compares an index with what lies on the disk, without reading any image.
///
/// # Errors
/// Those of [`Index::open`]; [`Error::Stopped`] if `progress` breaks.
pub fn check(path: &Path, progress: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<IndexCheck> {
    let index = Index::open(path)?;
    let mut found = IndexCheck { summary: index.summary()?, ..IndexCheck::default() };
    // (path, length, modified) of every shard, and of every file of its own.
    let mut files: Vec<(std::path::PathBuf, u64, i64)> = Vec::new();
    let home = super::sources::home(path);
    index.with(|c| {
        let mut shards = c.prepare(
            "SELECT s.spec, c.path, c.length, c.modified, c.problem FROM container c JOIN source s ON s.id = c.source WHERE c.gone = 0",
        )?;
        let mut rows = shards.query([])?;
        while let Some(row) = rows.next()? {
            let Some(source) = Source::from_spec(row.get_ref(0)?.as_str()?) else { continue };
            let name: String = row.get(1)?;
            if let Some(problem) = row.get::<_, Option<String>>(4)? {
                found.broken_shards.add(format_args!("{name}: {problem}"));
            }
            if matches!(source, Source::Tars { .. }) {
                files.push((source.root(home).join(name), row.get(2)?, row.get(3)?));
            }
        }
        let mut single = c.prepare(
            "SELECT s.spec, c.path, f.name, f.length, f.modified FROM file f JOIN container c ON c.id = f.container \
             JOIN source s ON s.id = c.source WHERE f.modified IS NOT NULL AND f.state = 0",
        )?;
        let mut rows = single.query([])?;
        while let Some(row) = rows.next()? {
            let Some(source) = Source::from_spec(row.get_ref(0)?.as_str()?) else { continue };
            let path = source.root(home).join(row.get::<_, String>(1)?).join(row.get::<_, String>(2)?);
            files.push((path, row.get(3)?, row.get(4)?));
        }
        let mut broken = c.prepare("SELECT name, problem FROM file WHERE state = ? ORDER BY id")?;
        let mut rows = broken.query([State::Broken as i64])?;
        while let Some(row) = rows.next()? {
            found.broken.add(format_args!("{}: {}", row.get_ref(0)?.as_str()?, row.get_ref(1)?.as_str_or_null()?.unwrap_or("")));
        }
        let mut silent = c.prepare(
            "SELECT id FROM image i WHERE state = 0 AND NOT EXISTS (SELECT 1 FROM tags WHERE image = i.id) \
             AND NOT EXISTS (SELECT 1 FROM caption WHERE image = i.id) ORDER BY id",
        )?;
        let mut rows = silent.query([])?;
        while let Some(row) = rows.next()? {
            found.without_text.add(format_args!("image {}", row.get::<_, i64>(0)?));
        }
        Ok(())
    })?;
    let mut done = 0;
    for chunk in files.chunks(CHUNK) {
        let stamps: Vec<_> = chunk.par_iter().map(|(path, ..)| storage::stamp(path)).collect();
        for ((path, len, modified), stamp) in chunk.iter().zip(stamps) {
            match stamp {
                Err(_) => found.missing.add(path.display()),
                Ok(stamp) if (stamp.len, stamp.modified) != (*len, *modified) => found.changed.add(path.display()),
                Ok(_) => {}
            }
        }
        done += chunk.len();
        if progress(Progress { phase: Phase::Files, done: done as u64, total: files.len() as u64 }).is_break() {
            return Err(Error::Stopped);
        }
    }
    Ok(found)
}
