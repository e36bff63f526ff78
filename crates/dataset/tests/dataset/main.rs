//! Tests of crate `dataset`, one binary: buckets and resizing against recorded data, every image format and peculiarity,
//! hostile files, captions, plan, folders, latent cache, prefetching.
#![allow(clippy::disallowed_methods)] // tests write the files that the crate is to read

mod buckets;
mod captions;
mod config;
mod folders;
mod hostile;
mod images;
mod index;
mod indexed;
mod latents;
mod loader;
mod parquet;
mod plan;

use std::path::{Path, PathBuf};

use dataset::{DatasetConfig, SubsetConfig};

/// A file of the workspace's recorded data.
fn golden(name: &str) -> PathBuf {
    let here = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden"));
    std::env::var_os("LOKR_GOLDEN").map_or_else(here, PathBuf::from).join(name)
}

/// A file of this crate's recorded data, made by `tests/golden/make.py`.
fn own_golden(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")).join(name)
}

/// Buckets of area 128x128 in steps of 32, over one folder.
fn small_config(dir: &Path) -> DatasetConfig {
    DatasetConfig {
        resolution: (128, 128),
        min_bucket_reso: 64,
        max_bucket_reso: 256,
        bucket_reso_steps: 32,
        subsets: vec![SubsetConfig { image_dir: dir.into(), ..Default::default() }],
        ..Default::default()
    }
}

/// A PNG with a gradient that depends on `seed`.
fn png(width: u32, height: u32, seed: u8) -> Vec<u8> {
    let image = ::image::RgbImage::from_fn(width, height, |x, y| ::image::Rgb([(x * 255 / width) as u8, (y * 255 / height) as u8, seed]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, ::image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// Writes files (name, content) into a new folder.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    dir
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |e| e.source()).map(|e| e.to_string()).collect::<Vec<_>>().join(": ")
}
