//! Posts of metadata: danbooru's as HakuBooru keeps them (SQLite, `hakubooru/dataset/db.py`), and as JSON lines.
//!
//! The database's 0.25 billion relations of posts to tags stand, nearly always, in the order of posts. So both tables are
//! scanned in order, by several threads, and merged as they come; a relation that comes later than its post is added to
//! it then. A post's tags thus always stand in the order of the relations, and no index of the database is needed.

use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use rusqlite::{OptionalExtension, params};
use storage::RangeReader;

use super::build::Reporter;
use super::finish::FileMap;
use super::position::Position;
use super::posts::{self, Post};
use super::relations::{Database, PostRow, Run, Runs};
use super::tags::Interner;
use super::writer::Writer;
use super::{State, TagClass};
use crate::{Error, Prefetcher, Result};

/// Posts between two looks at the clock.
const STRIDE: usize = 4096;
/// Bytes of JSON lines that are read together.
const BLOCK: usize = 8 << 20;

/// Reads posts and tags out of a HakuBooru database.
pub(super) fn read_database(
    writer: &mut Writer,
    source: i64,
    file: &Path,
    files: &FileMap,
    threads: usize,
    report: &mut Reporter,
) -> Result<()> {
    let mut position = Position::load(writer, source, file, [i64::MIN, i64::MIN])?;
    if position.done {
        return Ok(());
    }
    let database = Arc::new(Database::open(file)?);
    let numbers = Arc::new(tag_numbers(writer, &database)?);
    let (first, end) = database.bounds("post", "id", position.at[0])?;
    let mut runs = Runs::new(&database, numbers, position.at[1], threads)?;
    let anew = writer.run(|c| c.query_row("SELECT NOT EXISTS (SELECT 1 FROM tags)", [], |row| row.get::<_, bool>(0)))?;
    let (mut list, mut hint) = (Vec::new(), 0);
    let total = end.max(0) as u64;
    let post_chunks = {
        let database = database.clone();
        let width = STRIDE as i64 * 4;
        let count = ((end - first).max(0) as u64).div_ceil(width as u64);
        let read = move |k: u64| database.posts(first + k as i64 * width, (first + (k as i64 + 1) * width).min(end));
        Prefetcher::new(0..count, threads.clamp(1, 2), 4, read).map_err(|e| no_thread(file, e))?
    };
    for chunk in post_chunks {
        for posts in chunk?.chunks(STRIDE) {
            for post in posts {
                list.clear();
                while let Some(run) = runs.peek()? {
                    match run.post.cmp(&post.id) {
                        std::cmp::Ordering::Greater => break,
                        std::cmp::Ordering::Equal => list.extend_from_slice(runs.bytes()),
                        std::cmp::Ordering::Less => add_late(writer, run, runs.bytes())?,
                    }
                    position.at[1] = run.last_row;
                    runs.advance();
                }
                put(writer, post, &list, files, &mut hint, anew)?;
                position.at[0] = i64::from(post.id);
                writer.changes.posts += 1;
            }
            position.pass(writer, report, position.at[0].max(0) as u64, total)?;
        }
    }
    while let Some(run) = runs.peek()? {
        add_late(writer, run, runs.bytes())?;
        position.at[1] = run.last_row;
        runs.advance();
    }
    position.done = true;
    position.commit(writer)
}

fn no_thread(file: &Path, source: std::io::Error) -> Error {
    storage::Error::Io { doing: "start threads to read", path: file.into(), source }.into()
}

/// The index's number for each of the database's tag numbers; 0 where there is none. Frequent tags come first, so that
/// their numbers are short.
fn tag_numbers(writer: &mut Writer, database: &Database) -> Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for (id, name, class, posts) in database.tags()? {
        let class = TagClass::from_number(class).unwrap_or(TagClass::General);
        let Writer { connection, interner, path, .. } = writer;
        let number = intern(interner, connection, &name, class, posts).map_err(Error::sqlite("write the index", path))?;
        let Ok(id) = usize::try_from(id) else { continue };
        // Numbers of a few million are usual; a table for wild ones would take the memory of the machine.
        if id < 1 << 28 {
            numbers.resize(numbers.len().max(id + 1), 0);
            numbers[id] = number;
        }
    }
    Ok(numbers)
}

fn intern(interner: &mut Interner, connection: &rusqlite::Connection, name: &str, class: TagClass, posts: i64) -> rusqlite::Result<u32> {
    let (number, known) = interner.number(connection, name, class, posts)?;
    if known {
        let mut update =
            connection.prepare_cached("UPDATE tag SET class = ?1, posts = ?2 WHERE id = ?3 AND (class <> ?1 OR posts <> ?2)")?;
        update.execute(params![class as i64, posts, number])?;
    }
    Ok(number)
}

fn put(writer: &mut Writer, post: &PostRow, list: &[u8], files: &FileMap, hint: &mut usize, anew: bool) -> Result<()> {
    let file = files.get(post.id, hint);
    let (state, id) = file.map_or((State::Absent as u8, None), |f| (f.state, Some(f.id)));
    let (format, size) = match file {
        Some(f) if f.state != State::Broken as u8 => (f.format, f.size),
        _ => (post.format, post.size),
    };
    writer.run(|c| {
        let mut insert = c.prepare_cached("INSERT OR REPLACE INTO image VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")?;
        let PostRow { rating, score, fav_count, date, flags, .. } = post;
        insert.execute(params![post.id, state, format, size.0, size.1, rating, score, fav_count, date, flags, id])?;
        if !list.is_empty() {
            c.prepare_cached("INSERT OR REPLACE INTO tags VALUES (?, ?)")?.execute(params![post.id, list])?;
        } else if !anew {
            c.prepare_cached("DELETE FROM tags WHERE image = ?")?.execute([post.id])?;
        }
        Ok(())
    })
}

/// Adds tags to a post that has been written already.
fn add_late(writer: &mut Writer, run: Run, bytes: &[u8]) -> Result<()> {
    writer.run(|c| {
        let exists: bool = c.prepare_cached("SELECT EXISTS (SELECT 1 FROM image WHERE id = ?)")?.query_row([run.post], |row| row.get(0))?;
        if !exists {
            return Ok(());
        }
        let mut find = c.prepare_cached("SELECT list FROM tags WHERE image = ?")?;
        let mut list: Vec<u8> = find.query_row([run.post], |row| row.get(0)).optional()?.unwrap_or_default();
        list.extend_from_slice(bytes);
        c.prepare_cached("INSERT OR REPLACE INTO tags VALUES (?, ?)")?.execute(params![run.post, list]).map(drop)
    })
}

/// Reads posts out of JSON lines.
pub(super) fn read_lines(writer: &mut Writer, source: i64, file: &Path, report: &mut Reporter) -> Result<()> {
    let mut position = Position::load(writer, source, file, [0, 0])?;
    if position.done {
        return Ok(());
    }
    let mut reader = RangeReader::open(file)?;
    let total = reader.file_len();
    let mut block = BLOCK;
    loop {
        let at = position.at[0] as u64;
        let bytes = reader.read_up_to(at, block)?;
        let at_end = at + bytes.len() as u64 >= total;
        let whole = if at_end { bytes.len() } else { bytes.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1) };
        if whole == 0 && !at_end {
            // A line longer than the block.
            block *= 2;
            continue;
        }
        let lines: Vec<&[u8]> = bytes[..whole].split(|&b| b == b'\n').collect();
        let parsed: Vec<Option<std::result::Result<Post, String>>> =
            lines.par_iter().map(|line| line.iter().any(|b| !b.is_ascii_whitespace()).then(|| posts::parse(line))).collect();
        for (i, post) in parsed.into_iter().enumerate() {
            let line = position.at[1] + i as i64 + 1;
            match post {
                None => {}
                Some(Ok(post)) => match post.id {
                    Some(id) => {
                        writer.put_post(id, &post)?;
                        writer.changes.posts += 1;
                    }
                    None => writer.changes.bad_lines.add(format_args!("{}:{line}: it has no id", file.display())),
                },
                Some(Err(what)) => writer.changes.bad_lines.add(format_args!("{}:{line}: {what}", file.display())),
            }
        }
        position.at[0] += whole as i64;
        position.at[1] += bytes[..whole].iter().filter(|&&b| b == b'\n').count() as i64;
        position.done = at_end;
        position.pass(writer, report, position.at[0] as u64, total)?;
        if at_end {
            return position.commit(writer);
        }
    }
}
