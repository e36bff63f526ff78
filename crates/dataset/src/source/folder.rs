//! Which image files a subset names: those directly inside `image_dir`, then those of its subfolders named `N_name`, in
//! the order of names. Subfolders are not searched further; hidden files are not looked at.

use std::path::{Path, PathBuf};

use crate::{Error, Report, Result, SubsetConfig};

/// Extensions of image files, in any case. What a file is, its content decides.
const EXTENSIONS: [&str; 5] = ["png", "jpg", "jpeg", "webp", "bmp"];

/// Images that share repeats and class tokens.
pub(super) struct Folder {
    /// Visits per epoch of each image.
    pub repeats: u32,
    /// The "name" of `N_name`.
    pub class_tokens: Option<String>,
    /// The files, sorted.
    pub images: Vec<PathBuf>,
}

/// Finds a subset's images; `index` names the subset in messages.
pub(super) fn find(subset: &SubsetConfig, index: usize, report: &mut Report) -> Result<Vec<Folder>> {
    let dir = &subset.image_dir;
    let key = || format!("subsets[{index}].image_dir");
    if !dir.exists() {
        return Err(Error::Folder { key: key(), path: dir.clone(), what: "does not exist" });
    }
    if !dir.is_dir() {
        return Err(Error::Folder { key: key(), path: dir.clone(), what: "is not a folder" });
    }
    let (images, inside) = list(dir)?;
    let mut folders = vec![Folder { repeats: subset.num_repeats, class_tokens: None, images }];
    let mut ignored = 0;
    for folder in inside {
        match folder.file_name().and_then(|name| name.to_str()).and_then(repeats_and_name) {
            Some((repeats, name)) if repeats > 0 => {
                let repeats = repeats.saturating_mul(subset.num_repeats);
                folders.push(Folder { repeats, class_tokens: Some(name.into()), images: list(&folder)?.0 });
            }
            _ => {
                ignored += 1;
                report.ignored_folders.add(folder.display());
            }
        }
    }
    if folders.iter().all(|f| f.images.is_empty()) {
        return Err(Error::NoImages { key: key(), path: dir.clone(), ignored_folders: ignored });
    }
    Ok(folders)
}

/// sd-scripts' `N_name`: a number, an underscore, and class tokens that may hold more underscores.
fn repeats_and_name(name: &str) -> Option<(u32, &str)> {
    let (repeats, name) = name.split_once('_')?;
    Some((repeats.parse().ok()?, name))
}

/// (image files, folders) directly inside `dir`, each sorted by name.
fn list(dir: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut images, mut folders) = (Vec::new(), Vec::new());
    for path in storage::list_dir(dir)? {
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden {
            continue;
        }
        // Only names without an image's extension are asked what they are: one system call less for each image.
        if path.extension().and_then(|e| e.to_str()).is_some_and(|e| EXTENSIONS.iter().any(|known| e.eq_ignore_ascii_case(known))) {
            images.push(path);
        } else if path.is_dir() {
            folders.push(path);
        }
    }
    Ok((images, folders))
}
