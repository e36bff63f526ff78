//! The dataset of a run: samples in their buckets, and everything that can be asked of one visit. Ties `source`,
//! `bucket`, `plan`, `caption` and `image` together.
//!
//! Left to others: which visit comes when ([`BatchPlan`]), what a VAE makes of pixels ([`crate::LatentCache`]).
//!
//! # Determinism
//! A visit's mirroring and random crop are drawn in this order from one stream keyed by (seed, [`Purpose::Augment`],
//! epoch, position). A broken image is replaced by the next one of its bucket that is not broken: a function of the
//! files alone, the same on every rank and in every order of loading.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use random::{Purpose, Stream};
use rayon::prelude::*;

use crate::image::{DecodeError, crop_condition, decode, prepare, time_ids};
use crate::source::{self, Item, chain};
use crate::{BatchPlan, BucketContents, BucketCount, Buckets, CaptionContext, DatasetConfig, Error, ItemKey, LatentId, LatentItem};
use crate::{OnBrokenImage, Pixels, Placement, Report, Result, process_caption};

/// One image with its caption and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The image file.
    pub path: PathBuf,
    /// Index of its subset in the configuration.
    pub subset: usize,
    /// Visits per epoch.
    pub repeats: u32,
    /// Width and height of the image, after EXIF orientation.
    pub size: (u32, u32),
    /// Where it is resized and cropped to.
    pub placement: Placement,
    /// The caption before the pipeline.
    pub caption: String,
}

/// A bucket in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// Width and height.
    pub size: (u32, u32),
    /// Numbers of its samples, ascending.
    pub samples: Vec<u32>,
}

/// What one visit sees of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Whether it is mirrored: with cached latents, which variant to take ([`ItemKey::flipped`]).
    pub flipped: bool,
    /// Left and top of the crop, in pixels of the resized image before mirroring.
    pub pixel_crop: (u32, u32),
    /// Left and top as the network is told them.
    pub crop_left_top: (u32, u32),
    /// SDXL's size conditioning: original height, original width, crop top, crop left, target height, target width.
    pub time_ids: [u32; 6],
}

/// The pixels of one visit.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The sample that they are of: the one asked for, or its replacement. Take the caption of this one.
    pub sample: u32,
    /// What was seen of it.
    pub view: View,
    /// Its pixels.
    pub pixels: Pixels,
}

/// All samples of a run, numbered from 0 in the order of subsets, folders and names.
#[derive(Debug)]
pub struct Dataset {
    config: DatasetConfig,
    samples: Vec<Sample>,
    /// Sorted by size.
    buckets: Vec<Bucket>,
    /// Samples that turned out to be broken while loading, with the reason.
    broken: Mutex<BTreeMap<u32, String>>,
}

impl Dataset {
    /// Reads the headers and captions of all images that the configuration names and sorts them into buckets.
    ///
    /// # Errors
    /// A rule of the configuration broken, a folder missing or without images, no image usable; with
    /// `on_broken_image = "fail"` the first file that cannot be used.
    pub fn open(config: &DatasetConfig) -> Result<(Dataset, Report)> {
        config.check()?;
        let mut report = Report::default();
        let rule = Buckets::new(config);
        let mut samples = Vec::new();
        for item in source::scan(config, &mut report)? {
            match place(&rule, config, &item) {
                Ok(placement) => {
                    let Item { path, subset, repeats, size, caption } = item;
                    samples.push(Sample { path, subset, repeats, size, placement, caption });
                }
                Err(source) => report.reject(config.on_broken_image, Error::Image { path: item.path, source })?,
            }
        }
        if samples.is_empty() {
            let first = report.broken_images.first.first().or(report.broken_captions.first.first());
            return Err(Error::AllBroken { found: report.images_found, first: first.cloned().unwrap_or_default() });
        }
        let mut buckets: BTreeMap<(u32, u32), Vec<u32>> = BTreeMap::new();
        for (number, sample) in (0u32..).zip(&samples) {
            buckets.entry(sample.placement.bucket).or_default().push(number);
        }
        let buckets = buckets.into_iter().map(|(size, samples)| Bucket { size, samples }).collect();
        let dataset = Dataset { config: config.clone(), samples, buckets, broken: Mutex::default() };
        report.images_used = dataset.len();
        report.visits = dataset.samples.iter().map(|s| u64::from(s.repeats)).sum();
        report.buckets = dataset.bucket_counts();
        Ok((dataset, report))
    }

    /// The configuration it was opened with.
    pub fn config(&self) -> &DatasetConfig {
        &self.config
    }

    /// Number of samples (images, not counting repeats).
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there is no sample; [`Dataset::open`] does not make such a dataset.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// All samples, by number.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// One sample.
    ///
    /// # Errors
    /// [`Error::NoSuchSample`].
    pub fn sample(&self, number: u32) -> Result<&Sample> {
        self.samples.get(number as usize).ok_or(Error::NoSuchSample { sample: number, len: self.samples.len() })
    }

    /// The buckets in use, sorted by size.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Images, visits, enlargement and crop loss of each bucket.
    pub fn bucket_counts(&self) -> Vec<BucketCount> {
        let count = |bucket: &Bucket| {
            let members = || bucket.samples.iter().map(|&s| &self.samples[s as usize]);
            let enlarged = |s: &&Sample| s.placement.resized.0 > s.size.0 || s.placement.resized.1 > s.size.1;
            BucketCount {
                size: bucket.size,
                images: bucket.samples.len(),
                visits: members().map(|s| u64::from(s.repeats)).sum(),
                enlarged: members().filter(enlarged).count(),
                crop_loss: members().map(|s| s.placement.crop_loss()).sum::<f64>() / bucket.samples.len() as f64,
            }
        };
        self.buckets.iter().map(count).collect()
    }

    /// The order of one epoch (counted from 0).
    ///
    /// # Errors
    /// [`Error::Config`] if `batch_size` is 0.
    pub fn plan(&self, seed: u64, epoch: u64, batch_size: usize) -> Result<BatchPlan> {
        let contents = |bucket: &Bucket| BucketContents {
            size: bucket.size,
            samples: bucket.samples.iter().map(|&s| (s, self.samples[s as usize].repeats)).collect(),
        };
        BatchPlan::new(seed, epoch, &self.buckets.iter().map(contents).collect::<Vec<_>>(), batch_size)
    }

    /// A hash (blake3, hex) of what training sees of the dataset short of the images' bytes: names, sizes, places,
    /// repeats, captions and the configuration. The folders' own paths do not enter, so a dataset may be moved.
    pub fn fingerprint(&self) -> String {
        let mut config = self.config.clone();
        config.subsets.iter_mut().for_each(|s| s.image_dir = PathBuf::new());
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"lokr dataset 1");
        // Strings are hashed with their length in front, so that no two lists of strings run together.
        let mut text = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        };
        text(format!("{config:?}").as_bytes());
        for s in &self.samples {
            let name = s.path.strip_prefix(&self.config.subsets[s.subset].image_dir).unwrap_or(&s.path);
            text(name.as_os_str().as_encoded_bytes());
            text(s.caption.as_bytes());
            text(format!("{} {} {:?} {:?}", s.subset, s.repeats, s.size, s.placement).as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The caption of one visit, see [`process_caption`].
    ///
    /// # Errors
    /// [`Error::NoSuchSample`].
    pub fn caption(&self, sample: u32, context: CaptionContext) -> Result<String> {
        let sample = self.sample(sample)?;
        Ok(process_caption(&sample.caption, &self.config.subsets[sample.subset], context))
    }

    /// Mirroring, crop and size conditioning of one visit, without reading the image.
    ///
    /// # Errors
    /// [`Error::NoSuchSample`].
    pub fn view(&self, sample: u32, seed: u64, epoch: u64, position: u64) -> Result<View> {
        let s = self.sample(sample)?;
        let subset = &self.config.subsets[s.subset];
        let mut stream = Stream::new(seed, Purpose::Augment, epoch, position);
        let flipped = subset.flip_aug && stream.uniform() < 0.5;
        let pixel_crop = if subset.random_crop {
            let (x, y) = s.placement.room();
            let left = stream.below(u64::from(x) + 1);
            (left as u32, stream.below(u64::from(y) + 1) as u32)
        } else {
            s.placement.centre_crop()
        };
        Ok(self.view_of(s, flipped, pixel_crop))
    }

    /// Decodes, resizes and crops the image of one visit. If it is broken, the next image of its bucket that is not (by
    /// number, cyclic) takes its place; each broken image is logged once and kept in [`Dataset::broken`].
    ///
    /// # Errors
    /// [`Error::BucketBroken`] if no image of the bucket can be used; with `on_broken_image = "fail"` already
    /// [`Error::Image`].
    pub fn load_pixels(&self, sample: u32, seed: u64, epoch: u64, position: u64) -> Result<Loaded> {
        let mut outcome = None;
        let found = self.replacement(sample, |candidate| {
            if self.is_broken(candidate) && self.config.on_broken_image == OnBrokenImage::Skip {
                return false;
            }
            let loaded = self.view(candidate, seed, epoch, position).and_then(|view| {
                let pixels = self.pixels(candidate, view)?;
                Ok(Loaded { sample: candidate, view, pixels })
            });
            let stop = loaded.is_ok() || self.config.on_broken_image == OnBrokenImage::Fail;
            outcome = stop.then_some(loaded);
            stop
        })?;
        match (found, outcome) {
            (Some(_), Some(loaded)) => loaded,
            _ => {
                let s = self.sample(sample)?;
                let count = self.bucket_of(s).len();
                Err(Error::BucketBroken { bucket: s.placement.bucket, count, path: s.path.clone() })
            }
        }
    }

    /// The pixels that a latent cache wants for a key: the centre crop, mirrored or not. No replacement is made.
    ///
    /// # Errors
    /// [`Error::Image`] if the image is broken (it is then listed in [`Dataset::broken`]).
    pub fn load_for_cache(&self, key: ItemKey) -> Result<Pixels> {
        let s = self.sample(key.sample)?;
        self.pixels(key.sample, self.view_of(s, key.flipped, s.placement.centre_crop()))
    }

    /// The first sample for which `usable` holds, starting with `sample` itself and going on through its bucket by
    /// number, cyclically. `None` if there is none.
    ///
    /// # Errors
    /// [`Error::NoSuchSample`].
    pub fn replacement(&self, sample: u32, mut usable: impl FnMut(u32) -> bool) -> Result<Option<u32>> {
        let members = self.bucket_of(self.sample(sample)?);
        let start = members.partition_point(|&m| m < sample);
        Ok(members[start..].iter().chain(&members[..start]).copied().find(|&m| usable(m)))
    }

    /// Samples that turned out to be broken while loading, with the reason.
    pub fn broken(&self) -> BTreeMap<u32, String> {
        self.broken.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Whether a sample turned out to be broken while loading.
    pub fn is_broken(&self, sample: u32) -> bool {
        self.broken.lock().unwrap_or_else(|e| e.into_inner()).contains_key(&sample)
    }

    /// What a latent cache of this dataset holds: every image, and its mirror image where `flip_aug` is on. Reads every
    /// file once, in parallel, to know its content; files that cannot be read become [`Dataset::broken`].
    ///
    /// # Errors
    /// [`Error::Config`] if a subset has `random_crop`.
    pub fn latent_items(&self) -> Result<Vec<LatentItem>> {
        self.config.check_cacheable()?;
        let hashes: Vec<_> = self.samples.par_iter().map(|s| storage::blake3_file(&s.path)).collect();
        let mut items = Vec::new();
        for ((number, sample), hash) in (0u32..).zip(&self.samples).zip(hashes) {
            let content = match hash {
                Ok(content) => content,
                Err(error) => {
                    self.mark_broken(number, &sample.path, &error);
                    continue;
                }
            };
            let (w, h) = sample.placement.bucket;
            let flips: &[bool] = if self.config.subsets[sample.subset].flip_aug { &[false, true] } else { &[false] };
            items.extend(flips.iter().map(|&flipped| LatentItem {
                key: ItemKey { sample: number, flipped },
                id: LatentId::new(&content, sample.placement, sample.placement.centre_crop(), flipped, self.config.resize_interpolation),
                shape: [4, h as usize / 8, w as usize / 8],
            }));
        }
        Ok(items)
    }

    fn bucket_of(&self, sample: &Sample) -> &[u32] {
        let found = self.buckets.binary_search_by_key(&sample.placement.bucket, |b| b.size);
        found.map_or(&[], |i| &self.buckets[i].samples)
    }

    fn view_of(&self, s: &Sample, flipped: bool, pixel_crop: (u32, u32)) -> View {
        let crop_left_top = crop_condition(self.config.crop_condition, s.placement, s.size, pixel_crop, flipped);
        View { flipped, pixel_crop, crop_left_top, time_ids: time_ids(s.size, crop_left_top, s.placement.bucket) }
    }

    fn pixels(&self, number: u32, view: View) -> Result<Pixels> {
        let s = self.sample(number)?;
        match self.try_pixels(s, view) {
            Ok(pixels) => Ok(pixels),
            Err(source) => {
                self.mark_broken(number, &s.path, &source);
                Err(Error::Image { path: s.path.clone(), source })
            }
        }
    }

    fn try_pixels(&self, s: &Sample, view: View) -> std::result::Result<Pixels, DecodeError> {
        let image = decode(&source::read(&s.path)?)?;
        if image.dimensions() != s.size {
            return Err(DecodeError::Changed { before: s.size, now: image.dimensions() });
        }
        let data = prepare(image, s.placement, view.pixel_crop, view.flipped, self.config.resize_interpolation);
        Ok(Pixels { data, original_size: s.size, crop_left_top: view.crop_left_top, target_size: s.placement.bucket })
    }

    fn mark_broken(&self, number: u32, path: &Path, error: &dyn std::error::Error) {
        let mut broken = self.broken.lock().unwrap_or_else(|e| e.into_inner());
        broken.entry(number).or_insert_with(|| {
            let reason = chain(error);
            tracing::warn!("image `{}` cannot be used: {reason}", path.display());
            reason
        });
    }
}

/// Where an image goes, or why it cannot.
fn place(rule: &Buckets, config: &DatasetConfig, item: &Item) -> std::result::Result<Placement, DecodeError> {
    let (width, height) = item.size;
    let placement = rule.place(item.size).ok_or(DecodeError::TooSmall { width, height, steps: config.bucket_reso_steps })?;
    if placement.is_too_narrow() {
        return Err(DecodeError::TooNarrow { size: item.size, bucket: placement.bucket });
    }
    Ok(placement)
}
