//! What opening a dataset found, used and left out. Every file that is not used as it stands is counted here, and the
//! first few are named: nothing is dropped in silence.

use std::fmt::{self, Display, Formatter};

use crate::source::chain;
use crate::{Error, OnBrokenImage, Result};

/// How many names a [`Named`] keeps.
const KEPT_NAMES: usize = 5;

/// A count with the names of the first few.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Named {
    /// How many there are.
    pub count: usize,
    /// The first five, each with its reason where there is one.
    pub first: Vec<String>,
}

impl Named {
    /// Counts one more.
    pub fn add(&mut self, name: impl Display) {
        self.count += 1;
        if self.first.len() < KEPT_NAMES {
            self.first.push(name.to_string());
        }
    }
}

/// One bucket's line of the report.
#[derive(Debug, Clone, PartialEq)]
pub struct BucketCount {
    /// Width and height.
    pub size: (u32, u32),
    /// Images in it.
    pub images: usize,
    /// Visits per epoch: images times their repeats.
    pub visits: u64,
    /// Images that are enlarged to fit.
    pub enlarged: usize,
    /// Mean part of the resized image that the centre crop takes away, 0 to 1.
    pub crop_loss: f64,
}

/// What [`crate::Dataset::open`] found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// Image files found.
    pub images_found: usize,
    /// Images that can be used.
    pub images_used: usize,
    /// Visits per epoch: used images times their repeats.
    pub visits: u64,
    /// Images that are turned or mirrored because their EXIF data says so.
    pub oriented: usize,
    /// For each index: its file, and what its selection took and left.
    pub selections: Vec<String>,
    /// Images left out, with the reason.
    pub broken_images: Named,
    /// Images left out because their caption file cannot be read, with the reason.
    pub broken_captions: Named,
    /// Images whose caption stands in a file that is not empty.
    pub captions_from_files: usize,
    /// Images of indexes, whose captions are made of their tags or stand in the index.
    pub captions_from_indexes: usize,
    /// Images without caption file that take `class_tokens`.
    pub class_token_captions: usize,
    /// Images whose caption comes from a `.caption` file though `caption_extension` is `.txt`.
    pub fallback_captions: usize,
    /// Images without caption file and without `class_tokens`: trained with an empty caption.
    pub missing_captions: Named,
    /// Images whose caption file is empty.
    pub empty_captions: Named,
    /// Folders inside an `image_dir` that were not looked into.
    pub ignored_folders: Named,
    /// The buckets in use, sorted by size.
    pub buckets: Vec<BucketCount>,
}

impl Report {
    /// Counts an image that is left out because of `error`, or gives the error back where the run is to end.
    pub(crate) fn reject(&mut self, on_broken: OnBrokenImage, error: Error) -> Result<()> {
        match error {
            error if on_broken == OnBrokenImage::Fail => return Err(error),
            Error::Image { path, source } => self.broken_images.add(format_args!("{}: {}", path.display(), chain(&source))),
            Error::Caption { path, what } => self.broken_captions.add(format_args!("{}: {what}", path.display())),
            error => self.broken_captions.add(chain(&error)),
        }
        Ok(())
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "images: {} found, {} used, {} visits per epoch", self.images_found, self.images_used, self.visits)?;
        for selection in &self.selections {
            writeln!(f, "index {selection}")?;
        }
        write!(f, "captions: ")?;
        if self.captions_from_indexes > 0 {
            write!(f, "{} from the index, ", self.captions_from_indexes)?;
        }
        write!(f, "{} from files", self.captions_from_files)?;
        if self.fallback_captions > 0 {
            write!(f, " ({} from .caption files)", self.fallback_captions)?;
        }
        if self.class_token_captions > 0 {
            write!(f, ", {} from class_tokens", self.class_token_captions)?;
        }
        writeln!(f)?;
        if self.oriented > 0 {
            writeln!(f, "turned by their EXIF orientation: {}", self.oriented)?;
        }
        for (what, named) in [
            ("left out, image not usable", &self.broken_images),
            ("left out, caption not readable", &self.broken_captions),
            ("no caption file and no class_tokens, trained with an empty caption", &self.missing_captions),
            ("empty caption file", &self.empty_captions),
            ("folders not looked into", &self.ignored_folders),
        ] {
            if named.count == 0 {
                continue;
            }
            writeln!(f, "{what}: {}", named.count)?;
            for name in &named.first {
                writeln!(f, "  {name}")?;
            }
            if named.count > named.first.len() {
                writeln!(f, "  and {} more", named.count - named.first.len())?;
            }
        }
        writeln!(f, "buckets: {}", self.buckets.len())?;
        for b in &self.buckets {
            write!(f, "  {:>4}x{:<4} {:>7} images {:>8} visits", b.size.0, b.size.1, b.images, b.visits)?;
            write!(f, "  crop loss {:4.1} %", b.crop_loss * 100.0)?;
            writeln!(f, "{}", if b.enlarged > 0 { format!("  enlarged {}", b.enlarged) } else { String::new() })?;
        }
        Ok(())
    }
}
