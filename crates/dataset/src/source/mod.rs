//! Where samples come from. A source yields [`Item`]s, sizes read from headers and captions included; what follows
//! (buckets, plan, pixels) does not know which kind it was. There are two kinds: folders of image files, read here, and
//! the images that a selection takes of an index ([`Indexed`]).
//!
//! Left to others: buckets (`bucket`), what a caption becomes (`caption`), decoding (`image`).
//!
//! # Determinism
//! Files are read in parallel and kept in the order of subsets, folders and names.

mod caption_file;
mod folder;
mod indexed;

use std::path::{Path, PathBuf};

use ::image::metadata::Orientation;
use rayon::prelude::*;

use crate::image::{DecodeError, Header};
use crate::{DatasetConfig, Error, Report, Result, SubsetConfig};
use caption_file::Caption;

pub(crate) use indexed::Indexed;

/// One image with its caption, as found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The image file.
    pub path: PathBuf,
    /// Index of its subset in the configuration.
    pub subset: usize,
    /// Visits per epoch, 1 or more.
    pub repeats: u32,
    /// Width and height after EXIF orientation.
    pub size: (u32, u32),
    /// The caption as read: the first line, or all lines with `enable_wildcard`.
    pub caption: String,
}

/// Reads the bytes of an image.
///
/// # Errors
/// [`DecodeError::Read`].
pub(crate) fn read(path: &Path) -> std::result::Result<Vec<u8>, DecodeError> {
    Ok(storage::read(path)?)
}

/// Finds all images of a subset (`index` is its place), reads their headers and captions, and counts into `report`.
///
/// # Errors
/// A missing or empty folder; with `on_broken_image = "fail"` the first broken image or caption.
pub(crate) fn scan(config: &DatasetConfig, index: usize, report: &mut Report) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    let subset = &config.subsets[index];
    for folder in folder::find(subset, index, report)? {
        let found: Vec<_> = folder.images.par_iter().map(|path| look(path, subset)).collect();
        for (path, found) in folder.images.iter().zip(found) {
            report.images_found += 1;
            match found {
                Ok((header, caption)) => {
                    let class_tokens = subset.class_tokens.as_ref().or(folder.class_tokens.as_ref());
                    let caption = choose_caption(caption, class_tokens, path, report);
                    report.oriented += usize::from(header.orientation != Orientation::NoTransforms);
                    items.push(Item { path: path.clone(), subset: index, repeats: folder.repeats, size: header.size, caption });
                }
                Err(error) => report.reject(config.on_broken_image, error)?,
            }
        }
    }
    Ok(items)
}

/// Reads the header and the caption of one image.
fn look(path: &Path, subset: &SubsetConfig) -> Result<(Header, Caption)> {
    let header = read(path).and_then(|bytes| crate::image::probe(&bytes));
    Ok((header.map_err(|source| Error::Image { path: path.into(), source })?, caption_file::find(path, subset)?))
}

/// The caption that stands beside an image, all lines; `None` if there is no file.
pub(crate) fn beside(image: &Path, subset: &SubsetConfig) -> Result<Option<String>> {
    Ok(match caption_file::find(image, subset)? {
        Caption::Found { text, .. } => Some(text),
        Caption::Missing => None,
    })
}

fn choose_caption(caption: Caption, class_tokens: Option<&String>, image: &Path, report: &mut Report) -> String {
    match (caption, class_tokens) {
        (Caption::Found { text, fallback }, _) => {
            report.fallback_captions += usize::from(fallback);
            if text.is_empty() {
                report.empty_captions.add(image.display());
            } else {
                report.captions_from_files += 1;
            }
            text
        }
        (Caption::Missing, Some(class_tokens)) => {
            report.class_token_captions += 1;
            class_tokens.clone()
        }
        (Caption::Missing, None) => {
            report.missing_captions.add(image.display());
            String::new()
        }
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text
}
