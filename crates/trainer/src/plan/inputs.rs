//! What a plan is made of, where it is there and where it is not yet.

use std::path::Path;

use dataset::Dataset;
use sdxl::checkpoint::{Checkpoint, Shapes};
use storage::safetensors::Dtype;

use crate::base;
use crate::config::{Compat, RunConfig};
use crate::error::Result;
use crate::timeline::Timeline;

/// The base model's shapes.
pub fn checkpoint(config: &RunConfig, notes: &mut Vec<String>) -> Result<Checkpoint> {
    let path: &Path = &config.model.base;
    if path.exists() {
        let untransposed = config.train.compat == Some(Compat::SdScripts);
        return Ok(base::open_checkpoint(&config.model, untransposed)?.without_weights());
    }
    notes.push(format!("`{}` is not there: planned with the shapes of SDXL, weights in f16", path.display()));
    let described = Checkpoint::described(path, &Shapes::sdxl(), Dtype::F16)?;
    let dims = config.model.head_dims(described.head_dims()?);
    Ok(described.with_head_dims(dims))
}

/// The batch with the most pixels, and the run's steps.
pub fn data(config: &RunConfig, notes: &mut Vec<String>) -> Result<((u32, u32, usize), Option<Timeline>)> {
    let t = &config.train;
    let timeline = |batches| Timeline::new(batches, t.gradient_accumulation_steps as u64, 1, t.max_train_steps, t.max_train_epochs);
    match Dataset::open(&config.dataset) {
        Ok((dataset, _)) => {
            let samples = |visits: u64| t.batch_size.min(visits as usize).max(1);
            let batches = dataset.bucket_counts().into_iter().map(|c| (c.size.0, c.size.1, samples(c.visits)));
            let largest = batches.max_by_key(|&(w, h, n)| (u64::from(w) * u64::from(h) * n as u64, w));
            let (w, h) = config.dataset.resolution;
            let batches = dataset.plan(t.seed, 0, t.batch_size)?.len() as u64;
            Ok((largest.unwrap_or((w, h, t.batch_size)), Some(timeline(batches))))
        }
        Err(error) => {
            let (w, h) = config.dataset.resolution;
            notes.push(format!("the pictures cannot be opened ({error}): planned for batches of {} at {w}x{h}", t.batch_size));
            Ok(((w, h, t.batch_size), t.max_train_steps.map(|_| timeline(0))))
        }
    }
}
