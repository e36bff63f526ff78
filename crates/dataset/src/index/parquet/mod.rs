//! Posts in parquet files: danbooru's as dumps of its API have them (one row per post, tags as text by class), and whatever
//! else has columns of these names. A thread reads rows ahead while this one writes; of the file, a few pages of each column are
//! in memory.
//!
//! What a row tells is read as the JSON object of the same names would be, so both forms of a dump give the same index.

mod columns;

use std::io::{self, BufReader, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use ::parquet::errors::{ParquetError, Result as ParquetResult};
use ::parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use ::parquet::record::Field;
use ::parquet::record::reader::RowIter;
use ::parquet::schema::types::Type;
use bytes::Bytes;
use crossbeam_channel::{Sender, bounded};
use serde_json::{Map, Value};
use storage::RangeReader;

use self::columns::{Column, columns};
use super::build::Reporter;
use super::position::Position;
use super::posts::{self, Post};
use super::writer::Writer;
use crate::{Error, Result};

/// Rows that are handed over together.
const ROWS: usize = 4096;
/// Such heaps that wait at most.
const AHEAD: usize = 4;

/// Neighbouring rows of one group.
struct Rows {
    group: usize,
    /// Rows of the group up to the last of these.
    until: i64,
    posts: Vec<Post>,
}

/// Reads posts out of a parquet file. The position is (row group, rows done of it).
pub(super) fn read(writer: &mut Writer, source: i64, file: &Path, report: &mut Reporter) -> Result<()> {
    let mut position = Position::load(writer, source, file, [0, 0])?;
    if position.done {
        return Ok(());
    }
    let reader = guarded(file, || SerializedFileReader::new(Chunks::open(file)?))?;
    let columns = columns(file, reader.metadata())?;
    // Rows before each group, and all of them.
    let mut starts = vec![0];
    for group in reader.metadata().row_groups() {
        starts.push(starts[starts.len() - 1] + group.num_rows().max(0));
    }
    let total = starts.last().copied().unwrap_or(0);
    let from = position.at;
    let (sender, heaps) = bounded(AHEAD);
    std::thread::scope(|scope| {
        let (reader, columns) = (&reader, &columns);
        std::thread::Builder::new()
            .name("parquet".into())
            .spawn_scoped(scope, move || send_rows(file, reader, columns, from, &sender))
            .map_err(|source| storage::Error::Io { doing: "start a thread to read", path: file.into(), source })?;
        for rows in heaps {
            let Rows { group, until, posts } = rows?;
            let first = starts[group] + until - posts.len() as i64;
            for (post, row) in posts.iter().zip(first + 1..) {
                match post.id {
                    Some(id) => {
                        writer.put_post(id, post)?;
                        writer.changes.posts += 1;
                    }
                    None => writer.changes.bad_lines.add(format_args!("{}: row {row}: it has no id", file.display())),
                }
            }
            position.at = [group as i64, until];
            position.pass(writer, report, (starts[group] + until) as u64, total as u64)?;
        }
        position.done = true;
        position.commit(writer)
    })
}

/// Reads all rows from a position on; ends early where nobody listens any more.
fn send_rows(file: &Path, reader: &SerializedFileReader<Chunks>, columns: &[Column], from: [i64; 2], sender: &Sender<Result<Rows>>) {
    let first = usize::try_from(from[0]).unwrap_or(0);
    for group in first..reader.num_row_groups() {
        let skip = if group == first { usize::try_from(from[1]).unwrap_or(0) } else { 0 };
        match send_group(file, reader, columns, (group, skip), sender) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                // Where nobody listens there is nobody to tell.
                _ = sender.send(Err(error));
                return;
            }
        }
    }
}

/// Reads the rows of a group behind the first `skip`; `false` if nobody listens any more.
fn send_group(
    file: &Path,
    reader: &SerializedFileReader<Chunks>,
    columns: &[Column],
    (group, skip): (usize, usize),
    sender: &Sender<Result<Rows>>,
) -> Result<bool> {
    let pages = guarded(file, || reader.get_row_group(group))?;
    let mut rows = guarded(file, || {
        let name = reader.metadata().file_metadata().schema().name();
        let wanted = Type::group_type_builder(name).with_fields(columns.iter().map(|c| c.field.clone()).collect()).build()?;
        let mut rows = RowIter::from_row_group(Some(wanted), &*pages)?;
        (0..skip).try_for_each(|_| rows.next().transpose().map(drop))?;
        Ok(rows)
    })?;
    let mut until = skip as i64;
    loop {
        let posts: Vec<Post> = guarded(file, || rows.by_ref().take(ROWS).map(|row| Ok(post(row?.into_columns(), columns))).collect())?;
        if posts.is_empty() {
            return Ok(true);
        }
        until += posts.len() as i64;
        if sender.send(Ok(Rows { group, until, posts })).is_err() {
            return Ok(false);
        }
    }
}

/// Runs the crate's code on a file that may hold anything: it panics on some schemas and broken pages.
fn guarded<T>(file: &Path, f: impl FnOnce() -> ParquetResult<T>) -> Result<T> {
    let outcome = catch_unwind(AssertUnwindSafe(f));
    let what = match outcome {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(ParquetError::External(cause))) => match cause.downcast::<storage::Error>() {
            Ok(error) => return Err((*error).into()),
            Err(cause) => cause.to_string(),
        },
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the reader of parquet panicked".into(),
    };
    let way_out = "the file may be cut or damaged: fetch it again; or turn it into JSON lines, as with duckdb: COPY (SELECT * FROM 'posts.parquet') TO 'posts.jsonl' (FORMAT json)";
    Err(Error::Source { path: file.into(), what: format!("its parquet data cannot be read: {what}"), way_out })
}

fn post(fields: Vec<(String, Field)>, columns: &[Column]) -> Post {
    let mut object = Map::new();
    for ((_, field), column) in fields.into_iter().zip(columns) {
        let field = match (column.per_microsecond, field) {
            (Some(per), Field::Long(number)) => Field::TimestampMicros(number.div_euclid(per)),
            (_, field) => field,
        };
        object.insert(column.key.clone(), value(field));
    }
    posts::from_object(&object)
}

fn value(field: Field) -> Value {
    /// Microseconds of the years that a date can be made of, with room.
    const MOST: i64 = 8_000 * 366 * 86_400 * 1_000_000;
    match field {
        Field::Bool(flag) => flag.into(),
        Field::Byte(n) => n.into(),
        Field::Short(n) => n.into(),
        Field::Int(n) => n.into(),
        Field::Long(n) => n.into(),
        Field::UByte(n) => n.into(),
        Field::UShort(n) => n.into(),
        Field::UInt(n) => n.into(),
        Field::ULong(n) => n.into(),
        Field::Float(n) => f64::from(n).into(),
        Field::Double(n) => n.into(),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => bytes.as_utf8().map_or(Value::Null, Value::from),
        Field::Date(days) if i64::from(days).abs() < MOST / 86_400_000_000 => field.to_string().into(),
        Field::TimestampMillis(t) if t.checked_abs().is_some_and(|t| t < MOST / 1000) => field.to_string().into(),
        Field::TimestampMicros(t) if t.checked_abs().is_some_and(|t| t < MOST) => field.to_string().into(),
        Field::Group(row) => Value::Object(row.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect()),
        Field::ListInternal(list) => list.elements().iter().map(|field| value(field.clone())).collect(),
        _ => Value::Null,
    }
}

/// The file, for the crate that reads parquet.
struct Chunks {
    path: PathBuf,
    len: u64,
}

impl Chunks {
    fn open(path: &Path) -> ParquetResult<Self> {
        Ok(Self { path: path.into(), len: storage::file_len(path).map_err(external)? })
    }
}

fn external(error: storage::Error) -> ParquetError {
    ParquetError::External(Box::new(error))
}

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.len
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<Tail>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        Ok(BufReader::new(Tail { file: RangeReader::open(&self.path).map_err(external)?, at: start }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        Ok(storage::read_range(&self.path, start, length).map_err(external)?.into())
    }
}

/// A file from some byte on.
struct Tail {
    file: RangeReader,
    at: u64,
}

impl Read for Tail {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.file.read_up_to(self.at, buffer.len()).map_err(io::Error::other)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }
}
