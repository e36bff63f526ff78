//! Plain reads, folders, deletions and appended lines: thin, but every error names its path. Writing whole files is
//! `whole.rs`.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::folder_of;
use crate::whole::sync_folder;
use crate::{Error, Result};

/// Length of a file in bytes.
///
/// # Errors
/// [`Error::Io`] if it does not exist or cannot be looked at.
pub fn file_len(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path).map_err(|source| Error::Io { doing: "look at", path: path.into(), source })?.len())
}

/// What tells a changed file from an unchanged one without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Length in bytes.
    pub len: u64,
    /// Time of the last change, in nanoseconds since 1970 (UTC); 0 where the system does not tell.
    pub modified: i64,
}

/// Length and time of the last change of a file.
///
/// # Errors
/// [`Error::Io`] if it does not exist or cannot be looked at.
pub fn stamp(path: &Path) -> Result<Stamp> {
    let data = fs::metadata(path).map_err(Error::io("look at", path))?;
    let since = data.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    Ok(Stamp { len: data.len(), modified: since.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(0)) })
}

/// A file kept open for reading parts of it.
#[derive(Debug)]
pub struct RangeReader {
    file: fs::File,
    path: PathBuf,
    len: u64,
}

impl RangeReader {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let open = || fs::File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (len, file) = open().map_err(Error::io("open", path))?;
        Ok(Self { file, path: path.into(), len })
    }

    /// Length of the file in bytes when it was opened.
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// Exactly `len` bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read or ends before `offset + len`; nothing is allocated for what lies behind the end.
    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let bytes = self.read_up_to(offset, len)?;
        if bytes.len() < len {
            let what = format!("it ends at byte {}, before {offset} + {len}", offset.saturating_add(bytes.len() as u64).min(self.len));
            return Err(Error::io("read", &self.path)(io::Error::new(ErrorKind::UnexpectedEof, what)));
        }
        Ok(bytes)
    }

    /// Up to `len` bytes from `offset` on: fewer, or none, where the file ends before.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read.
    pub fn read_up_to(&mut self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let there = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(len);
        let mut bytes = Vec::with_capacity(there);
        let mut read = || -> io::Result<()> {
            self.file.seek(SeekFrom::Start(offset.min(self.len)))?;
            (&mut self.file).take(there as u64).read_to_end(&mut bytes)?;
            Ok(())
        };
        read().map_err(Error::io("read", &self.path))?;
        Ok(bytes)
    }
}

/// Reads `len` bytes of a file from `offset` on.
///
/// # Errors
/// [`Error::Io`] if it cannot be opened or read, or ends before `offset + len`.
pub fn read_range(path: &Path, offset: u64, len: usize) -> Result<Vec<u8>> {
    RangeReader::open(path)?.read(offset, len)
}

/// Reads the first `len` bytes of a file, or all of it where it is shorter.
///
/// # Errors
/// [`Error::Io`] if it cannot be opened or read.
pub fn read_prefix(path: &Path, len: usize) -> Result<Vec<u8>> {
    RangeReader::open(path)?.read_up_to(0, len)
}

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

/// Creates a folder and those above it; no error if it exists. The folders that hold new ones are synced: what is synced
/// in a new folder later would be lost with the folder's own name.
///
/// # Errors
/// [`Error::Io`], also where a file stands in the way.
pub fn create_dir_all(path: &Path) -> Result<()> {
    let new: Vec<&Path> = path.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).collect();
    fs::create_dir_all(path).map_err(Error::io("create the folder", path))?;
    new.into_iter().rev().try_for_each(|folder| sync_folder(folder_of(folder)))
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
