//! Data: from folders of images to batches whose order, pixels and captions are pure functions of a key.
//!
//! [`Dataset::open`] reads what a [`DatasetConfig`] names (headers and captions only), puts every image into an aspect
//! ratio bucket and tells in a [`Report`] what it found and what it left out. [`Dataset::plan`] gives the whole epoch's
//! [`BatchPlan`] without touching an image; [`Dataset::load_pixels`] decodes, resizes and crops one sample;
//! [`Dataset::caption`] runs the caption pipeline; [`LatentCache`] keeps what a VAE made of the pixels; [`Prefetcher`]
//! prepares batches ahead of use, in order.
//!
//! For data of millions, [`index::build`] makes one file of folders, tar shards and danbooru's metadata; [`select`] takes
//! of it what a run wants, [`tags`] makes captions of tags, and a subset that names the file loads in seconds.
//! [`histogram`], [`mod@check`] and [`explain`] show people what a run will see.
//!
//! Sizes are always (width, height) in pixels; tensors are [channels, height, width].
//!
//! # Determinism
//! Everything random takes a key of (seed, purpose, epoch, position in the epoch) from crate `random`; nothing depends
//! on threads, on the number of ranks or on what was loaded before.
//!
//! Must not know: tensors and devices, the networks, adapters, diffusion, process groups, the training loop. It may use
//! `storage` and `random`.

pub mod bucket;
pub mod caption;
pub mod check;
pub mod config;
mod dataset;
mod error;
pub mod explain;
pub mod histogram;
pub mod image;
pub mod index;
mod latents;
mod loader;
mod plan;
mod report;
mod rows;
pub mod select;
pub mod source;
pub mod tags;
mod visit;

pub use bucket::{Buckets, Placement};
pub use caption::{CaptionContext, process_caption};
pub use config::{CropCondition, DatasetConfig, Interpolation, OnBrokenImage, SubsetConfig};
pub use dataset::{Bucket, Dataset, Loaded, Sample, View};
pub use error::{Error, Result};
pub use image::{DecodeError, Pixels};
pub use latents::{CacheDtype, CachePlace, ItemKey, Latent, LatentCache, LatentId, LatentItem, LatentSource, LatentVisit};
pub use loader::Prefetcher;
pub use plan::{Batch, BatchPlan, BucketContents, Entry};
pub use report::{BucketCount, Named, Report};
pub use rows::SampleRow;
