//! What one visit sees of a sample: caption, mirroring, crop, pixels; and who takes the place of a broken one.
//!
//! # Determinism
//! A visit's mirroring and random crop are drawn in this order from one stream keyed by (seed, [`Purpose::Augment`],
//! epoch, position). A broken image is replaced by the next one of its bucket that is not broken: a function of the
//! files alone, the same on every rank and in every order of loading.

use std::collections::BTreeMap;
use std::path::Path;

use random::{Purpose, Stream};
use rayon::prelude::*;

use crate::caption::{is_dropped_whole, process_caption};
use crate::image::{DecodeError, crop_condition, decode, prepare, time_ids};
use crate::rows::{At, SampleRow};
use crate::source::chain;
use crate::{CaptionContext, Dataset, Error, ItemKey, LatentId, LatentItem, Loaded, OnBrokenImage, Pixels, Result, View};

impl Dataset {
    /// The caption of one visit: that of the file, or made of an index's tags, through [`process_caption`].
    ///
    /// # Errors
    /// [`Error::NoSuchSample`]; [`Error::Sqlite`] if an index cannot be read.
    pub fn caption(&self, sample: u32, context: CaptionContext) -> Result<String> {
        let (text, subset) = match self.rows.at(sample)? {
            At::Listed(sample) => (std::borrow::Cow::Borrowed(sample.caption.as_str()), sample.subset),
            // What is dropped anyway need not be looked up.
            At::Indexed { subset, .. } if is_dropped_whole(&self.config().subsets[subset], context) => return Ok(String::new()),
            At::Indexed { source, row, subset, .. } => (source.caption(row.id, Some(context))?.into(), subset),
        };
        Ok(process_caption(&text, &self.config().subsets[subset], context))
    }

    /// Mirroring, crop and size conditioning of one visit, without reading the image.
    ///
    /// # Errors
    /// [`Error::NoSuchSample`].
    pub fn view(&self, sample: u32, seed: u64, epoch: u64, position: u64) -> Result<View> {
        let s = self.row(sample)?;
        let subset = &self.config().subsets[s.subset];
        let mut stream = Stream::new(seed, Purpose::Augment, epoch, position);
        let flipped = subset.flip_aug && stream.uniform() < 0.5;
        let pixel_crop = if subset.random_crop {
            let (x, y) = s.placement.room();
            let left = stream.below(u64::from(x) + 1);
            (left as u32, stream.below(u64::from(y) + 1) as u32)
        } else {
            s.placement.centre_crop()
        };
        Ok(self.view_of(&s, flipped, pixel_crop))
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
            if self.is_broken(candidate) && self.config().on_broken_image == OnBrokenImage::Skip {
                return false;
            }
            let loaded = self.view(candidate, seed, epoch, position).and_then(|view| {
                let pixels = self.pixels(candidate, view)?;
                Ok(Loaded { sample: candidate, view, pixels })
            });
            let stop = loaded.is_ok() || self.config().on_broken_image == OnBrokenImage::Fail;
            outcome = stop.then_some(loaded);
            stop
        })?;
        match (found, outcome) {
            (Some(_), Some(loaded)) => loaded,
            _ => {
                let s = self.row(sample)?;
                let count = self.bucket_of(&s).len();
                Err(Error::BucketBroken { bucket: s.placement.bucket, count, path: self.name(sample) })
            }
        }
    }

    /// The pixels that a latent cache wants for a key: the centre crop, mirrored or not. No replacement is made.
    ///
    /// # Errors
    /// [`Error::Image`] if the image is broken (it is then listed in [`Dataset::broken`]).
    pub fn load_for_cache(&self, key: ItemKey) -> Result<Pixels> {
        let s = self.row(key.sample)?;
        self.pixels(key.sample, self.view_of(&s, key.flipped, s.placement.centre_crop()))
    }

    /// The first sample for which `usable` holds, starting with `sample` itself and going on through its bucket by
    /// number, cyclically. `None` if there is none.
    ///
    /// # Errors
    /// [`Error::NoSuchSample`].
    pub fn replacement(&self, sample: u32, mut usable: impl FnMut(u32) -> bool) -> Result<Option<u32>> {
        let members = self.bucket_of(&self.row(sample)?);
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
    /// file of a folder once, in parallel, to know its content; of an index's images, name, length and time stand for it.
    /// Files that cannot be read become [`Dataset::broken`].
    ///
    /// # Errors
    /// [`Error::Config`] if a subset has `random_crop`.
    pub fn latent_items(&self) -> Result<Vec<LatentItem>> {
        self.config().check_cacheable()?;
        let content = |number: u32| -> Result<String> {
            match self.rows.at(number)? {
                At::Listed(sample) => Ok(storage::blake3_file(&sample.path)?),
                At::Indexed { source, row, .. } => source.content(row.id),
            }
        };
        let contents: Vec<_> = (0..self.len() as u32).into_par_iter().map(content).collect();
        let mut items = Vec::new();
        for (number, content) in (0u32..).zip(contents) {
            let content = match content {
                Ok(content) => content,
                Err(error) => {
                    self.mark_broken(number, &self.name(number), &error);
                    continue;
                }
            };
            let sample = self.row(number)?;
            let (w, h) = sample.placement.bucket;
            let flips: &[bool] = if self.config().subsets[sample.subset].flip_aug { &[false, true] } else { &[false] };
            let (crop, method) = (sample.placement.centre_crop(), self.config().resize_interpolation);
            items.extend(flips.iter().map(|&flipped| LatentItem {
                key: ItemKey { sample: number, flipped },
                id: LatentId::new(&content, sample.placement, crop, flipped, method),
                shape: [4, h as usize / 8, w as usize / 8],
            }));
        }
        Ok(items)
    }

    fn view_of(&self, s: &SampleRow, flipped: bool, pixel_crop: (u32, u32)) -> View {
        let crop_left_top = crop_condition(self.config().crop_condition, s.placement, s.size, pixel_crop, flipped);
        View { flipped, pixel_crop, crop_left_top, time_ids: time_ids(s.size, crop_left_top, s.placement.bucket) }
    }

    fn pixels(&self, number: u32, view: View) -> Result<Pixels> {
        let at = self.rows.at(number)?;
        self.try_pixels(&at, view).map_err(|source| {
            let path = at.name();
            self.mark_broken(number, &path, &source);
            Error::Image { path, source }
        })
    }

    fn try_pixels(&self, at: &At<'_>, view: View) -> std::result::Result<Pixels, DecodeError> {
        let s = at.row(&self.rule);
        let image = decode(&at.read()?)?;
        if image.dimensions() != s.size {
            return Err(DecodeError::Changed { before: s.size, now: image.dimensions() });
        }
        let data = prepare(image, s.placement, view.pixel_crop, view.flipped, self.config().resize_interpolation);
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
