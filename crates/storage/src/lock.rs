//! An advisory lock on a file: one run per output folder. The system drops it with the process, however that ends, so no
//! stale lock ever has to be removed by hand.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use fs4::{FileExt, TryLockError};

use crate::{Error, Result};

/// Holds an exclusive lock until dropped.
///
/// The file stays behind when the lock is gone, with the last holder's process number in it: deleting it would let two
/// processes hold "the" lock on two different files of one name.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock at `path` (created if absent) without waiting, and writes this process's number into the file.
    ///
    /// # Errors
    /// [`Error::Locked`] with the holder's number if another process, or another `Lock` of this one, holds it;
    /// [`Error::Io`] if the file cannot be opened, locked or written.
    pub fn acquire(path: &Path) -> Result<Lock> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(Error::io("open the lock file", path))?;
        match FileExt::try_lock(&file) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Locked { path: path.to_path_buf(), pid: holder(&mut file) }),
            Err(TryLockError::Error(source)) => return Err(Error::io("lock", path)(source)),
        }
        write_pid(&mut file).map_err(Error::io("write the lock file", path))?;
        Ok(Lock { _file: file })
    }
}

fn holder(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    // A holder's file is a dozen bytes; anything longer is someone else's.
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(format!("{}\n", std::process::id()).as_bytes())
}
