//! Reading an index: all rows at once for training, in parallel; one image's place, tags and caption when it is its turn.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use rayon::prelude::*;
use rusqlite::{Connection, OptionalExtension};

use super::{FileFormat, Rating, State, TagTable, schema};
use crate::{Error, Result};

/// An index of images, opened for reading. May be used from several threads.
///
/// # File format
/// A SQLite database, `application_id` 0x6C6F6B72 ("lokr"), `user_version` 1. Tables:
/// - `meta` (key, value): `state` is `complete` or `building`; `ids` is `posts` (an image's id is its post's) or
///   `numbered` (ids count from 1 in the order in which images were found); `fingerprint`, see [`Index::fingerprint`].
/// - `source` (id, spec): what it was built from, as JSON; folders below the index's own are relative to it.
/// - `container` (id, source, path, length, modified, gone, problem): a folder or a tar shard, relative to its source.
/// - `file` (id, image, state, format, width, height, container, offset, length, modified, name, problem): a picture
///   found. `offset` is its first byte in a tar shard, NULL for a file of its own. Sizes are after EXIF orientation.
/// - `image` (id, state, format, width, height, rating, score, fav_count, date, flags, file): what training reads, one
///   narrow row each, so that reading all of them is quick. `date` is year * 10000 + month * 100 + day in the post's time
///   zone, 0 where it cannot be read, NULL where none is known; `flags` has 1 for deleted, 2 for banned.
/// - `tag` (id, name, class, posts), `tags` (image, list): tag numbers in LEB128, in the order of the source.
/// - `caption` (image, text): text files and captions, all lines.
///
/// Numbers of states, formats, ratings and classes are those of [`State`], [`FileFormat`], [`Rating`],
/// [`super::TagClass`].
#[derive(Debug)]
pub struct Index {
    path: PathBuf,
    root: Option<PathBuf>,
    pool: Mutex<Vec<Connection>>,
    tags: OnceLock<Arc<TagTable>>,
}

/// What training and selection know of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The post's id, or the number that the index gave.
    pub id: u32,
    /// Whether there is a file.
    pub state: State,
    /// Its format.
    pub format: FileFormat,
    /// Width and height, of the file where there is one, else of the post.
    pub size: (u32, u32),
    /// Where it is known.
    pub rating: Option<Rating>,
    /// Votes, where they are known.
    pub score: Option<i32>,
    /// Favourites, where they are known.
    pub fav_count: Option<i32>,
    /// Year * 10000 + month * 100 + day; 0 where unreadable.
    pub date: Option<i32>,
    /// The post was deleted.
    pub deleted: bool,
    /// The post was banned.
    pub banned: bool,
}

/// Where an image's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file, or the tar shard.
    pub path: PathBuf,
    /// Name of the member, for a shard.
    pub member: Option<String>,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// When the file was last changed, as [`storage::Stamp::modified`]; the shard's for a member.
    pub modified: i64,
}

/// What a caption is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostInfo {
    /// The image.
    pub row: Row,
    /// Numbers of its tags, in the order of the source; their names are in [`Index::tags`].
    pub tags: Vec<u32>,
    /// Its caption, where it has one: all lines.
    pub caption: Option<String>,
}

/// What an index holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// All images.
    pub images: usize,
    /// With a file that can be read, by its header.
    pub present: usize,
    /// Without a file.
    pub absent: usize,
    /// Whose file is not there any more.
    pub gone: usize,
    /// Whose file has a broken header.
    pub broken: usize,
    /// Of deleted posts.
    pub deleted: usize,
    /// With tags.
    pub tagged: usize,
    /// With a caption.
    pub captioned: usize,
    /// Different tags.
    pub tags: usize,
}

/// The columns of `image` in the order that [`row_of`] reads them, and which rows.
macro_rules! select {
    ($rows:literal) => {
        concat!("SELECT id, state, format, width, height, rating, score, fav_count, date, flags FROM image ", $rows)
    };
}

fn row_of(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    let flags: i64 = row.get(9)?;
    Ok(Row {
        id: row.get(0)?,
        state: State::from_number(row.get(1)?),
        format: FileFormat::from_number(row.get(2)?),
        size: (row.get(3)?, row.get(4)?),
        rating: row.get::<_, Option<i64>>(5)?.and_then(Rating::from_number),
        score: row.get(6)?,
        fav_count: row.get(7)?,
        date: row.get(8)?,
        deleted: flags & 1 != 0,
        banned: flags & 2 != 0,
    })
}

impl Index {
    /// Opens an index whose build is complete.
    ///
    /// # Errors
    /// [`Error::Storage`] if there is no such file, [`Error::Index`] if it is something else, of another version, or not
    /// yet complete, [`Error::Sqlite`] if it cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            let way_out = "build it with `lokr dataset index`, or correct its path";
            return Err(Error::Index { path: path.into(), what: "there is no such file".into(), way_out });
        }
        let connection = schema::open_for_reading(path)?;
        let state = schema::meta(&connection, "state").map_err(Error::sqlite("read the index", path))?;
        if state.as_deref() != Some("complete") {
            return Err(Error::Index {
                path: path.into(),
                what: "its build was not finished".into(),
                way_out: "run `lokr dataset index` on it again: it goes on where it was",
            });
        }
        Ok(Self { path: path.into(), root: None, pool: Mutex::new(vec![connection]), tags: OnceLock::new() })
    }

    /// Looks for the files of every source below `root`, for an index whose images have moved.
    pub fn with_root(self, root: &Path) -> Self {
        Self { root: Some(root.into()), ..self }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A hash (blake3, hex) of every image's row, tags and caption, kept in the index since its build. Places do not enter:
    /// the same images under another folder, or in other shards, have the same hash.
    ///
    /// # Errors
    /// [`Error::Sqlite`].
    pub fn fingerprint(&self) -> Result<String> {
        Ok(self.with(|c| schema::meta(c, "fingerprint"))?.unwrap_or_default())
    }

    /// Counts of what it holds.
    ///
    /// # Errors
    /// [`Error::Sqlite`].
    pub fn summary(&self) -> Result<Summary> {
        self.with(|c| {
            let mut summary = Summary::default();
            let mut states = c.prepare("SELECT state, count(*), sum(flags & 1) FROM image GROUP BY state")?;
            let mut rows = states.query([])?;
            while let Some(row) = rows.next()? {
                let count: usize = row.get(1)?;
                summary.images += count;
                summary.deleted += row.get::<_, usize>(2)?;
                *match State::from_number(row.get(0)?) {
                    State::Present => &mut summary.present,
                    State::Absent => &mut summary.absent,
                    State::Gone => &mut summary.gone,
                    State::Broken => &mut summary.broken,
                } = count;
            }
            let count = |table: &str| c.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0));
            (summary.tagged, summary.captioned, summary.tags) = (count("tags")?, count("caption")?, count("tag")?);
            Ok(summary)
        })
    }

    /// All rows in the order of ids, each through `take`, which keeps what it needs (or nothing). Read in parallel.
    ///
    /// # Errors
    /// [`Error::Sqlite`].
    pub fn scan<T: Send>(&self, take: impl Fn(Row) -> Option<T> + Sync) -> Result<Vec<T>> {
        const SQL: &str = select!("WHERE id >= ?1 AND id < ?2 ORDER BY id");
        self.in_parts("image", |connection, from, to| {
            let mut taken = Vec::new();
            let mut statement = connection.prepare_cached(SQL)?;
            let mut rows = statement.query([from, to])?;
            while let Some(row) = rows.next()? {
                taken.extend(take(row_of(row)?));
            }
            Ok(taken)
        })
    }

    /// As [`Index::scan`], over the lists of tags: ids ascending, images without tags left out.
    ///
    /// # Errors
    /// [`Error::Sqlite`].
    pub fn scan_tags<T: Send>(&self, take: impl Fn(u32, &[u8]) -> Option<T> + Sync) -> Result<Vec<T>> {
        self.in_parts("tags", |connection, from, to| {
            let mut taken = Vec::new();
            let mut statement =
                connection.prepare_cached("SELECT image, list FROM tags WHERE image >= ?1 AND image < ?2 ORDER BY image")?;
            let mut rows = statement.query([from, to])?;
            while let Some(row) = rows.next()? {
                taken.extend(take(row.get(0)?, row.get_ref(1)?.as_blob()?));
            }
            Ok(taken)
        })
    }

    /// Runs `part` over ranges of ids in parallel and joins what they give, in the order of ids.
    fn in_parts<T: Send>(&self, table: &str, part: impl Fn(&Connection, i64, i64) -> rusqlite::Result<Vec<T>> + Sync) -> Result<Vec<T>> {
        let key = if table == "image" { "id" } else { "image" };
        let bounds = format!("SELECT ifnull(min({key}), 0), ifnull(max({key}), -1) + 1 FROM {table}");
        let (first, end): (i64, i64) = self.with(|c| c.query_row(&bounds, [], |row| Ok((row.get(0)?, row.get(1)?))))?;
        let width = ((end - first) / (8 * rayon::current_num_threads() as i64)).max(1 << 12);
        let starts: Vec<i64> = (first..end).step_by(width as usize).collect();
        let parts: Result<Vec<Vec<T>>> = starts.into_par_iter().map(|from| self.with(|c| part(c, from, (from + width).min(end)))).collect();
        let parts = parts?;
        let mut all = Vec::with_capacity(parts.iter().map(Vec::len).sum());
        parts.into_iter().for_each(|part| all.extend(part));
        Ok(all)
    }

    /// One image's row.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`], [`Error::Sqlite`].
    pub fn row(&self, id: u32) -> Result<Row> {
        let found = self.with(|c| c.prepare_cached(select!("WHERE id = ?"))?.query_row([id], row_of).optional())?;
        found.ok_or_else(|| Error::NoSuchImage { path: self.path.clone(), id })
    }

    /// One image's row, tags and caption.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`], [`Error::Sqlite`].
    pub fn post(&self, id: u32) -> Result<PostInfo> {
        // One statement, so that the file is locked and let go once.
        const SQL: &str = "SELECT id, state, format, width, height, rating, score, fav_count, date, flags, list, text FROM image \
            LEFT JOIN tags ON tags.image = id LEFT JOIN caption ON caption.image = id WHERE id = ?";
        let read = |row: &rusqlite::Row<'_>| {
            let tags = row.get_ref(10)?.as_blob_or_null()?.map(|list| super::numbers(list).collect()).unwrap_or_default();
            Ok(PostInfo { row: row_of(row)?, tags, caption: row.get(11)? })
        };
        let found = self.with(|c| c.prepare_cached(SQL)?.query_row([id], read).optional())?;
        found.ok_or_else(|| Error::NoSuchImage { path: self.path.clone(), id })
    }

    /// Where one image's bytes are; `None` if it has no file.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`], [`Error::Sqlite`].
    pub fn place(&self, id: u32) -> Result<Option<Place>> {
        const SQL: &str = "SELECT f.name, f.offset, f.length, ifnull(f.modified, c.modified), c.path, s.spec FROM image i \
            LEFT JOIN file f ON f.id = i.file LEFT JOIN container c ON c.id = f.container LEFT JOIN source s ON s.id = c.source WHERE i.id = ?";
        let found = self.with(|c| {
            let read = |row: &rusqlite::Row<'_>| {
                let Some(name) = row.get::<_, Option<String>>(0)? else { return Ok(None) };
                Ok(Some((
                    name,
                    row.get::<_, Option<u64>>(1)?,
                    row.get(2)?,
                    row.get(3)?,
                    row.get::<_, String>(4)?,
                    row.get::<_, String>(5)?,
                )))
            };
            c.prepare_cached(SQL)?.query_row([id], read).optional()
        })?;
        let found = found.ok_or_else(|| Error::NoSuchImage { path: self.path.clone(), id })?;
        Ok(found.map(|(name, offset, len, modified, container, spec)| {
            let container = self.root_of(&spec).join(container);
            match offset {
                Some(offset) => Place { path: container, member: Some(name), offset, len, modified },
                None => Place { path: container.join(name), member: None, offset: 0, len, modified },
            }
        }))
    }

    /// The folder that the containers of a source are relative to.
    fn root_of(&self, spec: &str) -> PathBuf {
        if let Some(root) = &self.root {
            return root.clone();
        }
        super::sources::Source::from_spec(spec).map_or_else(PathBuf::new, |source| source.root(super::sources::home(&self.path)))
    }

    /// All tags.
    ///
    /// # Errors
    /// [`Error::Sqlite`].
    pub fn tags(&self) -> Result<&Arc<TagTable>> {
        if let Some(tags) = self.tags.get() {
            return Ok(tags);
        }
        let loaded = Arc::new(self.with(TagTable::load)?);
        Ok(self.tags.get_or_init(|| loaded))
    }

    /// Lends one of the connections, as many as there are callers at once.
    pub(super) fn with<T>(&self, use_it: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        let idle = self.pool.lock().unwrap_or_else(|e| e.into_inner()).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => schema::open_for_reading(&self.path)?,
        };
        let result = use_it(&connection).map_err(Error::sqlite("read the index", &self.path));
        self.pool.lock().unwrap_or_else(|e| e.into_inner()).push(connection);
        result
    }
}

impl Place {
    /// The image's bytes, checked to be as many as the index says.
    ///
    /// # Errors
    /// [`storage::Error`] if the file cannot be read or is shorter.
    pub fn read(&self) -> storage::Result<Vec<u8>> {
        match self.member {
            Some(_) => storage::read_range(&self.path, self.offset, usize::try_from(self.len).unwrap_or(usize::MAX)),
            None => storage::read(&self.path),
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.member {
            Some(member) => write!(f, "{}: {member}", self.path.display()),
            None => write!(f, "{}", self.path.display()),
        }
    }
}
