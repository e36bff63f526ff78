//! Where each latent of a folder lies: a SQLite file `latents.sqlite` beside the shards, made from their headers. It holds
//! nothing that the shards do not: deleted, damaged or of an older form, it is made anew. Every process that fills the
//! folder adds its shards to it, and so sees those of the others.
//!
//! Where it cannot be written (a read-only folder), the same tables are kept in memory.
//!
//! # File format
//! `user_version` 1. `space` (id, vae, dtype); `shard` (id, name, length, modified, space, problem); `latent` (space, id: the
//! first 16 bytes of the [`super::LatentId`], shard, offset: of the first byte in the file, height, width).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use rayon::prelude::*;
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use storage::Stamp;
use storage::safetensors::{Dtype, SafeTensors};

use super::{CacheDtype, FORMAT, LatentId};
use crate::report::Named;
use crate::source::chain;
use crate::{Error, Result};

const NAME: &str = "latents.sqlite";
const VERSION: i64 = 1;
const TABLES: &str = "
CREATE TABLE space (id INTEGER PRIMARY KEY, vae TEXT NOT NULL, dtype TEXT NOT NULL, UNIQUE (vae, dtype));
CREATE TABLE shard (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, length INTEGER NOT NULL, modified INTEGER NOT NULL,
    space INTEGER, problem TEXT);
CREATE TABLE latent (space INTEGER NOT NULL, id BLOB NOT NULL, shard INTEGER NOT NULL, offset INTEGER NOT NULL,
    height INTEGER NOT NULL, width INTEGER NOT NULL, PRIMARY KEY (space, id)) WITHOUT ROWID;
";

/// The catalogue of one folder, for one VAE and element type.
#[derive(Debug)]
pub(super) struct Catalogue {
    folder: PathBuf,
    connection: Mutex<Connection>,
    vae: String,
    dtype: CacheDtype,
    space: i64,
}

/// Where a latent is.
pub(super) struct Place {
    pub path: PathBuf,
    pub offset: u64,
    pub shape: [usize; 3],
}

/// What the header of a shard says.
struct Head {
    vae: String,
    dtype: CacheDtype,
    /// Id, offset, height, width.
    latents: Vec<([u8; 16], u64, usize, usize)>,
}

impl Catalogue {
    pub fn open(folder: PathBuf, vae: &str, dtype: CacheDtype) -> Result<Self> {
        storage::create_dir_all(&folder)?;
        let path = folder.join(NAME);
        let connection = match on_disk(&path) {
            Ok(connection) => connection,
            Err(error) => {
                tracing::warn!("`{}` cannot be used, so the shards' headers are read anew: {error}", path.display());
                in_memory().map_err(Error::sqlite("keep in memory", &path))?
            }
        };
        let mut catalogue = Self { folder, connection: Mutex::new(connection), vae: vae.into(), dtype, space: 0 };
        if let Err(error) = catalogue.refresh() {
            // What is on disk cannot be written, as in a read-only folder.
            if !matches!(error, Error::Sqlite { .. }) {
                return Err(error);
            }
            catalogue.connection = Mutex::new(in_memory().map_err(Error::sqlite("keep in memory", &path))?);
            catalogue.refresh()?;
        }
        catalogue.space = catalogue.with(|c| space(c, vae, dtype))?;
        Ok(catalogue)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Takes in what has changed in the folder since: new shards, those that are gone, those that are other files now.
    pub fn refresh(&self) -> Result<()> {
        let mut files = HashMap::new();
        for path in storage::list_dir(&self.folder)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with("latents-") && name.ends_with(".safetensors") && !storage::is_scratch(&path) {
                files.extend(storage::stamp(&path).ok().map(|stamp| (name, stamp)));
            }
        }
        self.with(|c| {
            let mut statement = c.prepare("SELECT id, name, length, modified FROM shard")?;
            let known = statement.query_map([], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?, Stamp { len: row.get(2)?, modified: row.get(3)? }))
            })?;
            let mut new = files;
            let mut stale = Vec::new();
            for known in known {
                let (id, name, stamp) = known?;
                match new.get(&name) {
                    Some(now) if *now == stamp => _ = new.remove(&name),
                    _ => stale.push(id),
                }
            }
            drop(statement);
            if new.is_empty() && stale.is_empty() {
                return Ok(());
            }
            let mut new: Vec<(String, Stamp)> = new.into_iter().collect();
            new.sort_by(|a, b| a.0.cmp(&b.0));
            let heads: Vec<_> = new.par_iter().map(|(name, _)| head(&self.folder.join(name))).collect();
            // Another process may have taken the same shards in meanwhile: REPLACE makes the two agree.
            let transaction = c.transaction_with_behavior(TransactionBehavior::Immediate)?;
            for id in stale {
                transaction.execute("DELETE FROM latent WHERE shard = ?", [id])?;
                transaction.execute("DELETE FROM shard WHERE id = ?", [id])?;
            }
            for ((name, stamp), head) in new.iter().zip(heads) {
                put(&transaction, name, *stamp, head)?;
            }
            transaction.commit()
        })
    }

    /// Where a latent is, if it is.
    pub fn find(&self, id: &LatentId) -> Result<Option<Place>> {
        const SQL: &str = "SELECT s.name, l.offset, l.height, l.width FROM latent l JOIN shard s ON s.id = l.shard \
            WHERE l.space = ? AND l.id = ?";
        self.with(|c| {
            let read = |row: &rusqlite::Row<'_>| {
                let path = self.folder.join(row.get_ref(0)?.as_str()?);
                Ok(Place { path, offset: row.get(1)?, shape: [4, row.get(2)?, row.get(3)?] })
            };
            c.prepare_cached(SQL)?.query_row(params![self.space, &id.0[..16]], read).optional()
        })
    }

    /// Latents of this VAE and type.
    pub fn count(&self) -> Result<usize> {
        self.with(|c| c.query_row("SELECT count(*) FROM latent WHERE space = ?", [self.space], |row| row.get(0)))
    }

    /// Shards that are not of this VAE and type, with the reason.
    pub fn ignored(&self) -> Result<Named> {
        self.with(|c| {
            let mut ignored = Named::default();
            let mut statement = c.prepare(
                "SELECT s.name, s.problem, p.vae, p.dtype FROM shard s LEFT JOIN space p ON p.id = s.space \
                 WHERE s.space IS NULL OR s.space <> ? ORDER BY s.name",
            )?;
            let mut rows = statement.query([self.space])?;
            while let Some(row) = rows.next()? {
                let name: String = row.get(0)?;
                match (row.get::<_, Option<String>>(1)?, row.get::<_, Option<String>>(2)?, row.get::<_, Option<String>>(3)?) {
                    (None, Some(vae), _) if vae != self.vae => {
                        ignored.add(format_args!("{name}: made by another VAE (`{vae}`, not `{}`)", self.vae));
                    }
                    (None, _, Some(dtype)) => ignored.add(format_args!("{name}: its latents are {dtype}, not {:?}", self.dtype)),
                    (problem, ..) => ignored.add(format_args!("{name}: {}", problem.unwrap_or_default())),
                }
            }
            Ok(ignored)
        })
    }

    fn with<T>(&self, use_it: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Result<T> {
        let mut connection = self.connection.lock().unwrap_or_else(|e| e.into_inner());
        use_it(&mut connection).map_err(Error::sqlite("use the catalogue of latents", &self.folder.join(NAME)))
    }
}

/// Opens the file, or makes it (anew, if it is damaged or of another form).
fn on_disk(path: &Path) -> rusqlite::Result<Connection> {
    let open = || -> rusqlite::Result<Connection> {
        let mut connection = Connection::open(path)?;
        // Long enough for another process that reads the headers of thousands of shards.
        connection.busy_timeout(Duration::from_secs(120))?;
        // It can be made again from the shards, so it need not survive a power loss.
        connection.pragma_update(None, "synchronous", "OFF")?;
        set_up(&mut connection)?;
        Ok(connection)
    };
    open().or_else(|error| match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::Unknown) => {
            _ = storage::remove_file(path);
            open()
        }
        _ => Err(error),
    })
}

fn in_memory() -> rusqlite::Result<Connection> {
    let mut connection = Connection::open_in_memory()?;
    set_up(&mut connection)?;
    Ok(connection)
}

fn set_up(connection: &mut Connection) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if version != VERSION {
        transaction.execute_batch("DROP TABLE IF EXISTS space; DROP TABLE IF EXISTS shard; DROP TABLE IF EXISTS latent;")?;
        transaction.execute_batch(TABLES)?;
        transaction.pragma_update(None, "user_version", VERSION)?;
    }
    transaction.commit()
}

fn space(connection: &Connection, vae: &str, dtype: CacheDtype) -> rusqlite::Result<i64> {
    let dtype = format!("{dtype:?}");
    let find = |c: &Connection| {
        c.prepare_cached("SELECT id FROM space WHERE vae = ? AND dtype = ?")?.query_row([vae, &dtype], |row| row.get(0)).optional()
    };
    if let Some(id) = find(connection)? {
        return Ok(id);
    }
    connection.execute("INSERT OR IGNORE INTO space (vae, dtype) VALUES (?, ?)", [vae, &dtype])?;
    Ok(find(connection)?.unwrap_or_default())
}

/// Writes down a shard: its latents, or why it has none.
fn put(connection: &Connection, name: &str, stamp: Stamp, head: std::result::Result<Head, String>) -> rusqlite::Result<()> {
    let (of, problem) = match &head {
        Ok(head) => (Some(space(connection, &head.vae, head.dtype)?), None),
        Err(problem) => {
            tracing::warn!("latent cache shard {name} is ignored: {problem}");
            (None, Some(problem))
        }
    };
    let mut shard =
        connection.prepare_cached("INSERT OR REPLACE INTO shard (name, length, modified, space, problem) VALUES (?, ?, ?, ?, ?)")?;
    shard.execute(params![name, stamp.len, stamp.modified, of, problem])?;
    let shard = connection.last_insert_rowid();
    let mut latent = connection.prepare_cached("INSERT OR REPLACE INTO latent VALUES (?, ?, ?, ?, ?, ?)")?;
    for (id, offset, height, width) in head.map(|head| head.latents).unwrap_or_default() {
        latent.execute(params![of, id, shard, offset, height, width])?;
    }
    Ok(())
}

/// Reads the header of a shard.
fn head(path: &Path) -> std::result::Result<Head, String> {
    let shard = SafeTensors::open(path).map_err(|e| chain(&e))?;
    let says = |key: &str| shard.metadata().get(key).map_or("", String::as_str);
    if says("lokr.format") != FORMAT {
        return Err(format!("its format is `{}`, not `{FORMAT}`", says("lokr.format")));
    }
    let mut latents = Vec::new();
    let mut dtype = None;
    for name in shard.names() {
        let (Some(info), Some(place)) = (shard.info(name), shard.place(name)) else { continue };
        let of = match info.dtype {
            Dtype::F16 => CacheDtype::F16,
            Dtype::F32 => CacheDtype::F32,
            other => return Err(format!("its latents are {other:?}")),
        };
        let id = blake3::Hash::from_hex(name).map_err(|_| format!("`{name}` is no latent's name"))?;
        match info.shape[..] {
            [4, height, width] if *dtype.get_or_insert(of) == of => {
                let mut short = [0; 16];
                short.copy_from_slice(&id.as_bytes()[..16]);
                latents.push((short, place.start, height, width));
            }
            _ => return Err(format!("`{name}` has the shape {:?} and type {:?}", info.shape, info.dtype)),
        }
    }
    let dtype = dtype.ok_or("it holds no latent")?;
    Ok(Head { vae: says("lokr.vae").into(), dtype, latents })
}
