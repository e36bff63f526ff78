//! Opening the database: for reading, with its form checked; for building, with its tables made. What the tables mean
//! stands on [`super::Index`].

use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, OptionalExtension, params};

use crate::{Error, Result};

/// "lokr", in the header of the file: other SQLite files are told from an index by it.
const APPLICATION_ID: i64 = 0x6C6F_6B72;
/// Version of the tables.
pub(super) const VERSION: i64 = 1;

const TABLES: &str = "
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE source (id INTEGER PRIMARY KEY, spec TEXT NOT NULL UNIQUE);
CREATE TABLE container (id INTEGER PRIMARY KEY, source INTEGER NOT NULL, path TEXT NOT NULL, length INTEGER NOT NULL,
    modified INTEGER NOT NULL, gone INTEGER NOT NULL, problem TEXT, UNIQUE (source, path));
CREATE TABLE file (id INTEGER PRIMARY KEY, image INTEGER NOT NULL, state INTEGER NOT NULL, format INTEGER NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, container INTEGER NOT NULL, offset INTEGER, length INTEGER NOT NULL,
    modified INTEGER, name TEXT NOT NULL, problem TEXT);
CREATE INDEX file_container ON file (container);
CREATE TABLE image (id INTEGER PRIMARY KEY, state INTEGER NOT NULL, format INTEGER NOT NULL, width INTEGER NOT NULL,
    height INTEGER NOT NULL, rating INTEGER, score INTEGER, fav_count INTEGER, date INTEGER, flags INTEGER NOT NULL, file INTEGER);
CREATE TABLE tag (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, class INTEGER NOT NULL, posts INTEGER NOT NULL);
CREATE TABLE tags (image INTEGER PRIMARY KEY, list BLOB NOT NULL);
CREATE TABLE caption (image INTEGER PRIMARY KEY, text TEXT NOT NULL);
";

/// Opens an index for reading.
pub(super) fn open_for_reading(path: &Path) -> Result<Connection> {
    storage::stamp(path)?;
    let failed = || Error::sqlite("read the index", path);
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(failed())?;
    connection.busy_timeout(Duration::from_secs(10)).map_err(failed())?;
    check_form(&connection, path)?;
    keep_plans(&connection).map_err(failed())?;
    // One transaction for as long as it is open: nothing is locked and looked up anew for each image, and no build can
    // change the index under a run.
    connection.execute_batch("BEGIN").map_err(failed())?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(connection)
}

/// Opens an index for building, alone; makes it where there is none.
pub(super) fn open_for_building(path: &Path) -> Result<Connection> {
    let failed = || Error::sqlite("write the index", path);
    let connection = Connection::open(path).map_err(failed())?;
    let setup = || -> rusqlite::Result<bool> {
        keep_plans(&connection)?;
        connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        // Bulk appends touch few pages that existed before, so little goes through the journal.
        connection.pragma_update(None, "journal_mode", "TRUNCATE")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        connection.pragma_update(None, "cache_size", -(256i64 << 10))?;
        connection.execute_batch("BEGIN EXCLUSIVE")?;
        let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        if tables == 0 {
            connection.pragma_update(None, "application_id", APPLICATION_ID)?;
            connection.pragma_update(None, "user_version", VERSION)?;
            connection.execute_batch(TABLES)?;
        }
        connection.execute_batch("COMMIT")?;
        Ok(tables == 0)
    };
    if !setup().map_err(failed())? {
        check_form(&connection, path)?;
    }
    Ok(connection)
}

/// Without this, a prepared statement is parsed and planned anew whenever another value is bound to it (SQLite with STAT4),
/// which costs more than a lookup.
fn keep_plans(connection: &Connection) -> rusqlite::Result<()> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true).map(drop)
}

fn check_form(connection: &Connection, path: &Path) -> Result<()> {
    let number =
        |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0)).map_err(Error::sqlite("read the index", path));
    let refuse = |what: String, way_out| Err(Error::Index { path: path.into(), what, way_out });
    if number("application_id")? != APPLICATION_ID {
        return refuse("it is a SQLite database of another program".into(), "build an index from it with `lokr dataset index`");
    }
    match number("user_version")? {
        VERSION => Ok(()),
        other => {
            refuse(format!("its form is version {other}, this program knows version {VERSION}"), "build it again with `lokr dataset index`")
        }
    }
}

/// A value of the table `meta`.
pub(super) fn meta(connection: &Connection, key: &str) -> rusqlite::Result<Option<String>> {
    connection.prepare_cached("SELECT value FROM meta WHERE key = ?")?.query_row([key], |row| row.get(0)).optional()
}

/// Sets a value of the table `meta`.
pub(super) fn set_meta(connection: &Connection, key: &str, value: &str) -> rusqlite::Result<()> {
    connection.prepare_cached("INSERT OR REPLACE INTO meta VALUES (?, ?)")?.execute(params![key, value]).map(drop)
}
