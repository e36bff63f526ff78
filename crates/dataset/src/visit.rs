//! What one visit sees of a sample: caption, mirroring, crop, pixels; and who takes the place of a broken one. Cached
//! latents are in `latents`.
//!
//! # Determinism
//! A visit's mirroring and random crop are drawn in this order from one stream keyed by (seed, [`Purpose::Augment`],
//! epoch, position). A broken image is replaced by the next one of its bucket that is not broken: a function of the
//! files alone, the same on every rank and in every order of loading.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;

use random::{Purpose, Stream};

use crate::caption::{is_dropped_whole, process_caption};
use crate::image::{DecodeError, crop_condition, decode, prepare, time_ids};
use crate::rows::{At, SampleRow};
use crate::source::chain;
use crate::{CaptionContext, Dataset, Error, ItemKey, Loaded, OnBrokenImage, Pixels, Result, View};

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
    /// [`Error::BucketBroken`] if no image of the bucket can be used, [`Error::TooManyBroken`] if more than
    /// `max_broken_share` of those that were asked for cannot; with `on_broken_image = "fail"` already [`Error::Image`].
    pub fn load_pixels(&self, sample: u32, seed: u64, epoch: u64, position: u64) -> Result<Loaded> {
        self.first_usable(sample, |candidate| {
            let view = self.view(candidate, seed, epoch, position)?;
            let pixels = self.pixels(candidate, view)?;
            Ok(Loaded { sample: candidate, view, pixels })
        })
    }

    /// What `load` gives of the first sample for which it does not fail with [`Error::Image`], in the order of
    /// [`Dataset::replacement`].
    pub(crate) fn first_usable<T>(&self, sample: u32, load: impl Fn(u32) -> Result<T>) -> Result<T> {
        let skips = self.config().on_broken_image == OnBrokenImage::Skip;
        self.asked_for.fetch_add(1, Ordering::Relaxed);
        let mut outcome = None;
        self.replacement(sample, |candidate| {
            if skips && self.is_broken(candidate) {
                return false;
            }
            outcome = match load(candidate) {
                Err(Error::Image { path, .. }) if skips => self.too_many_broken(&path).map(Err),
                other => Some(other),
            };
            outcome.is_some()
        })?;
        outcome.unwrap_or_else(|| {
            let s = self.row(sample)?;
            let count = self.bucket_of(&s).len();
            Err(Error::BucketBroken { bucket: s.placement.bucket, count, path: self.name(sample) })
        })
    }

    /// The error that ends the run, once more than `max_broken_share` are broken.
    fn too_many_broken(&self, last: &Path) -> Option<Error> {
        let broken = self.broken.lock().unwrap_or_else(|e| e.into_inner()).len();
        let asked_for = self.asked_for.load(Ordering::Relaxed).min(self.len() as u64) as usize;
        self.config().too_many_broken(broken, asked_for, last.display().to_string())
    }

    /// The pixels that a latent cache wants for a key: the centre crop, mirrored or not. No replacement is made.
    ///
    /// # Errors
    /// [`Error::Image`] if the image is broken (it is then listed in [`Dataset::broken`]), [`Error::TooManyBroken`].
    pub fn load_for_cache(&self, key: ItemKey) -> Result<Pixels> {
        self.asked_for.fetch_add(1, Ordering::Relaxed);
        self.cache_pixels(key).map_err(|error| match error {
            Error::Image { path, source } => self.too_many_broken(&path).unwrap_or(Error::Image { path, source }),
            error => error,
        })
    }

    pub(crate) fn cache_pixels(&self, key: ItemKey) -> Result<Pixels> {
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

    fn view_of(&self, s: &SampleRow, flipped: bool, pixel_crop: (u32, u32)) -> View {
        let crop_left_top = crop_condition(self.config().crop_condition, s.placement, s.size, pixel_crop, flipped);
        View { flipped, pixel_crop, crop_left_top, time_ids: time_ids(s.size, crop_left_top, s.placement.bucket) }
    }

    fn pixels(&self, number: u32, view: View) -> Result<Pixels> {
        let at = self.rows.at(number)?;
        self.try_pixels(&at, view).map_err(|source| {
            self.mark_broken(number, &at, &source);
            Error::Image { path: at.name(), source }
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

    pub(crate) fn mark_broken(&self, number: u32, at: &At<'_>, error: &dyn std::error::Error) {
        let mut broken = self.broken.lock().unwrap_or_else(|e| e.into_inner());
        broken.entry(number).or_insert_with(|| {
            let reason = chain(error);
            let id = at.id().map_or_else(String::new, |id| format!("{id} "));
            tracing::warn!("image {id}`{}` cannot be used: {reason}", at.name().display());
            reason
        });
    }
}
