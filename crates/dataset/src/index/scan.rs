//! Finding pictures: folders and tar shards are read by several threads, which look at headers and captions only; the
//! writer takes what they found in order, so that numbers do not depend on who was faster.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use storage::{RangeReader, Stamp};

use super::build::{Phase, Reporter};
use super::files::{self, key_and_extension};
use super::posts::{self, Post};
use super::writer::{Found, Head, Known, Writer};
use super::{FileFormat, State, head, tar};
use crate::source::{beside, chain};
use crate::{Error, Prefetcher, Result, SubsetConfig};

/// Pictures of a folder that are looked at together.
const CHUNK: usize = 2048;
/// Sidecar files above this are not read.
const LONGEST_TEXT: u64 = 1 << 20;

/// Reads the folders below `root`.
pub(super) fn folder(writer: &mut Writer, source: i64, root: &Path, caption_extension: &str, report: &mut Reporter) -> Result<()> {
    let folders = files::images(root)?;
    let total = folders.iter().map(|f| f.names.len() as u64).sum();
    let captions = SubsetConfig { caption_extension: caption_extension.into(), enable_wildcard: true, ..SubsetConfig::default() };
    let mut seen = HashSet::new();
    let mut done = 0;
    for folder in &folders {
        let container = writer.container(source, &folder.path)?;
        seen.insert(container.id);
        let path = root.join(&folder.path);
        let mut known = writer.known_files(container.id)?;
        for names in folder.names.chunks(CHUNK) {
            let found: Vec<Found> = names.par_iter().map(|name| look(&path, name, known.get(name), Some(&captions))).collect();
            for found in found {
                writer.put(container.id, &mut known, found)?;
            }
            done += names.len() as u64;
            writer.commit_if_due()?;
            report.tell(Phase::Files, done, total)?;
        }
        writer.files_gone(known)?;
        // A folder is always looked through again: its own time says nothing of its files' contents.
        writer.container_done(container.id, Stamp { len: 0, modified: 0 }, None)?;
    }
    writer.containers_gone(source, &seen)
}

/// Looks at one picture that is a file of its own. `captions`: how its caption is found, if it has one.
pub(super) fn look(folder: &Path, name: &str, known: Option<&Known>, captions: Option<&SubsetConfig>) -> Found {
    let path = folder.join(name);
    let stamp = storage::stamp(&path);
    let unchanged = match (&stamp, known) {
        (Ok(stamp), Some(known)) => known.state == State::Present && (known.len, known.modified) == (stamp.len, Some(stamp.modified)),
        _ => false,
    };
    let caption = captions.map(|c| beside(&path, c));
    let head = match (&stamp, caption.as_ref().and_then(|c| c.as_ref().err())) {
        (Err(error), _) => Head::Bad(chain(error)),
        (_, Some(error)) => Head::Bad(chain(error)),
        _ if unchanged => Head::Unchanged,
        (Ok(stamp), None) => match header_of_file(&path, stamp.len) {
            Ok(header) => Head::Read(header),
            Err(error) => Head::Bad(chain(&error)),
        },
    };
    let stamp = stamp.unwrap_or(Stamp { len: 0, modified: 0 });
    Found {
        name: name.into(),
        offset: None,
        len: stamp.len,
        modified: Some(stamp.modified),
        head,
        caption: caption.and_then(|c| c.ok().flatten()).filter(|c| !c.is_empty()),
        post: None,
    }
}

fn header_of_file(path: &Path, len: u64) -> std::result::Result<crate::image::Header, crate::DecodeError> {
    let mut reader = RangeReader::open(path)?;
    let first = reader.read_up_to(0, head::FIRST)?;
    head::header(len, first, &mut |offset, len| reader.read_up_to(offset, len))
}

/// What a shard holds.
struct Shard {
    found: Vec<Found>,
    stamp: Stamp,
    problem: Option<String>,
}

/// Reads the shards of a source that are new or changed.
pub(super) fn shards(writer: &mut Writer, source: i64, path: &Path, root: &Path, threads: usize, report: &mut Reporter) -> Result<()> {
    let names = files::shards(path)?;
    let mut seen = HashSet::new();
    let mut to_read = Vec::new();
    for name in &names {
        let container = writer.container(source, name)?;
        seen.insert(container.id);
        if container.stamp != storage::stamp(&root.join(name)).ok() || container.stamp.is_none() {
            to_read.push((container.id, name.clone()));
        }
    }
    let (total, old) = (names.len() as u64, (names.len() - to_read.len()) as u64);
    report.tell(Phase::Shards, old, total)?;
    let paths: Arc<Vec<PathBuf>> = Arc::new(to_read.iter().map(|(_, name)| root.join(name)).collect());
    let count = paths.len() as u64;
    let read = Prefetcher::new(0..count, threads, 2 * threads, move |k| read_shard(&paths[k as usize]));
    let read = read.map_err(|source| storage::Error::Io { doing: "start threads to read", path: path.into(), source })?;
    for (done, (shard, (container, name))) in read.zip(&to_read).enumerate() {
        // A shard that cannot be opened is named like a cut one: the others are still worth having.
        let shard = shard.unwrap_or_else(|e| Shard { found: vec![], stamp: Stamp { len: 0, modified: 0 }, problem: Some(chain(&e)) });
        if let Some(problem) = &shard.problem {
            writer.changes.broken_shards.add(format_args!("{name}: {problem}"));
        }
        let mut known = writer.known_files(*container)?;
        for found in shard.found {
            writer.put(*container, &mut known, found)?;
        }
        writer.files_gone(known)?;
        writer.container_done(*container, shard.stamp, shard.problem.as_deref())?;
        writer.commit_if_due()?;
        report.tell(Phase::Shards, old + done as u64 + 1, total)?;
    }
    writer.containers_gone(source, &seen)
}

fn read_shard(path: &Path) -> Result<Shard> {
    let stamp = storage::stamp(path)?;
    let mut reader = RangeReader::open(path)?;
    let mut found = Vec::new();
    let mut texts: HashMap<String, (Option<String>, Option<Post>)> = HashMap::new();
    let problem = tar::walk::<Error>(&mut reader, |member, reader| {
        let (key, ext) = key_and_extension(&member.name);
        let ext = ext.rsplit('.').next().unwrap_or(ext);
        if FileFormat::from_extension(ext).is_readable() {
            let mut read = |offset: u64, len: usize| {
                let there = member.len.saturating_sub(offset).min(len as u64) as usize;
                reader.read_up_to(member.offset + offset, there)
            };
            let head = match head::header(member.len, member.first, &mut read) {
                Ok(header) => Head::Read(header),
                Err(error) => Head::Bad(chain(&error)),
            };
            let (name, offset) = (member.name, Some(member.offset));
            found.push(Found { name, offset, len: member.len, modified: None, head, caption: None, post: None });
        } else if ["txt", "caption", "json"].contains(&ext) && member.len <= LONGEST_TEXT {
            let bytes = reader.read(member.offset, member.len as usize)?;
            let entry = texts.entry(key.to_string()).or_default();
            match ext {
                "json" => entry.1 = posts::parse(&bytes).ok(),
                _ => entry.0 = Some(lines(&bytes)).filter(|text| !text.is_empty()),
            }
        }
        Ok(())
    })?;
    for picture in &mut found {
        if let Some((caption, post)) = texts.remove(key_and_extension(&picture.name).0) {
            (picture.caption, picture.post) = (caption, post);
        }
    }
    Ok(Shard { found, stamp, problem })
}

/// The lines of a caption, stripped, blank ones left out.
fn lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join("\n")
}
