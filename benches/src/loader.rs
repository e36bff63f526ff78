//! The loader of a run, as `lokr train` uses it without cached latents: captions and token ids, pictures decoded, resized,
//! cropped and made into tensors, batch by batch, ahead of their use. Only the network is missing.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use dataset::{Dataset, DatasetConfig, Interpolation, SubsetConfig};
use trainer::config::RunConfig;
use trainer::data::{Data, prefetch};

use crate::Result;

/// Pictures of a batch.
pub const BATCH: usize = 4;

/// The dataset of a folder of pictures or (`index`) of the images of an index, at 1024x1024 with SDXL's usual buckets.
pub fn config(pictures: &Path, index: bool, resize: Option<Interpolation>) -> DatasetConfig {
    let mut subset = SubsetConfig { caption_extension: ".txt".into(), class_tokens: Some("a picture".into()), ..SubsetConfig::default() };
    match index {
        true => subset.index = Some(pictures.into()),
        false => subset.image_dir = pictures.into(),
    }
    DatasetConfig { max_bucket_reso: 4096, resize_interpolation: resize, subsets: vec![subset], ..DatasetConfig::default() }
}

/// The data of a run over a dataset, one epoch long.
///
/// # Errors
/// If the pictures cannot be opened.
pub fn open(config: DatasetConfig) -> Result<Arc<Data>> {
    let (dataset, _) = Dataset::open(&config)?;
    let mut run = RunConfig { dataset: config, ..RunConfig::default() };
    (run.train.batch_size, run.train.seed) = (BATCH, 1);
    (run.train.max_train_steps, run.train.max_train_epochs) = (None, Some(1));
    Ok(Arc::new(Data::new(&run, dataset, None, 0, 1)?))
}

/// Seconds for the first `most` batches, or the whole epoch, with so many threads, and the pictures in them.
///
/// # Errors
/// If a picture cannot be read.
pub fn run(data: &Arc<Data>, threads: usize, most: usize) -> Result<(f64, usize)> {
    let start = Instant::now();
    let mut pictures = 0;
    for batch in prefetch(data, 0, threads)?.take(most) {
        pictures += batch.transpose()?.map_or(0, |b| b.samples.len());
    }
    Ok((start.elapsed().as_secs_f64(), pictures))
}
