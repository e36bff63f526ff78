//! The end of a build: each image gets the best of its files, and the whole gets a fingerprint.

use rayon::prelude::*;
use rusqlite::params;

use super::build::{Phase, Reporter};
use super::writer::Writer;
use super::{State, files};
use crate::Result;

/// The file of each image, by image. 28 bytes each.
pub(super) struct FileMap {
    /// Sorted by image, one each.
    files: Vec<FileRef>,
    doubled: usize,
}

/// A file as `image` keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileRef {
    pub image: u32,
    /// Rank of its shard among shards: base shards come before updates.
    rank: u32,
    pub id: u32,
    pub size: (u32, u32),
    pub state: u8,
    pub format: u8,
}

impl FileMap {
    pub fn load(writer: &mut Writer) -> Result<Self> {
        let mut files: Vec<FileRef> = writer.run(|c| {
            let mut statement = c.prepare("SELECT id, path FROM container")?;
            let containers: rusqlite::Result<Vec<(u32, String)>> = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect();
            let mut order = containers?;
            order.sort_by_cached_key(|(id, path)| (files::is_update(path), path.clone(), *id));
            let mut ranks = vec![0; order.iter().map(|(id, _)| *id as usize + 1).max().unwrap_or(0)];
            order.iter().zip(0..).for_each(|((id, _), rank)| ranks[*id as usize] = rank);
            let mut statement = c.prepare("SELECT image, container, id, width, height, state, format FROM file")?;
            let mut rows = statement.query([])?;
            let mut files = Vec::new();
            while let Some(row) = rows.next()? {
                let rank = ranks.get(row.get::<_, usize>(1)?).copied().unwrap_or(u32::MAX);
                let size = (row.get(3)?, row.get(4)?);
                files.push(FileRef { image: row.get(0)?, rank, id: row.get(2)?, size, state: row.get(5)?, format: row.get(6)? });
            }
            Ok(files)
        })?;
        // A broken file is taken before one that is gone: it tells what is wrong now.
        let preference = |f: &FileRef| match f.state {
            state if state == State::Present as u8 => 0,
            state if state == State::Broken as u8 => 1,
            _ => 2,
        };
        files.par_sort_unstable_by_key(|f| (f.image, preference(f), f.rank, f.id));
        let doubled = files.windows(2).filter(|w| w[0].image == w[1].image && w[1].state == State::Present as u8).count();
        files.dedup_by_key(|f| f.image);
        Ok(Self { files, doubled })
    }

    /// Present files beyond the first of their image.
    pub fn doubled(&self) -> usize {
        self.doubled
    }

    /// The file of an image. Ids that ascend from call to call are found quickest: `hint` is where the last was.
    pub fn get(&self, image: u32, hint: &mut usize) -> Option<&FileRef> {
        while self.files.get(*hint).is_some_and(|f| f.image < image) {
            *hint += 1;
        }
        match self.files.get(*hint) {
            Some(file) if file.image == image => Some(file),
            _ => None,
        }
    }
}

/// Gives every row of `image` its file, and every file without such a row one. Only rows that differ are written.
pub(super) fn link(writer: &mut Writer, map: &FileMap, report: &mut Reporter) -> Result<()> {
    let total = writer.run(|c| c.query_row("SELECT count(*) FROM image", [], |row| row.get::<_, u64>(0)))?;
    let mut changed: Vec<(u32, Option<FileRef>)> = Vec::new();
    let mut linked = vec![false; map.files.len()];
    writer.run(|c| {
        let mut statement = c.prepare("SELECT id, state, file, width, height, format FROM image ORDER BY id")?;
        let mut rows = statement.query([])?;
        let mut hint = 0;
        while let Some(row) = rows.next()? {
            let id: u32 = row.get(0)?;
            let (state, file): (u8, Option<u32>) = (row.get(1)?, row.get(2)?);
            match map.get(id, &mut hint) {
                Some(found) => {
                    linked[hint] = true;
                    let as_it_is = (state, file, (row.get(3)?, row.get(4)?), row.get(5)?);
                    if as_it_is != (found.state, Some(found.id), found.size, found.format) {
                        changed.push((id, Some(*found)));
                    }
                }
                None if file.is_some() || state != State::Absent as u8 => changed.push((id, None)),
                None => {}
            }
        }
        Ok(())
    })?;
    report.tell(Phase::Linking, total, total)?;
    for (id, file) in changed {
        writer.run(|c| {
            // Width and height of a file that is gone or broken stay those of the post.
            let mut with = c.prepare_cached("UPDATE image SET state = ?, file = ?, format = ?, width = ?, height = ? WHERE id = ?")?;
            let mut without = c.prepare_cached("UPDATE image SET state = ?, file = ? WHERE id = ?")?;
            match file {
                Some(f) if f.state == State::Broken as u8 => without.execute(params![f.state, f.id, id]),
                Some(f) => with.execute(params![f.state, f.id, f.format, f.size.0, f.size.1, id]),
                None => without.execute(params![State::Absent as u8, None::<u32>, id]),
            }
        })?;
        writer.commit_if_due()?;
    }
    for file in map.files.iter().zip(linked).filter(|(_, linked)| !linked).map(|(file, _)| file) {
        writer.run(|c| {
            let mut insert =
                c.prepare_cached("INSERT INTO image (id, state, format, width, height, flags, file) VALUES (?, ?, ?, ?, ?, 0, ?)")?;
            insert.execute(params![file.image, file.state, file.format, file.size.0, file.size.1, file.id])
        })?;
        writer.commit_if_due()?;
    }
    Ok(())
}

/// Rows whose hashes are made together: fixed, so that the result does not depend on the number of threads.
const PART: u32 = 1 << 18;

/// A hash of all that training can see: rows, tags with their names, captions.
pub(super) fn fingerprint(writer: &mut Writer, report: &mut Reporter) -> Result<String> {
    writer.commit()?;
    // Other connections can look only once this one lets go.
    writer.run(|c| {
        c.execute_batch("COMMIT")?;
        c.pragma_update(None, "locking_mode", "NORMAL")?;
        c.query_row("SELECT count(*) FROM meta", [], |row| row.get::<_, i64>(0)).map(drop)
    })?;
    let path = writer.path.clone();
    let end: u32 = writer.run(|c| c.query_row("SELECT ifnull(max(id), 0) FROM image", [], |row| row.get(0)))?;
    let starts: Vec<u32> = (0..=end / PART).map(|k| k * PART).collect();
    let hashes: Result<Vec<blake3::Hash>> = starts
        .par_iter()
        .map(|&from| {
            let connection = super::schema::open_for_reading(&path)?;
            hash_part(&connection, from).map_err(crate::Error::sqlite("read the index", &path))
        })
        .collect();
    let mut all = blake3::Hasher::new();
    hashes?.iter().for_each(|hash| _ = all.update(hash.as_bytes()));
    writer.run(|c| {
        let mut tags = c.prepare("SELECT id, class, name FROM tag ORDER BY id")?;
        let mut rows = tags.query([])?;
        while let Some(row) = rows.next()? {
            let name = row.get_ref(2)?.as_str()?;
            all.update(format!("{} {} {} {name}\n", row.get::<_, i64>(0)?, row.get::<_, i64>(1)?, name.len()).as_bytes());
        }
        c.execute_batch("BEGIN")
    })?;
    report.tell(Phase::Fingerprint, u64::from(end), u64::from(end))?;
    Ok(all.finalize().to_hex().to_string())
}

fn hash_part(connection: &rusqlite::Connection, from: u32) -> rusqlite::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = Vec::new();
    let mut image = connection.prepare(
        "SELECT id, state, format, width, height, rating, score, fav_count, date, flags FROM image WHERE id >= ?1 AND id < ?1 + ?2 ORDER BY id",
    )?;
    let mut rows = image.query([from, PART])?;
    while let Some(row) = rows.next()? {
        for column in 0..10 {
            let value = row.get_ref(column)?.as_i64_or_null()?;
            // A value is marked apart from none, so that a score of nothing is not one of 0.
            buffer.push(u8::from(value.is_some()));
            buffer.extend(value.unwrap_or(0).to_le_bytes());
        }
        flush(&mut hasher, &mut buffer, 1 << 16);
    }
    for sql in [
        "SELECT image, list FROM tags WHERE image >= ?1 AND image < ?1 + ?2 ORDER BY image",
        "SELECT image, text FROM caption WHERE image >= ?1 AND image < ?1 + ?2 ORDER BY image",
    ] {
        flush(&mut hasher, &mut buffer, 0);
        hasher.update(sql.as_bytes());
        let mut statement = connection.prepare(sql)?;
        let mut rows = statement.query([from, PART])?;
        while let Some(row) = rows.next()? {
            let bytes = row.get_ref(1)?.as_bytes()?;
            buffer.extend(row.get::<_, u32>(0)?.to_le_bytes());
            buffer.extend((bytes.len() as u64).to_le_bytes());
            buffer.extend(bytes);
            flush(&mut hasher, &mut buffer, 1 << 16);
        }
    }
    flush(&mut hasher, &mut buffer, 0);
    Ok(hasher.finalize())
}

/// Hashes what has gathered, if it is more than `least`: small pieces cost blake3 its speed.
fn flush(hasher: &mut blake3::Hasher, buffer: &mut Vec<u8>, least: usize) {
    if buffer.len() > least {
        hasher.update(buffer);
        buffer.clear();
    }
}
