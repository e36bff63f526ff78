//! Looking at files: bytes, tensors, pictures, listings; and damaging them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use image::RgbImage;
use regex::Regex;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

/// A file's bytes.
#[track_caller]
pub fn bytes(path: impl AsRef<Path>) -> Vec<u8> {
    let path = path.as_ref();
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A file's text.
#[track_caller]
pub fn text(path: impl AsRef<Path>) -> String {
    String::from_utf8(bytes(path)).expect("UTF-8")
}

/// Two files hold the same bytes.
#[track_caller]
pub fn assert_same_file(a: impl AsRef<Path>, b: impl AsRef<Path>) {
    let (a, b) = (a.as_ref(), b.as_ref());
    let (x, y) = (bytes(a), bytes(b));
    if x != y {
        let at = x.iter().zip(&y).position(|(p, q)| p != q);
        panic!("{} ({} bytes) and {} ({} bytes) differ, first at {at:?}", a.display(), x.len(), b.display(), y.len());
    }
}

/// Two folders hold the same files, byte by byte.
#[track_caller]
pub fn assert_same_folder(a: impl AsRef<Path>, b: impl AsRef<Path>) {
    let (a, b) = (a.as_ref(), b.as_ref());
    assert_eq!(listing(a), listing(b), "{} and {}", a.display(), b.display());
    for name in listing(a) {
        assert_same_file(a.join(&name), b.join(&name));
    }
}

/// Paths of all files below a folder, relative to it, sorted.
pub fn listing(folder: impl AsRef<Path>) -> Vec<String> {
    fn visit(folder: &Path, root: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                visit(&path, root, found);
            } else {
                found.push(path.strip_prefix(root).expect("it is below the root").display().to_string());
            }
        }
    }
    let mut found = Vec::new();
    visit(folder.as_ref(), folder.as_ref(), &mut found);
    found.sort();
    found
}

/// Content of every file of a run but the lock, whose content is the last process's number.
pub fn contents(run: impl AsRef<Path>) -> BTreeMap<String, Vec<u8>> {
    let run = run.as_ref();
    listing(run).into_iter().filter(|n| n != "run.lock").map(|n| (n.clone(), bytes(run.join(n)))).collect()
}

/// Copies a folder with everything in it.
pub fn copy_folder(from: &Path, to: &Path) {
    for name in listing(from) {
        let target = to.join(&name);
        std::fs::create_dir_all(target.parent().expect("it has a folder")).expect("a folder");
        std::fs::copy(from.join(&name), target).expect("copied");
    }
}

/// Ways in which a disk, a copy or a hand spoils a file.
#[derive(Clone, Copy, Debug)]
pub enum Damage {
    /// One bit in the middle is another.
    Flip,
    /// The end is missing.
    Cut,
    /// The file is missing.
    Gone,
}

/// Damages a file.
pub fn damage(path: &Path, how: Damage) {
    let mut content = bytes(path);
    match how {
        Damage::Flip => {
            let middle = content.len() / 2;
            content[middle] ^= 4;
        }
        Damage::Cut => content.truncate(content.len() - 10),
        Damage::Gone => return std::fs::remove_file(path).expect("removed"),
    }
    std::fs::write(path, content).expect("written");
}

/// A tensor as a file holds it.
#[derive(Debug, PartialEq)]
pub struct Stored {
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Elements, little-endian.
    pub data: Vec<u8>,
}

impl Stored {
    /// The elements of an f32 tensor.
    pub fn floats(&self) -> Vec<f32> {
        assert_eq!(self.dtype, Dtype::F32);
        self.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
    }
}

/// The tensors of a safetensors file.
#[track_caller]
pub fn tensors(path: impl AsRef<Path>) -> BTreeMap<String, Stored> {
    let content = bytes(path);
    let file = SafeTensors::deserialize(&content).expect("a safetensors file");
    let stored = |t: TensorView| Stored { dtype: t.dtype(), shape: t.shape().to_vec(), data: t.data().to_vec() };
    file.tensors().into_iter().map(|(name, t)| (name, stored(t))).collect()
}

/// The metadata of a safetensors file.
pub fn metadata(path: impl AsRef<Path>) -> BTreeMap<String, String> {
    let content = bytes(path);
    let (_, header) = SafeTensors::read_metadata(&content).expect("a safetensors file");
    header.metadata().clone().unwrap_or_default().into_iter().collect()
}

/// Writes a safetensors file of small f32 tensors of these names.
pub fn write_tensors(path: &Path, names: &[&str]) {
    let data = [0u8; 16];
    let view = |name: &&str| (name.to_string(), TensorView::new(Dtype::F32, vec![2, 2], &data).expect("sixteen bytes"));
    let written = safetensors::serialize(names.iter().map(view).collect::<Vec<_>>(), None).expect("valid tensors");
    std::fs::write(path, written).expect("written");
}

/// Copies a safetensors file with one more line of metadata.
pub fn with_metadata(from: &Path, to: &Path, key: &str, value: &str) {
    let content = bytes(from);
    let (length, rest) = content.split_at(8);
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes")) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&rest[..length]).expect("a header");
    header["__metadata__"][key] = value.into();
    let mut header = serde_json::to_vec(&header).expect("JSON");
    header.resize(header.len().next_multiple_of(8), b' ');
    let written = [&(header.len() as u64).to_le_bytes()[..], &header, &rest[length..]].concat();
    std::fs::write(to, written).expect("written");
}

/// A picture.
#[track_caller]
pub fn picture(path: impl AsRef<Path>) -> RgbImage {
    image::load_from_memory(&bytes(path)).expect("a picture").to_rgb8()
}

/// The largest difference of two pictures in a channel, of 255.
pub fn difference(a: &RgbImage, b: &RgbImage) -> u8 {
    assert_eq!(a.dimensions(), b.dimensions());
    a.iter().zip(b.iter()).map(|(p, q)| p.abs_diff(*q)).max().unwrap_or(0)
}

/// One line of `metrics.jsonl` after the other.
pub fn metrics(run: &Path) -> Vec<serde_json::Value> {
    text(run.join("metrics.jsonl")).lines().map(|l| serde_json::from_str(l).expect("a line of JSON")).collect()
}

/// The steps that have a line in the metrics, in the order of the file.
pub fn steps_in_metrics(run: &Path) -> Vec<u64> {
    metrics(run).iter().filter(|l| l.get("loss").is_some()).map(|l| l["step"].as_u64().expect("a number")).collect()
}

/// Steps that have their line by now; the file may not exist, and its last line may be half written.
pub fn steps_so_far(run: &Path) -> usize {
    std::fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |t| t.matches("\"grad_norm\":").count())
}

/// Folders of a run's checkpoints.
pub fn checkpoints(run: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(run.join("checkpoints")) else { return Vec::new() };
    let mut names: Vec<String> = entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The folder of the checkpoint after a step.
pub fn checkpoint(run: &Path, step: u64) -> PathBuf {
    run.join("checkpoints").join(format!("step-{step:08}"))
}

/// Masks what depends on the machine or the moment: places, losses, speeds, process numbers.
pub fn masked(text: &str, folder: &Path) -> String {
    let mut text = text.replace(&folder.display().to_string(), "[folder]");
    text = text.replace(&super::tiny_base().display().to_string(), "[base]");
    text = text.replace(&super::golden("").display().to_string(), "[golden]/");
    text = text.replace(&super::repository().display().to_string(), "[repository]");
    for (pattern, by) in [
        (r"loss \d+\.\d{4}", "loss [loss]"),
        (r"pictures \d\.\d+", "pictures [loss]"),
        (r"[\d.]+ images/s", "[speed] images/s"),
        (r"process \d+", "process [pid]"),
    ] {
        text = Regex::new(pattern).expect("a pattern").replace_all(&text, by).into_owned();
    }
    text
}
