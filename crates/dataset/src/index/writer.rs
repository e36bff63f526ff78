//! The one writer of an index under construction: files found, posts told of, tags. Rows of `image` get their file in
//! `finish`; until then those of new posts stand as absent.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OptionalExtension, params};
use storage::Stamp;

use super::files::id_of;
use super::posts::Post;
use super::tags::{self, Interner};
use super::{FileFormat, State, schema};
use crate::image::Header;
use crate::report::Named;
use crate::{Error, Result};

/// What is lost at most when a build is killed.
const COMMIT_EVERY: Duration = Duration::from_secs(5);

/// A picture that was found.
pub(super) struct Found {
    /// File name, or member of a shard.
    pub name: String,
    /// First byte, in a shard.
    pub offset: Option<u64>,
    pub len: u64,
    /// Of a file of its own.
    pub modified: Option<i64>,
    pub head: Head,
    pub caption: Option<String>,
    pub post: Option<Post>,
}

/// What its header says.
pub(super) enum Head {
    /// The file is as it was when its header was read.
    Unchanged,
    Read(Header),
    /// Why it cannot be used.
    Bad(String),
}

/// A file that the index has.
pub(super) struct Known {
    pub id: i64,
    pub image: u32,
    pub len: u64,
    pub modified: Option<i64>,
    pub state: State,
}

/// A folder or shard that the index has.
pub(super) struct Container {
    pub id: i64,
    /// Length and time when it was last read whole; `None` if it never was.
    pub stamp: Option<Stamp>,
}

/// What a build changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Files that are new.
    pub added: usize,
    /// Files that were read again because they changed or came back.
    pub updated: usize,
    /// Files that are not there any more.
    pub gone: usize,
    /// Files whose header cannot be read, with the reason, among those read now.
    pub broken: Named,
    /// Files left out, with the reason: names without a number where ids are those of posts.
    pub ignored: Named,
    /// Shards that are cut or no tar, with the reason.
    pub broken_shards: Named,
    /// Lines of metadata that cannot be read, with the reason.
    pub bad_lines: Named,
    /// Posts read from metadata.
    pub posts: usize,
}

pub(super) struct Writer {
    pub connection: Connection,
    pub path: PathBuf,
    /// Whether an image's id is the number in its name.
    pub ids_from_names: bool,
    pub interner: Interner,
    pub changes: Changes,
    next_image: u32,
    last_commit: Instant,
}

impl Writer {
    pub fn new(connection: Connection, path: &Path, ids_from_names: bool) -> Result<Self> {
        let failed = || Error::sqlite("write the index", path);
        let next = "SELECT max(ifnull((SELECT max(image) FROM file), 0), ifnull((SELECT max(id) FROM image), 0)) + 1";
        let next_image = connection.query_row(next, [], |row| row.get(0)).map_err(failed())?;
        let interner = Interner::load(&connection).map_err(failed())?;
        connection.execute_batch("BEGIN").map_err(failed())?;
        let (path, changes) = (path.to_path_buf(), Changes::default());
        Ok(Self { connection, path, ids_from_names, interner, changes, next_image, last_commit: Instant::now() })
    }

    /// Does something with the database.
    pub fn run<T>(&mut self, f: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        f(&self.connection).map_err(Error::sqlite("write the index", &self.path))
    }

    /// Writes what waits, if it is time.
    pub fn commit_if_due(&mut self) -> Result<()> {
        if self.is_due() { self.commit() } else { Ok(()) }
    }

    pub fn is_due(&self) -> bool {
        self.last_commit.elapsed() >= COMMIT_EVERY
    }

    pub fn commit(&mut self) -> Result<()> {
        self.last_commit = Instant::now();
        self.run(|c| c.execute_batch("COMMIT; BEGIN"))
    }

    pub fn meta(&mut self, key: &str) -> Result<Option<String>> {
        self.run(|c| schema::meta(c, key))
    }

    pub fn set_meta(&mut self, key: &str, value: &str) -> Result<()> {
        self.run(|c| schema::set_meta(c, key, value))
    }

    /// The number of a source, by its spec.
    pub fn source(&mut self, spec: &str) -> Result<i64> {
        self.run(|c| {
            c.execute("INSERT INTO source (spec) VALUES (?) ON CONFLICT DO NOTHING", [spec])?;
            c.query_row("SELECT id FROM source WHERE spec = ?", [spec], |row| row.get(0))
        })
    }

    pub fn container(&mut self, source: i64, path: &str) -> Result<Container> {
        self.run(|c| {
            let mut find = c.prepare_cached("SELECT id, length, modified, gone FROM container WHERE source = ? AND path = ?")?;
            let found = find.query_row(params![source, path], |row| {
                let (len, modified, gone) = (row.get::<_, i64>(1)?, row.get(2)?, row.get::<_, bool>(3)?);
                let stamp = u64::try_from(len).ok().filter(|_| !gone).map(|len| Stamp { len, modified });
                Ok(Container { id: row.get(0)?, stamp })
            });
            if let Some(found) = found.optional()? {
                return Ok(found);
            }
            let mut insert = c.prepare_cached("INSERT INTO container (source, path, length, modified, gone) VALUES (?, ?, -1, 0, 0)")?;
            insert.execute(params![source, path])?;
            Ok(Container { id: c.last_insert_rowid(), stamp: None })
        })
    }

    /// Notes that a container was read whole.
    pub fn container_done(&mut self, id: i64, stamp: Stamp, problem: Option<&str>) -> Result<()> {
        self.run(|c| {
            let mut update = c.prepare_cached("UPDATE container SET length = ?, modified = ?, gone = 0, problem = ? WHERE id = ?")?;
            update.execute(params![stamp.len, stamp.modified, problem, id]).map(drop)
        })
    }

    /// Marks the containers of a source that are not among `ids`, and their files, as gone.
    pub fn containers_gone(&mut self, source: i64, ids: &std::collections::HashSet<i64>) -> Result<()> {
        let all: Vec<i64> = self.run(|c| {
            let mut statement = c.prepare("SELECT id FROM container WHERE source = ? AND gone = 0")?;
            statement.query_map([source], |row| row.get(0))?.collect()
        })?;
        for id in all.into_iter().filter(|id| !ids.contains(id)) {
            self.changes.gone += self.run(|c| {
                c.execute("UPDATE container SET gone = 1 WHERE id = ?", [id])?;
                c.execute(
                    "UPDATE file SET state = ? WHERE container = ? AND state <> ?",
                    params![State::Gone as i64, id, State::Gone as i64],
                )
            })?;
        }
        Ok(())
    }

    /// The files of a container, by name.
    pub fn known_files(&mut self, container: i64) -> Result<HashMap<String, Known>> {
        self.run(|c| {
            let mut statement = c.prepare_cached("SELECT name, id, image, length, modified, state FROM file WHERE container = ?")?;
            let known = statement.query_map([container], |row| {
                let state = State::from_number(row.get(5)?);
                Ok((row.get(0)?, Known { id: row.get(1)?, image: row.get(2)?, len: row.get(3)?, modified: row.get(4)?, state }))
            })?;
            known.collect()
        })
    }

    /// Writes a file that was found; takes it out of `known`, so that what remains there is gone.
    pub fn put(&mut self, container: i64, known: &mut HashMap<String, Known>, found: Found) -> Result<()> {
        let before = known.remove(&found.name);
        let Some(image) = before.as_ref().map(|k| k.image).or_else(|| self.new_id(&found)) else {
            self.changes.ignored.add(format_args!("{}: its name is no number", found.name));
            return Ok(());
        };
        let (state, format, size, problem) = match &found.head {
            Head::Unchanged => return self.put_text(image, &found, before.is_some()),
            Head::Read(header) => (State::Present, header.format.into(), header.size, None),
            Head::Bad(why) => (State::Broken, FileFormat::Other, (0, 0), Some(why)),
        };
        if let Some(why) = problem {
            self.changes.broken.add(format_args!("{}: {why}", found.name));
        }
        *(if before.is_some() { &mut self.changes.updated } else { &mut self.changes.added }) += 1;
        self.run(|c| {
            let id = before.as_ref().map(|k| k.id);
            let mut statement = c.prepare_cached("INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")?;
            let Found { name, offset, len, modified, .. } = &found;
            let (state, format) = (state as i64, format as i64);
            statement.execute(params![id, image, state, format, size.0, size.1, container, offset, len, modified, name, problem]).map(drop)
        })?;
        self.put_text(image, &found, before.is_some())
    }

    /// Marks what remains of a container's known files as gone.
    pub fn files_gone(&mut self, known: HashMap<String, Known>) -> Result<()> {
        for known in known.into_values().filter(|k| k.state != State::Gone) {
            self.changes.gone += 1;
            self.run(|c| c.prepare_cached("UPDATE file SET state = 2 WHERE id = ?")?.execute([known.id]))?;
        }
        Ok(())
    }

    fn new_id(&mut self, found: &Found) -> Option<u32> {
        if self.ids_from_names {
            return id_of(&found.name);
        }
        let id = self.next_image;
        self.next_image = id.checked_add(1)?;
        Some(id)
    }

    fn put_text(&mut self, image: u32, found: &Found, known: bool) -> Result<()> {
        if let Some(text) = found.caption.as_deref().or(found.post.as_ref().and_then(|p| p.caption.as_deref())) {
            self.run(|c| c.prepare_cached("INSERT OR REPLACE INTO caption VALUES (?, ?)")?.execute(params![image, text]))?;
        } else if known {
            self.run(|c| c.prepare_cached("DELETE FROM caption WHERE image = ?")?.execute([image]))?;
        }
        match &found.post {
            Some(post) => self.put_post(image, post),
            None => Ok(()),
        }
    }

    /// Writes what is known of a post.
    pub fn put_post(&mut self, id: u32, post: &Post) -> Result<()> {
        let mut list = Vec::new();
        for (name, class) in &post.tags {
            let number = self.interner.number(&self.connection, name, *class, 0);
            tags::push(&mut list, number.map_err(Error::sqlite("write the index", &self.path))?.0);
        }
        self.run(|c| {
            let mut statement = c.prepare_cached(
                "INSERT INTO image (id, state, format, width, height, rating, score, fav_count, date, flags) VALUES (?, 1, ?, ?, ?, ?, ?, ?, ?, ?) \
                 ON CONFLICT (id) DO UPDATE SET rating = excluded.rating, score = excluded.score, fav_count = excluded.fav_count, \
                 date = excluded.date, flags = excluded.flags",
            )?;
            let size = post.size.unwrap_or_default();
            let format = post.format.unwrap_or(FileFormat::Other) as i64;
            let flags = i64::from(post.deleted) | i64::from(post.banned) << 1;
            let rating = post.rating.map(|r| r as i64);
            statement.execute(params![id, format, size.0, size.1, rating, post.score, post.fav_count, post.date, flags])?;
            if !list.is_empty() {
                c.prepare_cached("INSERT OR REPLACE INTO tags VALUES (?, ?)")?.execute(params![id, list])?;
            }
            Ok(())
        })
    }
}
