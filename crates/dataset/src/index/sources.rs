//! What an index is built from, and how that is written down in it: folders below the index's own are kept relative to
//! it, so that index and images may be moved together.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// One thing that an index is built from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Source {
    /// A folder of images with all folders inside it; a caption stands beside each image under the same stem.
    Folder {
        /// The folder.
        path: PathBuf,
        /// Extension of caption files, with its dot; at `.txt`, `.caption` is tried too.
        caption_extension: String,
    },
    /// Tar shards: images, each with `.txt`, `.caption` or `.json` members of the same stem where there are such
    /// (webdataset), or images alone named by their post's id (danbooru2023).
    Tars {
        /// A folder, with all shards inside it, or one shard. Shards below a folder `updates` come after all others.
        path: PathBuf,
    },
    /// sd-scripts' metadata: JSON of images by path or key, or JSON lines with `image_path`.
    SdScripts {
        /// The file.
        file: PathBuf,
        /// What relative paths are relative to; the file's folder if absent.
        image_dir: Option<PathBuf>,
        /// Between caption and tags.
        caption_separator: String,
    },
    /// The danbooru metadata as HakuBooru keeps it, a SQLite database with `post`, `tag` and `posttagrelation`.
    Danbooru {
        /// The database.
        file: PathBuf,
    },
    /// Posts as danbooru's own API writes them, one JSON object per line.
    Posts {
        /// The file.
        file: PathBuf,
    },
    /// The same in parquet, one row per post; columns have the names of the API's keys.
    Parquet {
        /// The file.
        file: PathBuf,
    },
}

impl Source {
    /// A folder with `.txt` captions.
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Source::Folder { path: path.into(), caption_extension: ".txt".into() }
    }

    /// Tells by a look what a file or folder is.
    ///
    /// # Errors
    /// [`Error::Source`] for what is none of the kinds, [`Error::Storage`] for what is not there.
    pub fn detect(path: &Path) -> Result<Self> {
        storage::stamp(path)?;
        let refuse = |what: &str, way_out| Err(Error::Source { path: path.into(), what: what.into(), way_out });
        if path.is_dir() {
            return Ok(if super::files::shards(path)?.is_empty() { Self::folder(path) } else { Source::Tars { path: path.into() } });
        }
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tar")) {
            return Ok(Source::Tars { path: path.into() });
        }
        let start = storage::read_prefix(path, 1 << 16)?;
        if start.starts_with(b"SQLite format 3\0") {
            return Ok(Source::Danbooru { file: path.into() });
        }
        if start.starts_with(b"PAR1") {
            return Ok(Source::Parquet { file: path.into() });
        }
        let text = String::from_utf8_lossy(&start);
        let first = text.trim_start_matches('\u{feff}').trim_start();
        if !first.starts_with('{') {
            return refuse(
                "it is neither a folder nor tar, SQLite, parquet or JSON",
                "name a folder of images or shards, or a file of metadata",
            );
        }
        let line: Option<serde_json::Value> = first.lines().next().and_then(|line| serde_json::from_str(line).ok());
        let posts = line.is_some_and(|line| line.get("id").is_some() && line.get("image_path").is_none());
        Ok(match posts {
            true => Source::Posts { file: path.into() },
            false => Source::SdScripts { file: path.into(), image_dir: None, caption_separator: ",".into() },
        })
    }

    /// Whether it tells of posts, whose ids then name the images.
    pub(super) fn has_post_ids(&self) -> bool {
        matches!(self, Source::Danbooru { .. } | Source::Posts { .. } | Source::Parquet { .. })
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        match self {
            Source::Folder { path, .. } | Source::Tars { path } => path,
            Source::SdScripts { file, .. } | Source::Danbooru { file } | Source::Posts { file } | Source::Parquet { file } => file,
        }
    }

    fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let (first, second) = match self {
            Source::Folder { path, .. } | Source::Tars { path } => (path, None),
            Source::SdScripts { file, image_dir, .. } => (file, image_dir.as_mut()),
            Source::Danbooru { file } | Source::Posts { file } | Source::Parquet { file } => (file, None),
        };
        std::iter::once(first).chain(second)
    }

    /// What its containers' paths are relative to. `home` is the folder of the index.
    pub(super) fn root(&self, home: &Path) -> PathBuf {
        let path = match self {
            Source::Folder { path, .. } => path.as_path(),
            Source::Tars { path } if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tar")) => path.parent().unwrap_or(path),
            Source::Tars { path } => path,
            Source::SdScripts { image_dir: Some(dir), .. } => dir,
            Source::SdScripts { file, .. } | Source::Danbooru { file } | Source::Posts { file } | Source::Parquet { file } => {
                file.parent().unwrap_or(file)
            }
        };
        home.join(path)
    }

    /// As it is written in the index: paths absolute, or relative to `home` if below it.
    pub(super) fn spec(&self, home: &Path) -> String {
        let mut source = self.clone();
        for path in source.paths_mut() {
            let whole = std::path::absolute(&*path).unwrap_or_else(|_| path.clone());
            *path = whole.strip_prefix(home).map_or(whole.clone(), Path::to_path_buf);
        }
        serde_json::to_string(&source).unwrap_or_default()
    }

    /// The reverse of [`Source::spec`], paths as they are written; `None` for what this version does not know.
    pub(super) fn from_spec(spec: &str) -> Option<Self> {
        serde_json::from_str(spec).ok()
    }

    /// With paths that are relative to `home` made whole.
    pub(super) fn at(mut self, home: &Path) -> Self {
        self.paths_mut().for_each(|path| *path = home.join(&*path));
        self
    }
}

/// The folder of an index, absolute.
pub(super) fn home(index: &Path) -> &Path {
    index.parent().unwrap_or(Path::new(""))
}
