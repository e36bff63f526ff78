//! Files: every read, write, hash and lock of the project goes through this crate, so that every error knows its path
//! and every file is whole or absent.
//!
//! Main types: [`Error`], whose [`Error::hint`] names the way out where there is one; [`write_whole`] and its relatives
//! (scratch file, sync, rename, sync of the folder); [`Lock`], which a dead process does not hold;
//! [`safetensors::SafeTensors`], a memory-mapped model file, and [`safetensors::write`], which streams one.
//!
//! Must not know: any other crate of the workspace, tensors and devices, what a file means to its reader.

// This crate is the one place that may call std::fs; clippy.toml forbids it everywhere else.
#![allow(clippy::disallowed_methods)]

mod error;
mod files;
mod hash;
mod lock;
pub mod safetensors;
mod whole;

pub use error::{Error, Result};
pub use files::{RangeReader, Stamp, append_line, create_dir_all, file_len, list_dir, read, read_prefix, read_range, read_to_string};
pub use files::{remove_dir_all, remove_file, stamp};
pub use hash::{blake3_file, sha256_file};
pub use lock::Lock;
pub use whole::{copy_whole, is_scratch, rename, write_whole, write_whole_with};
