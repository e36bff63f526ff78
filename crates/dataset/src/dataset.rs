//! The dataset of a run: samples in their buckets, and everything that can be asked of one visit. Ties `source`,
//! `bucket`, `plan`, `caption` and `image` together.
//!
//! Left to others: which visit comes when ([`BatchPlan`]), what one visit sees (`visit`), what a VAE makes of pixels
//! ([`crate::LatentCache`]).

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock};

use rayon::prelude::*;

use crate::image::DecodeError;
use crate::rows::{At, Rows, SampleRow, Segment};
use crate::source::{self, Indexed, Item};
use crate::{BatchPlan, BucketContents, BucketCount, Buckets, DatasetConfig, Error, Pixels, Placement, Report, Result};

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

/// All samples of a run, numbered from 0 in the order of subsets; within one, of folders and names, or of ids.
#[derive(Debug)]
pub struct Dataset {
    config: DatasetConfig,
    pub(crate) rule: Buckets,
    pub(crate) rows: Rows,
    /// Sorted by size.
    buckets: Vec<Bucket>,
    /// Made when asked for: see [`Dataset::samples`].
    listed: OnceLock<Vec<Sample>>,
    /// Samples that turned out to be broken while loading, with the reason.
    pub(crate) broken: Mutex<BTreeMap<u32, String>>,
    /// Visits whose image was asked for.
    pub(crate) asked_for: AtomicU64,
    /// Hashes of listed files that have been read for one.
    pub(crate) contents: Mutex<HashMap<u32, Arc<str>>>,
}

/// Samples that a thread sorts into buckets at a time.
const CHUNK: usize = 1 << 16;

impl Dataset {
    /// Reads the headers and captions of all images that the configuration names, or the rows of an index, and sorts them
    /// into buckets.
    ///
    /// # Errors
    /// A rule of the configuration broken, a folder missing or without images, an index or selection that cannot be read,
    /// no image usable; with `on_broken_image = "fail"` the first file that cannot be used.
    pub fn open(config: &DatasetConfig) -> Result<(Dataset, Report)> {
        config.check()?;
        let mut report = Report::default();
        let rule = Buckets::new(config);
        let mut rows = Rows::default();
        let mut listed: Vec<Sample> = Vec::new();
        for (number, subset) in config.subsets.iter().enumerate() {
            let Some(path) = &subset.index else {
                listed.extend(list(config, &rule, number, &mut report)?);
                continue;
            };
            if !listed.is_empty() {
                rows.push(Segment::Listed(std::mem::take(&mut listed)));
            }
            let mut source = Indexed::open(path, subset, number, &mut report)?;
            report.images_found += source.rows.len();
            leave_out_misfits(config, &rule, &mut source, &mut report)?;
            report.captions_from_indexes += source.rows.len();
            rows.push(Segment::Indexed { source: Box::new(source), subset: number, repeats: subset.num_repeats });
        }
        if !listed.is_empty() {
            rows.push(Segment::Listed(listed));
        }
        if rows.len() == 0 {
            let first = report.broken_images.first.first().or(report.broken_captions.first.first());
            return Err(Error::AllBroken { found: report.images_found, first: first.cloned().unwrap_or_default() });
        }
        let left_out = report.broken_images.count + report.broken_captions.count;
        let first = report.broken_images.first.first().or(report.broken_captions.first.first()).cloned();
        if let Some(error) = config.too_many_broken(left_out, report.images_found, first.unwrap_or_default()) {
            return Err(error);
        }
        let mut dataset = Dataset {
            config: config.clone(),
            rule,
            rows,
            buckets: Vec::new(),
            listed: OnceLock::new(),
            broken: Mutex::default(),
            asked_for: AtomicU64::new(0),
            contents: Mutex::default(),
        };
        dataset.buckets = dataset.sort_into_buckets();
        report.images_used = dataset.len();
        report.buckets = dataset.bucket_counts();
        report.visits = report.buckets.iter().map(|b| b.visits).sum();
        Ok((dataset, report))
    }

    /// The configuration it was opened with.
    pub fn config(&self) -> &DatasetConfig {
        &self.config
    }

    /// Number of samples (images, not counting repeats).
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is no sample; [`Dataset::open`] does not make such a dataset.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All samples, by number, with paths and captions. Those of an index are looked up one by one at the first call, and
    /// take some 500 bytes each from then on: what goes through millions takes [`Dataset::rows`].
    pub fn samples(&self) -> &[Sample] {
        if let Some(all) = self.rows.all_listed() {
            return all;
        }
        self.listed.get_or_init(|| {
            let numbers = 0..self.len() as u32;
            // A row of an index that has become unreadable since it was opened has no name and no caption.
            numbers.into_par_iter().filter_map(|n| self.sample(n).ok().map(Cow::into_owned)).collect()
        })
    }

    /// The samples that are not of an index.
    pub fn listed(&self) -> impl Iterator<Item = &Sample> + '_ {
        self.rows.segments().iter().flat_map(|segment| match segment {
            Segment::Listed(samples) => samples.as_slice(),
            Segment::Indexed { .. } => &[],
        })
    }

    /// What buckets and plans know of each sample, by number; costs no lookup.
    pub fn rows(&self) -> impl Iterator<Item = SampleRow> + '_ {
        (0..self.len() as u32).filter_map(|n| self.row(n).ok())
    }

    /// As [`Dataset::rows`], of one sample.
    ///
    /// # Errors
    /// [`Error::NoSuchSample`].
    pub fn row(&self, number: u32) -> Result<SampleRow> {
        Ok(self.rows.at(number)?.row(&self.rule))
    }

    /// One sample.
    ///
    /// # Errors
    /// [`Error::NoSuchSample`]; [`Error::Sqlite`] if it is of an index that cannot be read any more.
    pub fn sample(&self, number: u32) -> Result<Cow<'_, Sample>> {
        let at = self.rows.at(number)?;
        if let At::Listed(sample) = at {
            return Ok(Cow::Borrowed(sample));
        }
        let SampleRow { subset, repeats, size, placement } = at.row(&self.rule);
        Ok(Cow::Owned(Sample { path: at.name(), subset, repeats, size, placement, caption: at.caption()?.into_owned() }))
    }

    /// The path of a sample's file, or its shard and the name in it: for messages.
    pub fn name(&self, number: u32) -> PathBuf {
        self.rows.at(number).map_or_else(|_| PathBuf::from(format!("sample {number}")), |at| at.name())
    }

    /// The number of the sample that has this id in its index.
    pub fn find_id(&self, id: u32) -> Option<u32> {
        self.rows.find_id(id)
    }

    /// The buckets in use, sorted by size.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    fn sort_into_buckets(&self) -> Vec<Bucket> {
        let numbers: Vec<u32> = (0..self.len() as u32).step_by(CHUNK).collect();
        let parts: Vec<BTreeMap<(u32, u32), Vec<u32>>> = numbers
            .into_par_iter()
            .map(|from| {
                let mut part: BTreeMap<(u32, u32), Vec<u32>> = BTreeMap::new();
                for number in from..(from as usize + CHUNK).min(self.len()) as u32 {
                    if let Ok(row) = self.row(number) {
                        part.entry(row.placement.bucket).or_default().push(number);
                    }
                }
                part
            })
            .collect();
        let mut all: BTreeMap<(u32, u32), Vec<u32>> = BTreeMap::new();
        for (size, samples) in parts.into_iter().flatten() {
            all.entry(size).or_default().extend(samples);
        }
        all.into_iter().map(|(size, samples)| Bucket { size, samples }).collect()
    }

    /// Images, visits, enlargement and crop loss of each bucket.
    pub fn bucket_counts(&self) -> Vec<BucketCount> {
        let count = |bucket: &Bucket| {
            let members = || bucket.samples.iter().filter_map(|&s| self.row(s).ok());
            let mut count = BucketCount { size: bucket.size, images: bucket.samples.len(), visits: 0, enlarged: 0, crop_loss: 0.0 };
            for s in members() {
                count.visits += u64::from(s.repeats);
                count.enlarged += usize::from(s.placement.resized.0 > s.size.0 || s.placement.resized.1 > s.size.1);
                count.crop_loss += s.placement.crop_loss();
            }
            count.crop_loss /= bucket.samples.len() as f64;
            count
        };
        self.buckets.par_iter().map(count).collect()
    }

    /// The order of one epoch (counted from 0).
    ///
    /// # Errors
    /// [`Error::Config`] if `batch_size` is 0.
    pub fn plan(&self, seed: u64, epoch: u64, batch_size: usize) -> Result<BatchPlan> {
        let repeats = |s: u32| match self.rows.at(s) {
            Ok(At::Listed(sample)) => sample.repeats,
            Ok(At::Indexed { repeats, .. }) => repeats,
            Err(_) => 0,
        };
        let contents =
            |bucket: &Bucket| BucketContents { size: bucket.size, samples: bucket.samples.iter().map(|&s| (s, repeats(s))).collect() };
        BatchPlan::new(seed, epoch, &self.buckets.iter().map(contents).collect::<Vec<_>>(), batch_size)
    }

    /// A hash (blake3, hex) of what training sees of the dataset short of the images' bytes: names, lengths, sizes,
    /// places, repeats, captions and the configuration; for an index its own fingerprint, the rules for captions and what was
    /// selected. The folders' own paths do not enter, so a dataset may be moved.
    pub fn fingerprint(&self) -> String {
        let mut config = self.config.clone();
        config.subsets.iter_mut().for_each(|s| (s.image_dir, s.index) = (PathBuf::new(), s.index.as_ref().map(|_| PathBuf::new())));
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"lokr dataset 1");
        // Strings are hashed with their length in front, so that no two lists of strings run together.
        let mut text = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        };
        text(format!("{config:?}").as_bytes());
        for segment in self.rows.segments() {
            match segment {
                Segment::Listed(samples) => {
                    for s in samples {
                        let name = s.path.strip_prefix(&self.config.subsets[s.subset].image_dir).unwrap_or(&s.path);
                        text(name.as_os_str().as_encoded_bytes());
                        text(s.caption.as_bytes());
                        let len = storage::file_len(&s.path).unwrap_or_default();
                        text(format!("{} {} {:?} {:?} {len}", s.subset, s.repeats, s.size, s.placement).as_bytes());
                    }
                }
                Segment::Indexed { source, .. } => {
                    text(source.index.fingerprint().unwrap_or_default().as_bytes());
                    text(format!("{:?}", source.captioner.rules()).as_bytes());
                    for rows in source.rows.chunks(CHUNK) {
                        let words = rows.iter().flat_map(|r| [r.id, r.size.0, r.size.1]).flat_map(u32::to_le_bytes);
                        text(&words.collect::<Vec<_>>());
                    }
                }
            }
        }
        hasher.finalize().to_hex().to_string()
    }

    pub(crate) fn bucket_of(&self, row: &SampleRow) -> &[u32] {
        let found = self.buckets.binary_search_by_key(&row.placement.bucket, |b| b.size);
        found.map_or(&[], |i| &self.buckets[i].samples)
    }
}

/// The samples of a subset that is a folder.
fn list(config: &DatasetConfig, rule: &Buckets, number: usize, report: &mut Report) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for item in source::scan(config, number, report)? {
        match place(rule, config, item.size) {
            Ok(placement) => {
                let Item { path, subset, repeats, size, caption } = item;
                samples.push(Sample { path, subset, repeats, size, placement, caption });
            }
            Err(source) => report.reject(config.on_broken_image, Error::Image { path: item.path, source })?,
        }
    }
    Ok(samples)
}

/// Takes out of an index's rows what no bucket can take.
fn leave_out_misfits(config: &DatasetConfig, rule: &Buckets, source: &mut Indexed, report: &mut Report) -> Result<()> {
    let misfits: Vec<(u32, DecodeError)> =
        source.rows.par_iter().filter_map(|row| place(rule, config, row.size).err().map(|why| (row.id, why))).collect();
    let mut out = misfits.iter().map(|(id, _)| *id).collect::<Vec<_>>().into_iter().peekable();
    source.rows.retain(|row| out.next_if_eq(&row.id).is_none());
    for (id, why) in misfits {
        report.reject(config.on_broken_image, Error::Image { path: source.name(id), source: why })?;
    }
    Ok(())
}

/// Where an image goes, or why it cannot.
fn place(rule: &Buckets, config: &DatasetConfig, size: (u32, u32)) -> std::result::Result<Placement, DecodeError> {
    let (width, height) = size;
    let placement = rule.place(size).ok_or(DecodeError::TooSmall { width, height, steps: config.bucket_reso_steps })?;
    if placement.is_too_narrow() {
        return Err(DecodeError::TooNarrow { size, bucket: placement.bucket });
    }
    Ok(placement)
}
