//! Hashes by which others know a base model (sd-scripts, library/train_util.py `model_hash`, `calculate_sha256`).

use std::fmt::Write as _;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::{Checkpoint, Layout, Part};
use crate::error::Result;

/// The bytes of a file that sd-scripts' short hash covers.
const SHORT: std::ops::Range<usize> = 0x10_0000..0x11_0000;

/// The hashes of a base model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelHash {
    /// SHA-256, hex. Of a folder: of the lines "{part} {SHA-256 of the weight file}\n".
    pub sha256: String,
    /// `ss_sd_model_hash`: 8 hex digits of the SHA-256 of 64 KiB from 1 MiB on. Of a folder, as sd-scripts writes it,
    /// "IsADirectory".
    pub short: String,
}

impl Checkpoint {
    /// Hashes the checkpoint; reads all of it, so this takes as long as the disk needs. A replaced VAE is left out.
    ///
    /// # Errors
    /// [`crate::error::Error::Storage`] if a file cannot be read.
    pub fn hash(&self) -> Result<ModelHash> {
        if self.layout == Layout::SingleFile {
            return Ok(ModelHash { sha256: storage::sha256_file(&self.path)?, short: self.short_hash(&self.path)? });
        }
        let mut lines = String::new();
        for part in Part::ALL {
            let own = |file: &&storage::safetensors::SafeTensors| file.path().parent() == Some(&self.path.join(part.folder()));
            for file in self.files.iter().filter(own) {
                // Writing to a String cannot fail.
                let _ = writeln!(lines, "{part} {}", storage::sha256_file(file.path())?);
            }
        }
        Ok(ModelHash { sha256: hex(&Sha256::digest(lines)), short: "IsADirectory".into() })
    }

    fn short_hash(&self, path: &Path) -> Result<String> {
        let data = self.files[0].data_section();
        let header = std::fs::metadata(path).ok().and_then(|meta| usize::try_from(meta.len()).ok()?.checked_sub(data.len()));
        let whole;
        let bytes = match header.filter(|header| *header <= SHORT.start) {
            Some(header) => clip(data, SHORT.start - header, SHORT.end - header),
            // A header of more than 1 MiB reaches into the hashed bytes.
            None => {
                whole = storage::read(path)?;
                clip(&whole, SHORT.start, SHORT.end)
            }
        };
        Ok(hex(&Sha256::digest(bytes)[..4]))
    }
}

fn clip(bytes: &[u8], start: usize, end: usize) -> &[u8] {
    &bytes[start.min(bytes.len())..end.min(bytes.len())]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}
