//! What the checkpoint tests share: golden files and a comparison of whole checkpoints.

#![allow(dead_code, reason = "each test file uses its share of it")]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use sdxl::checkpoint::{Checkpoint, HeadDims, Layout, Part, export};
use storage::safetensors::{Dtype, SafeTensors, TensorSource};

/// A file of the golden data.
pub fn golden(name: &str) -> PathBuf {
    let folder = std::env::var("LOKR_GOLDEN").unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden").into());
    PathBuf::from(folder).join(name)
}

/// Heads and groups of the tiny model (tests/golden/tiny-sdxl.json); its single file does not say them.
pub const TINY: HeadDims = HeadDims { head_dim: 8, norm_num_groups: 8, te1_heads: 2, te2_heads: 4, vae_norm_num_groups: 16 };

/// The tiny model in its single file.
pub fn tiny() -> Checkpoint {
    Checkpoint::open(&golden("tiny-sdxl.safetensors")).unwrap().with_head_dims(TINY)
}

/// A tensor's bytes.
pub fn bytes(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = Vec::new();
    tensor.write_bytes(&mut bytes).unwrap();
    bytes
}

/// Asserts that two checkpoints hold the same tensors: names, shapes, element types, bits.
pub fn assert_same(a: &Checkpoint, b: &Checkpoint) {
    for part in Part::ALL {
        let names = |c: &Checkpoint| c.names(part).map(String::from).collect::<Vec<_>>();
        assert_eq!(names(a), names(b), "{part}");
        for name in a.names(part) {
            let (x, y) = (a.load(part, name).unwrap(), b.load(part, name).unwrap());
            assert_eq!((x.dtype(), x.dims()), (y.dtype(), y.dims()), "{part} {name}");
            assert_eq!(Some(x.dims().to_vec()), a.shape(part, name), "{part} {name}");
            assert_eq!(Some(x.dtype()), a.dtype(part, name), "{part} {name}");
            assert!(bytes(&x) == bytes(&y), "{part} {name} differs");
        }
    }
}

/// Asserts that two safetensors files hold the same tensors.
pub fn assert_same_file(a: &Path, b: &Path) {
    let (a, b) = (SafeTensors::open(a).unwrap(), SafeTensors::open(b).unwrap());
    assert_eq!(a.names().collect::<Vec<_>>(), b.names().collect::<Vec<_>>());
    for name in a.names() {
        assert_eq!(a.info(name), b.info(name), "{name}");
        assert!(a.bytes(name) == b.bytes(name), "{name} differs");
    }
}

/// Exports without an edit.
pub fn convert(from: &Checkpoint, target: &Path, layout: Layout) -> sdxl::error::Result<()> {
    export(from, target, layout, None, &BTreeMap::new(), &|_, _, tensor| Ok(tensor))
}

/// Writes a file with these tensors: f16 zeros of shape [2, 2].
pub fn write_names(path: &Path, names: &[&str]) {
    let sources = names.iter().map(|name| TensorSource {
        name: (*name).to_owned(),
        dtype: Dtype::F16,
        shape: vec![2, 2],
        data: Box::new(|| Cow::Owned(vec![0; 8])),
    });
    storage::safetensors::write(path, sources.collect(), &BTreeMap::new()).unwrap();
}

/// Writes a copy of a file with other names (`None` leaves a tensor out) and metadata.
pub fn rewrite(from: &Path, to: &Path, rename: impl Fn(&str) -> Option<String>) {
    let file = SafeTensors::open(from).unwrap();
    let sources = file.names().filter_map(|name| {
        let info = file.info(name).unwrap().clone();
        let data = file.bytes(name).unwrap();
        Some(TensorSource { name: rename(name)?, dtype: info.dtype, shape: info.shape, data: Box::new(move || Cow::Borrowed(data)) })
    });
    storage::safetensors::write(to, sources.collect(), file.metadata()).unwrap();
}

/// The message of an error, and its hint.
pub fn message<T>(result: sdxl::error::Result<T>) -> (String, String) {
    let error = result.err().expect("an error");
    (error.to_string(), error.hint().unwrap_or_default())
}
