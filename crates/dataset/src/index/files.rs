//! Which files a source names: images below a folder, tar shards below a folder, in the order of their paths.

use std::path::{Path, PathBuf};

use super::FileFormat;
use crate::Result;

/// A folder (relative to its source) with the names of the images directly inside it, sorted.
pub(super) struct ImageFolder {
    pub path: String,
    pub names: Vec<String>,
}

/// The images below `root`, folder by folder; files and folders whose name begins with a dot are left out.
pub(super) fn images(root: &Path) -> Result<Vec<ImageFolder>> {
    let mut found = Vec::new();
    walk(root, root, &mut |relative, files| {
        let is_image = |f: &PathBuf| extension(f).is_some_and(|e| FileFormat::from_extension(e).is_readable());
        let names: Vec<String> = files.iter().filter(|f| is_image(f)).map(|f| name_of(f)).collect();
        if !names.is_empty() {
            found.push(ImageFolder { path: relative, names });
        }
    })?;
    Ok(found)
}

/// The tar shards of a source, relative to its root: one file, or all below a folder, those below `updates` last.
pub(super) fn shards(path: &Path) -> Result<Vec<String>> {
    if !path.is_dir() {
        return Ok(vec![name_of(path)]);
    }
    let mut found = Vec::new();
    walk(path, path, &mut |relative, files| {
        let shards = files.iter().filter(|f| extension(f).is_some_and(|e| e.eq_ignore_ascii_case("tar")));
        found.extend(shards.map(|f| if relative.is_empty() { name_of(f) } else { format!("{relative}/{}", name_of(f)) }));
    })?;
    found.sort_by_cached_key(|shard| (is_update(shard), shard.clone()));
    Ok(found)
}

/// Whether a shard holds additions: its pictures are taken where no other shard has them.
pub(super) fn is_update(shard: &str) -> bool {
    shard.split('/').rev().skip(1).any(|folder| folder == "updates")
}

/// Calls `each` with every folder, relative and with `/` between its parts, and the files in it, depth first, in order.
fn walk(root: &Path, folder: &Path, each: &mut dyn FnMut(String, &[PathBuf])) -> Result<()> {
    let shown = |p: &PathBuf| !p.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
    let entries = storage::list_dir(folder)?.into_iter().filter(shown);
    // What has an extension that is known is a file: one system call less for each.
    let known = |p: &Path| {
        extension(p)
            .is_some_and(|e| ["txt", "json", "caption", "tar", "npz"].contains(&e) || FileFormat::from_extension(e) != FileFormat::Other)
    };
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|p| !known(p) && p.is_dir());
    let relative = folder.strip_prefix(root).unwrap_or(folder);
    each(relative.iter().map(|part| part.to_string_lossy()).collect::<Vec<_>>().join("/"), &files);
    folders.iter().try_for_each(|inner| walk(root, inner, each))
}

pub(super) fn extension(path: &Path) -> Option<&str> {
    path.extension().and_then(|e| e.to_str())
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A member's key and extension: the name up to the first dot of its last part, and what follows it (webdataset's rule).
pub(super) fn key_and_extension(name: &str) -> (&str, &str) {
    let start = name.rfind('/').map_or(0, |i| i + 1);
    match name[start..].find('.') {
        Some(dot) => (&name[..start + dot], &name[start + dot + 1..]),
        None => (name, ""),
    }
}

/// The number that a picture's name gives it: its stem, if that is one.
pub(super) fn id_of(name: &str) -> Option<u32> {
    let (key, _) = key_and_extension(name);
    let stem = key.rsplit('/').next().unwrap_or(key);
    if stem.bytes().all(|b| b.is_ascii_digit()) { stem.parse().ok() } else { None }
}
