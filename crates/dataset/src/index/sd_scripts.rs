//! sd-scripts' metadata (`library/train_util.py` `FineTuningDataset`): one JSON object of images by path or key, or JSON
//! lines with `image_path`. Caption and tags are joined as there, by the separator and no blank.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value};
use storage::Stamp;

use super::build::{Phase, Reporter};
use super::files::extension;
use super::scan::look;
use super::writer::{Found, Writer};
use super::{FileFormat, Source};
use crate::{Error, Result};

/// A key without extension is looked for with these.
const EXTENSIONS: [&str; 10] = ["png", "PNG", "jpg", "JPG", "jpeg", "JPEG", "webp", "WEBP", "bmp", "BMP"];

/// Reads the file and looks at every image that it names.
pub(super) fn read(writer: &mut Writer, source: i64, spec: &Source, separator: &str, home: &Path, report: &mut Reporter) -> Result<()> {
    let root = spec.root(home);
    let entries = entries(spec.path(), separator)?;
    // By folder, as an index keeps them.
    let mut folders: BTreeMap<PathBuf, BTreeMap<String, String>> = BTreeMap::new();
    for (key, text) in entries {
        let path = with_extension(&root, PathBuf::from(key));
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        folders.entry(path.parent().map(Path::to_path_buf).unwrap_or_default()).or_default().insert(name, text);
    }
    let total = folders.values().map(|names| names.len() as u64).sum();
    let (mut seen, mut done) = (HashSet::new(), 0);
    for (folder, names) in folders {
        let container = writer.container(source, &folder.to_string_lossy())?;
        seen.insert(container.id);
        let mut known = writer.known_files(container.id)?;
        let path = root.join(&folder);
        let found: Vec<Found> = names
            .par_iter()
            .map(|(name, text)| Found { caption: Some(text.clone()).filter(|t| !t.is_empty()), ..look(&path, name, known.get(name), None) })
            .collect();
        done += found.len() as u64;
        for found in found {
            writer.put(container.id, &mut known, found)?;
        }
        writer.files_gone(known)?;
        writer.container_done(container.id, Stamp { len: 0, modified: 0 }, None)?;
        writer.commit_if_due()?;
        report.tell(Phase::Files, done, total)?;
    }
    writer.containers_gone(source, &seen)
}

/// (path or key, caption with tags) of each entry.
fn entries(file: &Path, separator: &str) -> Result<Vec<(String, String)>> {
    let refuse = |what: String| Error::Source {
        path: file.into(),
        what,
        way_out: "it should be sd-scripts' metadata: {\"path\": {\"caption\": \"...\", \"tags\": \"...\"}}, or lines with image_path",
    };
    let text = storage::read_to_string(file)?;
    let text = text.trim_start_matches('\u{feff}');
    if let Ok(Value::Object(all)) = serde_json::from_str(text)
        && !all.contains_key("image_path")
    {
        return all
            .into_iter()
            .map(|(key, value)| match value {
                Value::Object(entry) => Ok((key, joined(&entry, separator))),
                _ => Err(refuse(format!("the entry `{key}` is no object"))),
            })
            .collect();
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| {
            let entry: Map<String, Value> = serde_json::from_str(line).map_err(|e| refuse(format!("line {}: {e}", i + 1)))?;
            match entry.get("image_path").and_then(Value::as_str) {
                Some(path) => Ok((path.to_string(), joined(&entry, separator))),
                None => Err(refuse(format!("line {} has no image_path", i + 1))),
            }
        })
        .collect()
}

fn joined(entry: &Map<String, Value>, separator: &str) -> String {
    let text = |key: &str| entry.get(key).and_then(Value::as_str).map(str::trim).filter(|t| !t.is_empty());
    match (text("caption"), text("tags")) {
        (Some(caption), Some(tags)) => format!("{caption}{separator}{tags}"),
        (one, other) => one.or(other).unwrap_or_default().to_string(),
    }
}

fn with_extension(root: &Path, key: PathBuf) -> PathBuf {
    if extension(&key).is_some_and(|e| FileFormat::from_extension(e).is_readable()) {
        return key;
    }
    let with = |ext: &str| {
        let mut name = key.clone().into_os_string();
        name.push(".");
        name.push(ext);
        PathBuf::from(name)
    };
    EXTENSIONS.iter().map(|ext| with(ext)).find(|path| root.join(path).is_file()).unwrap_or(key.clone())
}
