//! The order of one epoch, as a pure function of (seed, epoch, contents of the buckets, batch size): every (sample,
//! repeat) exactly once, every batch of one bucket. Batch `k` is found by index, which makes resume exact and instant.
//!
//! The rule is sd-scripts' (`make_buckets`, `shuffle_buckets`) without its accidents: each bucket's list is shuffled and
//! cut into consecutive batches (the last one may be short), then the batches are shuffled.
//!
//! Left to others: which rank takes which batch, where in the plan a run stands (`trainer`).
//!
//! # Determinism
//! A bucket's shuffle is keyed by (seed, [`Purpose::BucketShuffle`], epoch, its width and height), so that one bucket's
//! order does not depend on which others exist; the shuffle of batches by (seed, [`Purpose::BatchShuffle`], epoch, 0).

use random::{Purpose, Stream};

use crate::{Error, Result};

/// What a plan needs to know of one bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketContents {
    /// Width and height.
    pub size: (u32, u32),
    /// (sample number, repeats) of each image.
    pub samples: Vec<(u32, u32)>,
}

/// One visit of one sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Number of the sample in the dataset.
    pub sample: u32,
    /// Which of its repeats this is, from 0.
    pub repeat: u32,
    /// Index of the visit in the epoch's order, from 0 and without gaps: the key of its captions, noise and flips.
    pub position: u64,
}

/// Samples of one bucket that go through the network together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch<'a> {
    /// Width and height.
    pub bucket: (u32, u32),
    /// The visits, `batch_size` or (the last batch of a bucket) fewer, never none.
    pub entries: &'a [Entry],
}

/// The whole epoch's ordered list of batches. 16 bytes per visit and 24 per batch.
#[derive(Debug, Clone)]
pub struct BatchPlan {
    entries: Vec<Entry>,
    batches: Vec<Slot>,
    fingerprint: String,
}

/// A batch: its bucket's size and its place in `entries`.
#[derive(Debug, Clone, Copy)]
struct Slot {
    bucket: (u32, u32),
    start: usize,
    len: usize,
}

impl BatchPlan {
    /// Makes the plan of one epoch. `buckets` are visited in the given order; [`crate::Dataset::plan`] sorts them.
    ///
    /// # Errors
    /// [`Error::Config`] if `batch_size` is 0.
    pub fn new(seed: u64, epoch: u64, buckets: &[BucketContents], batch_size: usize) -> Result<Self> {
        if batch_size == 0 {
            return Err(Error::config("batch_size = 0", "set batch_size to 1 or more"));
        }
        let mut shuffled: Vec<(u32, u32)> = Vec::new();
        let mut batches = Vec::new();
        for bucket in buckets {
            let start = shuffled.len();
            shuffled.extend(bucket.samples.iter().flat_map(|&(sample, repeats)| (0..repeats).map(move |repeat| (sample, repeat))));
            let sub = u64::from(bucket.size.0) << 32 | u64::from(bucket.size.1);
            Stream::new(seed, Purpose::BucketShuffle, epoch, sub).shuffle(&mut shuffled[start..]);
            batches.extend((start..shuffled.len()).step_by(batch_size).map(|at| Slot {
                bucket: bucket.size,
                start: at,
                len: batch_size.min(shuffled.len() - at),
            }));
        }
        Stream::new(seed, Purpose::BatchShuffle, epoch, 0).shuffle(&mut batches);
        let mut entries = Vec::with_capacity(shuffled.len());
        for batch in &mut batches {
            let place = entries.len();
            entries.extend(
                shuffled[batch.start..batch.start + batch.len].iter().zip(place as u64..).map(|(&(sample, repeat), position)| Entry {
                    sample,
                    repeat,
                    position,
                }),
            );
            batch.start = place;
        }
        Ok(Self { entries, batches, fingerprint: fingerprint(seed, epoch, buckets, batch_size) })
    }

    /// Number of batches.
    pub fn len(&self) -> usize {
        self.batches.len()
    }

    /// Whether the plan has no batch.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Number of visits, repeats included.
    pub fn visits(&self) -> usize {
        self.entries.len()
    }

    /// Batch `k`; `None` from [`BatchPlan::len`] on.
    pub fn batch(&self, k: usize) -> Option<Batch<'_>> {
        let slot = self.batches.get(k)?;
        Some(Batch { bucket: slot.bucket, entries: &self.entries[slot.start..slot.start + slot.len] })
    }

    /// The batches in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Batch<'_>> {
        self.batches.iter().map(|slot| Batch { bucket: slot.bucket, entries: &self.entries[slot.start..slot.start + slot.len] })
    }

    /// A hash (blake3, hex) of everything the plan depends on: equal fingerprints, equal plans.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

fn fingerprint(seed: u64, epoch: u64, buckets: &[BucketContents], batch_size: usize) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"lokr batch plan 1");
    for word in [seed, epoch, batch_size as u64, buckets.len() as u64] {
        hasher.update(&word.to_le_bytes());
    }
    // One buffer per bucket: hashing eight bytes at a time would cost more than the shuffles.
    let mut bytes = Vec::new();
    for bucket in buckets {
        bytes.clear();
        for word in [bucket.size.0, bucket.size.1, bucket.samples.len() as u32] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        for (sample, repeats) in &bucket.samples {
            bytes.extend_from_slice(&sample.to_le_bytes());
            bytes.extend_from_slice(&repeats.to_le_bytes());
        }
        hasher.update(&bytes);
    }
    hasher.finalize().to_hex().to_string()
}
