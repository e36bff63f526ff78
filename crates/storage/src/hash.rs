//! Hashes of whole files, streamed: SHA-256 because published model hashes are, BLAKE3 for the project's own manifests.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::{Error, Result};

const CHUNK: usize = 1 << 20;

/// SHA-256 of a file, 64 lower-case hex digits.
///
/// # Errors
/// [`Error::Io`] if it cannot be read.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    stream(path, |bytes| hasher.update(bytes))?;
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// BLAKE3 of a file, 64 lower-case hex digits.
///
/// # Errors
/// [`Error::Io`] if it cannot be read.
pub fn blake3_file(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    stream(path, |bytes| {
        hasher.update(bytes);
    })?;
    Ok(hasher.finalize().to_hex().to_string())
}

fn stream(path: &Path, mut take: impl FnMut(&[u8])) -> Result<()> {
    let mut run = || -> io::Result<()> {
        let mut file = File::open(path)?;
        let mut chunk = vec![0; CHUNK];
        loop {
            match file.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(n) => take(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    };
    run().map_err(Error::io("read", path))
}
