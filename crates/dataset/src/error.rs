//! The crate's error: the path or key, the values, and, where one exists, the way out. Messages do not repeat their
//! cause; the caller prints the chain of sources once.

use std::path::{Path, PathBuf};

use crate::image::DecodeError;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between a dataset's configuration and a batch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A key's value is out of range, or two keys contradict each other.
    #[error("dataset config: {what}")]
    Config {
        /// The key or keys with their values, and the rule that they break.
        what: String,
        /// What to change.
        way_out: String,
    },
    /// A file could not be read or written.
    #[error(transparent)]
    Storage(#[from] storage::Error),
    /// `image_dir` does not exist or is no folder.
    #[error("{key} = `{}` {what}", path.display())]
    Folder {
        /// The key with its place, as `subsets[0].image_dir`.
        key: String,
        /// Its value.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A folder holds no image.
    #[error("{key} = `{}` holds no image (png, jpg, jpeg, webp, bmp)", path.display())]
    NoImages {
        /// The key with its place, as `subsets[0].image_dir`.
        key: String,
        /// Its value.
        path: PathBuf,
        /// Folders inside it that were not looked into, as they are not named `N_name`.
        ignored_folders: usize,
    },
    /// Images were found, but none can be used.
    #[error("none of the {found} images can be used; the first is {first}")]
    AllBroken {
        /// Number of image files found.
        found: usize,
        /// The path of the first of them, and why it cannot be used.
        first: String,
    },
    /// An image cannot be used, and `on_broken_image` is `fail`; or it was asked for by itself.
    #[error("image `{}` cannot be used", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// Why.
        source: DecodeError,
    },
    /// A caption cannot be used, and `on_broken_image` is `fail`.
    #[error("caption `{}` cannot be used: {what}", path.display())]
    Caption {
        /// The caption file.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// Every image of a bucket turned out to be broken while loading, so no replacement exists.
    #[error("all {count} images of bucket {}x{} are broken, `{}` among them", bucket.0, bucket.1, path.display())]
    BucketBroken {
        /// Width and height of the bucket.
        bucket: (u32, u32),
        /// Number of images in it.
        count: usize,
        /// The image that was asked for.
        path: PathBuf,
    },
    /// More images cannot be used than `max_broken_share` bears.
    #[error("{broken} of {of} images cannot be used, more than max_broken_share = {share}; one of them is {example}")]
    TooManyBroken {
        /// Images that cannot be used.
        broken: usize,
        /// Images that were asked for.
        of: usize,
        /// `max_broken_share`.
        share: f64,
        /// The path of one, at the start with its reason.
        example: String,
    },
    /// A sample number that the dataset does not have.
    #[error("the dataset has {len} samples, there is no number {sample}")]
    NoSuchSample {
        /// The number asked for.
        sample: u32,
        /// Number of samples.
        len: usize,
    },
    /// The database behind an index, or one that an index is built from, refused.
    #[error("cannot {doing} `{}`", path.display())]
    Sqlite {
        /// A verb phrase that fits between "cannot" and the path.
        doing: &'static str,
        /// The database file.
        path: PathBuf,
        /// What SQLite said.
        source: Box<rusqlite::Error>,
    },
    /// A file that cannot serve as an index.
    #[error("`{}` cannot be used as an index: {what}", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// Why.
        what: String,
        /// What to do.
        way_out: &'static str,
    },
    /// Something that an index is to be built from cannot be understood.
    #[error("source `{}`: {what}", path.display())]
    Source {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, with the line where there is one.
        what: String,
        /// What to do.
        way_out: &'static str,
    },
    /// A file of rules (for captions or for a selection) cannot be understood.
    #[error("{kind} `{name}`: {what}")]
    Rules {
        /// "caption rules" or "selection".
        kind: &'static str,
        /// The name or path as given.
        name: String,
        /// What is wrong, with the line where there is one.
        what: String,
        /// What to do.
        way_out: String,
    },
    /// A selection that leaves nothing.
    #[error("the selection leaves none of the {images} images of the index `{}`", path.display())]
    NothingSelected {
        /// The index.
        path: PathBuf,
        /// Images in it.
        images: usize,
    },
    /// An image that the index does not have.
    #[error("the index `{}` has no image {id}", path.display())]
    NoSuchImage {
        /// The index.
        path: PathBuf,
        /// The id asked for.
        id: u32,
    },
    /// An image that the dataset's selections did not take.
    #[error("image {id} is not among those that the recipe takes: {why}")]
    NotSelected {
        /// The id asked for.
        id: u32,
        /// Why not, as far as the index tells.
        why: &'static str,
    },
    /// The caller's progress function asked to stop; what was done until then is kept.
    #[error("stopped on request")]
    Stopped,
    /// A latent that does not belong into the cache.
    #[error("latent of sample {sample}: {what}")]
    Latent {
        /// The sample.
        sample: u32,
        /// What is wrong, with both values where there are two.
        what: String,
    },
}

impl Error {
    /// A [`Error::Config`].
    pub(crate) fn config(what: impl Into<String>, way_out: impl Into<String>) -> Self {
        Error::Config { what: what.into(), way_out: way_out.into() }
    }

    /// Wraps what SQLite said.
    pub(crate) fn sqlite(doing: &'static str, path: &Path) -> impl FnOnce(rusqlite::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Sqlite { doing, path, source: Box::new(source) }
    }

    /// The way out, where one is known: a sentence for the line after the error.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Config { way_out, .. } => Some(way_out.clone()),
            Error::Storage(e) => e.hint(),
            Error::Folder { path, .. } if path.is_relative() => {
                let from = std::env::current_dir().ok()?;
                Some(format!("the path is relative to the current folder `{}`", from.display()))
            }
            Error::NoImages { ignored_folders: 0, .. } => None,
            Error::NoImages { ignored_folders, .. } => Some(format!(
                "{ignored_folders} folders inside were not looked into: give each its own [[subsets]], or name them N_name (N repeats)"
            )),
            Error::Image { .. } | Error::Caption { .. } => {
                Some("repair or remove the file, or set on_broken_image = \"skip\" to leave such files out".into())
            }
            Error::Index { way_out, .. } | Error::Source { way_out, .. } => Some((*way_out).into()),
            Error::Rules { way_out, .. } => Some(way_out.clone()),
            Error::Sqlite { source, .. } => sqlite_hint(source),
            Error::NothingSelected { .. } => {
                Some("loosen the selection; `lokr dataset index` tells how many images have a rating, a score and a file".into())
            }
            Error::NoSuchImage { .. } => Some("ids are those of the posts, or the numbers that the index gave".into()),
            Error::Stopped => Some("run it again: it goes on where it was".into()),
            Error::TooManyBroken { .. } => {
                Some("look at them with `lokr dataset check`; raise dataset.max_broken_share if so many are expected".into())
            }
            Error::Folder { .. } | Error::AllBroken { .. } | Error::BucketBroken { .. } => None,
            Error::NoSuchSample { .. } | Error::NotSelected { .. } | Error::Latent { .. } => None,
        }
    }
}

fn sqlite_hint(error: &rusqlite::Error) -> Option<String> {
    use rusqlite::ErrorCode::{DatabaseBusy, DatabaseCorrupt, DatabaseLocked, DiskFull, NotADatabase};
    Some(match error.sqlite_error_code()? {
        DatabaseBusy | DatabaseLocked => "another process is using it, a build or a run: wait until it is done".into(),
        DiskFull => "the disk is full: free some space and run it again, it goes on where it was".into(),
        DatabaseCorrupt => "the file is damaged: delete it and build it again".into(),
        NotADatabase => "the file is no SQLite database: check its name".into(),
        _ => return None,
    })
}
