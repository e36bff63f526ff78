//! Plain reads, folders, deletions and appended lines: thin, but every error names its path. Writing whole files is
//! `whole.rs`.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Reads a whole file.
///
/// # Errors
/// [`Error::Io`] if it cannot be opened or read.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::io("read", path))
}

/// Reads a whole text file.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Utf8`] with the place of the first byte that is not UTF-8.
pub fn read_to_string(path: &Path) -> Result<String> {
    String::from_utf8(read(path)?).map_err(|e| Error::Utf8 { path: path.to_path_buf(), byte: e.utf8_error().valid_up_to() })
}

/// Appends `line` and a line end with one write call, creating the file if absent. Readers that follow the file, and
/// other processes that append to it, thus see whole lines. Nothing is synced: metrics may lose their last lines.
///
/// What is left: after a returned error or a kill, at most one torn line at the end (a full disk may take part of it);
/// after power loss, any number of the last lines may be gone. The next call starts on a fresh line, so a torn line
/// spoils no other.
///
/// # Errors
/// [`Error::Io`] if it cannot be written, or if `line` itself holds a line end.
pub fn append_line(path: &Path, line: &str) -> Result<()> {
    if line.contains('\n') {
        return Err(Error::io("append to", path)(io::Error::new(ErrorKind::InvalidInput, "the line holds a line end")));
    }
    append(path, line).map_err(Error::io("append to", path))
}

fn append(path: &Path, line: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
    let mut bytes = Vec::with_capacity(line.len() + 2);
    if file.metadata()?.len() > 0 {
        let mut last = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            bytes.push(b'\n');
        }
    }
    bytes.extend_from_slice(line.as_bytes());
    bytes.push(b'\n');
    file.write_all(&bytes)
}

/// Creates a folder and those above it; no error if it exists.
///
/// # Errors
/// [`Error::Io`], also where a file stands in the way.
pub fn create_dir_all(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("create the folder", path))
}

/// Deletes a file.
///
/// # Errors
/// [`Error::Io`], also if it is absent (see [`Error::is_not_found`]).
pub fn remove_file(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(Error::io("delete", path))
}

/// Deletes a folder and all in it. Links are deleted, not followed. Not atomic: rename it first where a half-deleted
/// folder could be mistaken for a whole one.
///
/// # Errors
/// [`Error::Io`], also if it is absent (see [`Error::is_not_found`]); a part may be gone by then.
pub fn remove_dir_all(path: &Path) -> Result<()> {
    fs::remove_dir_all(path).map_err(Error::io("delete the folder", path))
}

/// The entries of a folder as `path` joined with each name, sorted by name (bytewise, so the same on every machine).
/// Scratch files of killed writers are listed too; [`crate::is_scratch`] tells them.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be read.
pub fn list_dir(path: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = fs::read_dir(path)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>())
        .map_err(Error::io("list the folder", path))?;
    entries.sort();
    Ok(entries)
}
