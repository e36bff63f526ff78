//! The caption file of an image: `<stem><caption_extension>`; else, where the stem has five or more parts between
//! underscores, the stem without its last four (sd-scripts' names of face crops); else, if the extension is the default
//! `.txt`, `<stem>.caption`. UTF-8, a byte order mark allowed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::config::CAPTION_FALLBACK;
use crate::{Error, Result, SubsetConfig};

/// What was found beside an image.
pub(super) enum Caption {
    /// A file, which may be empty. `fallback`: it was a `.caption` file in the place of `.txt`.
    Found { text: String, fallback: bool },
    /// None.
    Missing,
}

/// Reads the caption of `image`.
///
/// # Errors
/// [`Error::Caption`] for text that is not UTF-8 or holds a NUL, [`Error::Storage`] for a file that cannot be read.
pub(super) fn find(image: &Path, subset: &SubsetConfig) -> Result<Caption> {
    for (path, fallback) in candidates(image, subset) {
        match storage::read(&path) {
            Ok(bytes) => return Ok(Caption::Found { text: text(path, bytes, subset.enable_wildcard)?, fallback }),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Caption::Missing)
}

fn candidates(image: &Path, subset: &SubsetConfig) -> Vec<(PathBuf, bool)> {
    let beside = |stem: &std::ffi::OsStr, extension: &str| {
        let mut name = OsString::from(stem);
        name.push(extension);
        image.with_file_name(name)
    };
    let stem = image.file_stem().unwrap_or_default();
    let mut paths = vec![(beside(stem, &subset.caption_extension), false)];
    if let Some(parts) = stem.to_str().map(|s| s.split('_').collect::<Vec<_>>())
        && parts.len() >= 5
    {
        paths.push((beside(parts[..parts.len() - 4].join("_").as_ref(), &subset.caption_extension), false));
    }
    if subset.caption_extension == SubsetConfig::default().caption_extension {
        paths.push((beside(stem, CAPTION_FALLBACK), true));
    }
    paths
}

/// The first line that is not blank, or with `all_lines` all of them, each stripped.
fn text(path: PathBuf, bytes: Vec<u8>, all_lines: bool) -> Result<String> {
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let utf16 = matches!(error.as_bytes(), [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..]);
            let at = error.utf8_error().valid_up_to();
            let what = if utf16 { "it is UTF-16, not UTF-8".into() } else { format!("it is not UTF-8 (byte {at})") };
            return Err(Error::Caption { path, what });
        }
    };
    if let Some(at) = text.find('\0') {
        return Err(Error::Caption { path, what: format!("it holds a NUL (byte {at})") });
    }
    let mut lines = text.trim_start_matches('\u{feff}').lines().map(str::trim).filter(|line| !line.is_empty());
    Ok(if all_lines { lines.collect::<Vec<_>>().join("\n") } else { lines.next().unwrap_or_default().into() })
}
