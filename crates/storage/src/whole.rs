//! A file is whole or absent. Every writer here goes through one order: a scratch file `.{name}.tmp-{pid}` beside the
//! target, sync of its contents, rename over the target, sync of the folder.
//!
//! What is left at the target and beside it, for each kind of failure before the rename:
//!
//! | failure | target | scratch file |
//! |---|---|---|
//! | returned error | as it was before | removed |
//! | panic in the caller's closure | as it was before | removed while unwinding |
//! | kill | as it was before | left; the next write by a process of that number takes it over |
//! | power loss | as it was before | may be left |
//!
//! After the rename the new file is there, whole. Only if the sync of the folder fails, or power is lost before it, may
//! the old version (also whole) come back; that sync's failure is returned. A reader that holds the old file open, or
//! memory-mapped, keeps the old bytes. A symbolic link at the target is replaced, not followed.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::error::folder_of;
use crate::{Error, Result};

const BUFFER: usize = 1 << 20;

/// Writes `bytes` as the whole file; see the module's table for what failures leave.
///
/// # Errors
/// [`Error::Io`] naming the target; the target is then as it was before.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    write_whole_with(path, |out| out.write_all(bytes))
}

/// Writes a whole file from what `f` writes (buffered). Threads that write one target take turns.
///
/// # Errors
/// [`Error::Io`] naming the target, also for errors that `f` returns; the target is then as it was before.
pub fn write_whole_with(path: &Path, f: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    write_with(path, |out| f(out).map_err(Error::io("write", path)))
}

/// As [`write_whole_with`], for closures that have errors of their own.
pub(crate) fn write_with(path: &Path, f: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let scratch = Scratch::new(path)?;
    let file = File::create(&scratch.path).map_err(Error::io("write", path))?;
    let mut out = BufWriter::with_capacity(BUFFER, file);
    f(&mut out)?;
    let file = out.into_inner().map_err(|e| Error::io("write", path)(e.into_error()))?;
    file.sync_all().map_err(Error::io("sync", path))?;
    drop(file);
    fs::rename(&scratch.path, path).map_err(Error::io("replace", path))?;
    sync_folder(folder_of(path))
}

/// Copies a file; the copy is whole or absent.
///
/// # Errors
/// [`Error::Io`] naming `from` if reading failed, `to` if writing did.
pub fn copy_whole(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).map_err(Error::io("read", from))?;
    write_with(to, |out| {
        let mut chunk = vec![0; BUFFER];
        loop {
            match source.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(n) => out.write_all(&chunk[..n]).map_err(Error::io("write", to))?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("read", from)(e)),
            }
        }
    })
}

/// Renames a file or folder within one file system and syncs the folders that hold both names.
///
/// What is left: after a returned error of the rename itself, or a kill, one of the two names; after power loss before
/// the return, either. What is in a renamed folder must have been synced before.
///
/// # Errors
/// [`Error::Io`] naming `from` if it does not exist, else `to`.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|source| {
        let culprit = if source.kind() == ErrorKind::NotFound && from.symlink_metadata().is_err() { from } else { to };
        Error::io(if culprit == from { "rename" } else { "rename to" }, culprit)(source)
    })?;
    let (left, entered) = (folder_of(from), folder_of(to));
    sync_folder(entered)?;
    if left != entered {
        sync_folder(left)?;
    }
    Ok(())
}

/// Whether `path` is named as the scratch files of this crate are: `.{name}.tmp-{pid}`. Such a file belongs to a running
/// writer or to one that was killed.
pub fn is_scratch(path: &Path) -> bool {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return false };
    let Some((target, pid)) = name.rsplit_once(".tmp-") else { return false };
    target.len() > 1 && target.starts_with('.') && !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit())
}

/// Makes a rename last. Windows has no such call; some network file systems refuse it, and have nothing better to offer.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(not(unix)) {
        return Ok(());
    }
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Err(e) if !matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Err(Error::io("sync the folder", folder)(e)),
        _ => Ok(()),
    }
}

/// Scratch files that threads of this process are writing.
static IN_USE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
static FREED: Condvar = Condvar::new();

/// A scratch file's name, held by one thread at a time; the file is removed on drop (after a rename there is none).
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new(target: &Path) -> Result<Scratch> {
        let Some(name) = target.file_name() else {
            return Err(Error::io("write", target)(io::Error::new(ErrorKind::InvalidInput, "the path names no file")));
        };
        let mut scratch = std::ffi::OsString::from(".");
        scratch.push(name);
        scratch.push(format!(".tmp-{}", std::process::id()));
        let path = target.with_file_name(scratch);
        let mut in_use = IN_USE.lock().unwrap_or_else(PoisonError::into_inner);
        while !in_use.insert(path.clone()) {
            in_use = FREED.wait(in_use).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(Scratch { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nobody could be told of a failure here, and the scratch file is harmless.
        let _ = fs::remove_file(&self.path);
        IN_USE.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.path);
        FREED.notify_all();
    }
}
