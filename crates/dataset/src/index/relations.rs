//! The tables of a HakuBooru database (facts: `hakubooru/dataset/db.py`), read in order by threads that work ahead.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rusqlite::{Connection, OpenFlags};

use super::kinds::day;
use super::{FileFormat, tags};
use crate::{Error, Prefetcher, Result};

/// Relations that a thread reads at once.
const CHUNK: i64 = 1 << 19;

/// A HakuBooru database, open for reading by several threads.
pub(super) struct Database {
    path: PathBuf,
    pool: Mutex<Vec<Connection>>,
}

/// What the index keeps of a post.
pub(super) struct PostRow {
    pub id: u32,
    pub size: (u32, u32),
    pub format: u8,
    pub rating: Option<i64>,
    pub score: Option<i64>,
    pub fav_count: Option<i64>,
    pub date: i32,
    pub flags: i64,
}

impl Database {
    /// Opens a database and looks whether it is one of HakuBooru's.
    pub fn open(path: &Path) -> Result<Self> {
        let database = Self { path: path.into(), pool: Mutex::default() };
        let missing = database.with(|c| {
            let has = |table: &str, column: &str| {
                c.query_row("SELECT count(*) FROM pragma_table_info(?) WHERE name = ?", [table, column], |row| row.get::<_, i64>(0))
            };
            let needed = [
                ("post", "id created_at is_deleted is_banned image_width image_height file_ext rating score fav_count"),
                ("tag", "id name type popularity"),
                ("posttagrelation", "post_id tag_id"),
            ];
            for (table, columns) in needed {
                for column in columns.split(' ') {
                    if has(table, column)? == 0 {
                        return Ok(Some(format!("{table}.{column}")));
                    }
                }
            }
            Ok(None)
        })?;
        match missing {
            None => Ok(database),
            Some(missing) => Err(Error::Source {
                path: path.into(),
                what: format!("it lacks `{missing}`"),
                way_out: "it should be danbooru2023.db in HakuBooru's form; databases of before March 2024 kept tags as text in `post` and cannot be read",
            }),
        }
    }

    fn with<T>(&self, use_it: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        let idle = self.pool.lock().unwrap_or_else(|e| e.into_inner()).pop();
        let read = || Error::sqlite("read the metadata", &self.path);
        let connection = match idle {
            Some(connection) => connection,
            None => Connection::open_with_flags(&self.path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)
                .map_err(read())?,
        };
        let result = use_it(&connection).map_err(read());
        self.pool.lock().unwrap_or_else(|e| e.into_inner()).push(connection);
        result
    }

    /// (first, one behind the last) of a table's keys above `after`.
    pub fn bounds(&self, table: &str, key: &str, after: i64) -> Result<(i64, i64)> {
        let sql = format!("SELECT (SELECT min({key}) FROM {table} WHERE {key} > ?1), (SELECT max({key}) FROM {table} WHERE {key} > ?1)");
        let (first, last) =
            self.with(|c| c.query_row(&sql, [after], |row| Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, Option<i64>>(1)?))))?;
        Ok(first.zip(last).map_or((0, 0), |(first, last)| (first, last + 1)))
    }

    /// All tags, the frequent ones first: number, name, class, posts.
    pub fn tags(&self) -> Result<Vec<(i64, String, i64, i64)>> {
        self.with(|c| {
            let mut statement = c.prepare("SELECT id, name, type, popularity FROM tag ORDER BY popularity DESC, id")?;
            statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?.collect()
        })
    }

    /// The posts with `from <= id < to`, ascending; ids that are no `u32` are left out.
    pub fn posts(&self, from: i64, to: i64) -> Result<Vec<PostRow>> {
        self.with(|c| {
            let mut statement = c.prepare_cached(
                "SELECT id, created_at, is_deleted, is_banned, image_width, image_height, file_ext, rating, score, fav_count \
                 FROM post WHERE id >= ? AND id < ? ORDER BY id",
            )?;
            let mut rows = statement.query([from, to])?;
            let mut posts = Vec::new();
            while let Some(row) = rows.next()? {
                let text = |i| Ok::<_, rusqlite::Error>(row.get_ref(i)?.as_str_or_null().ok().flatten().unwrap_or(""));
                let number = |i| Ok::<_, rusqlite::Error>(row.get_ref(i)?.as_i64_or_null().ok().flatten());
                let side = |i| Ok::<_, rusqlite::Error>(number(i)?.and_then(|n| u32::try_from(n).ok()).unwrap_or(0));
                let Ok(id) = u32::try_from(row.get::<_, i64>(0)?) else { continue };
                posts.push(PostRow {
                    id,
                    date: day(text(1)?),
                    flags: i64::from(number(2)?.is_some_and(|n| n != 0)) | i64::from(number(3)?.is_some_and(|n| n != 0)) << 1,
                    size: (side(4)?, side(5)?),
                    format: FileFormat::from_extension(text(6)?) as u8,
                    rating: number(7)?.filter(|n| (0..4).contains(n)),
                    score: number(8)?,
                    fav_count: number(9)?,
                });
            }
            Ok(posts)
        })
    }

    fn relations(&self, from: i64, to: i64, numbers: &[u32]) -> Result<Chunk> {
        self.with(|c| {
            let mut statement =
                c.prepare_cached("SELECT post_id, tag_id, rowid FROM posttagrelation WHERE rowid >= ? AND rowid < ? ORDER BY rowid")?;
            let mut rows = statement.query([from, to])?;
            let mut chunk = Chunk::default();
            let mut post = None;
            while let Some(row) = rows.next()? {
                let of: i64 = row.get(0)?;
                let (Ok(id), tag) = (u32::try_from(of), row.get::<_, i64>(1)?) else { continue };
                let number = usize::try_from(tag).ok().and_then(|t| numbers.get(t)).copied().unwrap_or(0);
                if number == 0 {
                    continue;
                }
                if post != Some(id) {
                    if let Some(before) = chunk.runs.last_mut() {
                        (before.end, before.last_row) = (chunk.bytes.len(), row.get::<_, i64>(2)? - 1);
                    }
                    chunk.runs.push(Run { post: id, end: 0, last_row: 0 });
                    post = Some(id);
                }
                tags::push(&mut chunk.bytes, number);
            }
            if let Some(run) = chunk.runs.last_mut() {
                (run.end, run.last_row) = (chunk.bytes.len(), to - 1);
            }
            Ok(chunk)
        })
    }
}

/// Neighbouring relations of one post.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub post: u32,
    /// End of its list in the chunk's bytes.
    end: usize,
    /// The last row before the next run.
    pub last_row: i64,
}

#[derive(Default)]
struct Chunk {
    runs: Vec<Run>,
    bytes: Vec<u8>,
}

/// All relations in the order of their rows, as runs.
pub(super) struct Runs {
    chunks: Prefetcher<Result<Chunk>>,
    chunk: Chunk,
    at: usize,
}

impl Runs {
    /// Starts behind row `after`.
    pub fn new(database: &Arc<Database>, numbers: Arc<Vec<u32>>, after: i64, threads: usize) -> Result<Self> {
        let (first, end) = database.bounds("posttagrelation", "rowid", after)?;
        let count = ((end - first).max(0) as u64).div_ceil(CHUNK as u64);
        let (reader, path) = (database.clone(), database.path.clone());
        let read = move |k: u64| reader.relations(first + k as i64 * CHUNK, (first + (k as i64 + 1) * CHUNK).min(end), &numbers);
        let chunks = Prefetcher::new(0..count, threads, threads, read);
        let chunks = chunks.map_err(|source| storage::Error::Io { doing: "start threads to read", path, source })?;
        Ok(Self { chunks, chunk: Chunk::default(), at: 0 })
    }

    /// The run that is next; `None` at the end.
    pub fn peek(&mut self) -> Result<Option<Run>> {
        while self.at >= self.chunk.runs.len() {
            match self.chunks.next() {
                Some(chunk) => (self.chunk, self.at) = (chunk?, 0),
                None => return Ok(None),
            }
        }
        Ok(Some(self.chunk.runs[self.at]))
    }

    /// The list of the run that [`Runs::peek`] gave.
    pub fn bytes(&self) -> &[u8] {
        let start = self.at.checked_sub(1).map_or(0, |before| self.chunk.runs[before].end);
        &self.chunk.bytes[start..self.chunk.runs[self.at].end]
    }

    /// Goes on to the next run.
    pub fn advance(&mut self) {
        self.at += 1;
    }
}
