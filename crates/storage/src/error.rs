//! The crate's error: what was being done, to which path, and, where one exists, the way out. Messages do not repeat
//! their cause; the caller prints the chain of sources once.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// What can go wrong with a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {doing} `{}`", path.display())]
    Io {
        /// A verb phrase that fits between "cannot" and the path, as "read" or "write".
        doing: &'static str,
        /// The file or folder that the user knows (the target, never its scratch file).
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A text file holds bytes that are not UTF-8.
    #[error("`{}` is not UTF-8 text: byte {byte} is invalid", path.display())]
    Utf8 {
        /// The file.
        path: PathBuf,
        /// Position of the first bad byte, from 0.
        byte: usize,
    },
    /// A safetensors header is broken or does not fit its file.
    #[error("safetensors file `{}`: {what}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the tensor's name and both values where there are two.
        what: String,
    },
    /// The tensors that were to be written make no valid safetensors file.
    #[error("cannot write the safetensors file `{}`: {what}", path.display())]
    Layout {
        /// The target, left as it was.
        path: PathBuf,
        /// What is wrong, with the tensor's name.
        what: String,
    },
    /// A file that should be safetensors is recognizably something else.
    #[error("`{}` is not a safetensors file: it is {what}", path.display())]
    NotSafetensors {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        what: &'static str,
        /// What to do about it.
        way_out: &'static str,
    },
    /// Another process holds the lock.
    #[error("`{}` is locked by {}", path.display(), holder(*pid))]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// The process that wrote its number into the file; `None` where that could not be read.
        pid: Option<u32>,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Wraps an [`io::Error`] with what was being done to which path.
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { doing, path: path.to_path_buf(), source }
    }

    /// The file or folder that the error is about.
    pub fn path(&self) -> &Path {
        match self {
            Error::Io { path, .. }
            | Error::Utf8 { path, .. }
            | Error::Header { path, .. }
            | Error::Layout { path, .. }
            | Error::NotSafetensors { path, .. }
            | Error::Locked { path, .. } => path,
        }
    }

    /// Whether the disk (or the user's quota on it) is full.
    pub fn is_no_space(&self) -> bool {
        matches!(self, Error::Io { source, .. } if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
    }

    /// Whether the file or folder does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Error::Io { source, .. } if source.kind() == ErrorKind::NotFound)
    }

    /// The way out, where one is known: a sentence for the line after the error.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Io { source, path, .. } => io_hint(source, path),
            Error::Utf8 { .. } => Some("save the file as UTF-8".into()),
            Error::Header { .. } => Some("the file is damaged or was not fully copied; fetch or write it again".into()),
            Error::Layout { .. } => None,
            Error::NotSafetensors { way_out, .. } => Some((*way_out).into()),
            Error::Locked { pid: Some(pid), .. } => Some(format!("wait until process {pid} ends, or stop it")),
            Error::Locked { pid: None, .. } => Some("wait until the other process ends, or stop it".into()),
        }
    }
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".into(), |pid| format!("process {pid}"))
}

fn io_hint(source: &io::Error, path: &Path) -> Option<String> {
    match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            Some(format!("free some space on the disk that holds `{}`, or choose another folder", folder_of(path).display()))
        }
        ErrorKind::PermissionDenied => {
            Some(format!("check who owns `{}` and its folder (`ls -ld`), or choose another folder", path.display()))
        }
        ErrorKind::ReadOnlyFilesystem => Some(format!("`{}` is on a read-only file system; choose another folder", path.display())),
        ErrorKind::NotFound if path.is_relative() => {
            let from = std::env::current_dir().ok()?;
            Some(format!("the path is relative to the current folder `{}`", from.display()))
        }
        _ => None,
    }
}

/// The folder that holds `path`; the current folder for a bare name.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
