//! The dataset's keys, their defaults (written once, in the `Default` impls) and the rules between them. Names and
//! meanings are sd-scripts' (`library/config_util.py`), so that its users know them. Two defaults differ, because
//! sd-scripts' own serve few: `caption_extension` is `.txt` (there `.caption`), `enable_bucket` is true (there false).
//!
//! Left to others: where the values come from (files, command line, import of other trainers' configs).

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

use crate::{Error, Result};

/// Where `caption_extension` is left at its default and no such file stands beside an image, this one is tried.
pub const CAPTION_FALLBACK: &str = ".caption";

/// What a dataset is made of: folders of images, and how their images become batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatasetConfig {
    /// Width and height whose product is the area of a bucket, in pixels; one number means a square.
    #[serde(deserialize_with = "one_or_two")]
    pub resolution: (u32, u32),
    /// Sort images into buckets by aspect ratio. If false, every image is scaled to cover `resolution` and cropped to it
    /// (sd-scripts refuses images of another size then).
    pub enable_bucket: bool,
    /// Never enlarge an image: its bucket is its own size, floored to `bucket_reso_steps`, where it is not larger than
    /// the area. `min_bucket_reso` and `max_bucket_reso` have no meaning then.
    pub bucket_no_upscale: bool,
    /// Shortest side of a bucket; floored to `bucket_reso_steps`.
    pub min_bucket_reso: u32,
    /// Longest side of a bucket; rounded up to `bucket_reso_steps`.
    pub max_bucket_reso: u32,
    /// Sides of buckets are multiples of this; itself a multiple of 8, the VAE's factor.
    pub bucket_reso_steps: u32,
    /// One method of resizing for all images. If absent: `area` where neither side grows, else `lanczos`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resize_interpolation: Option<Interpolation>,
    /// What happens to an image (or caption) that cannot be read.
    pub on_broken_image: OnBrokenImage,
    /// With `on_broken_image = "skip"`: the run stops once more than this share of the images that it asked for (at the start:
    /// of all images found) cannot be used, 0 to 1. Fewer than 100 images are taken for 100, so that one in a few is borne.
    pub max_broken_share: f64,
    /// Which crop the network is told.
    pub crop_condition: CropCondition,
    /// The folders.
    pub subsets: Vec<SubsetConfig>,
}

/// One folder of images (or the images of an index) and what is done with its captions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SubsetConfig {
    /// The folder. Images directly inside are read, and those in subfolders named `N_name` (sd-scripts' form: N repeats,
    /// class tokens "name"). With `index`: where the index's files lie, if not where they lay when it was built.
    pub image_dir: PathBuf,
    /// A file made by `lokr dataset index`: the images that `selection` takes of it are used, and no folder is searched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<PathBuf>,
    /// Which images of `index`: `all`, `kohaku-epsilon`, `kohaku-delta`, or the path of a TOML file.
    pub selection: String,
    /// How captions are made of the tags of `index`: `kohaku-epsilon`, `kohaku-delta`, `model-card`, `plain`, or the path
    /// of a TOML file. If absent: the image's caption, or its tags by `plain` where it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_rules: Option<String>,
    /// How often each image is used in an epoch; multiplies the N of `N_name` folders.
    pub num_repeats: u32,
    /// Extension of caption files, with its dot. At the default, `.caption` is tried too.
    pub caption_extension: String,
    /// The caption of images that have no caption file; for `N_name` folders the default is their name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class_tokens: Option<String>,
    /// Shuffle the tags behind the kept ones.
    pub shuffle_caption: bool,
    /// The first so many tags are neither shuffled nor dropped.
    pub keep_tokens: usize,
    /// A text as `|||`: tags before its first occurrence (and after a second) are neither shuffled nor dropped. Where it
    /// occurs, `keep_tokens` has no meaning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_tokens_separator: Option<String>,
    /// Separates tags.
    pub caption_separator: String,
    /// Separates tags that are shuffled and dropped together; becomes `caption_separator` at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secondary_separator: Option<String>,
    /// Put before the caption, with a blank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_prefix: Option<String>,
    /// Put after the caption, with a blank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_suffix: Option<String>,
    /// Probability that the whole caption is empty, 0 to 1.
    pub caption_dropout_rate: f64,
    /// Every so many epochs, all captions are empty; 0: never.
    pub caption_dropout_every_n_epochs: u64,
    /// Probability that a tag behind the kept ones is left out, 0 to 1.
    pub caption_tag_dropout_rate: f64,
    /// Tags (behind the kept ones) that a caption has at step 0 of the warmup.
    pub token_warmup_min: u64,
    /// Optimizer steps after which all tags are present; below 1: this fraction of all steps; 0: no warmup.
    pub token_warmup_step: f64,
    /// A random line of the caption, and in it one alternative of each `{a|b|c}`.
    pub enable_wildcard: bool,
    /// Mirror each sample with probability 1/2.
    pub flip_aug: bool,
    /// Crop at a random place instead of the centre. Latents cannot be cached then.
    pub random_crop: bool,
}

/// What happens to an image or caption that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnBrokenImage {
    /// It is left out (or, while training, replaced by the next image of its bucket), named and counted.
    Skip,
    /// It ends the run.
    Fail,
}

/// What the network is told as the crop's top left corner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CropCondition {
    /// Where the pixels were cropped, in pixels of the resized image (Podell et al. 2023, SDXL, section 2.2).
    Pixel,
    /// What sd-scripts feeds: the margin that would be left if the whole image were fitted inside the bucket.
    SdScripts,
}

/// A method of resizing, by sd-scripts' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Interpolation {
    /// Lanczos with three lobes, widened when shrinking (as PIL).
    Lanczos,
    /// Mean over the pixels whose centres are covered (as PIL).
    Box,
    /// Mean over the covered area, parts of pixels included (as OpenCV's INTER_AREA); linear where a side grows.
    Area,
    /// Between the two nearest pixels of each axis, not widened when shrinking (as OpenCV).
    Linear,
    /// Cubic, not widened when shrinking (as OpenCV, but overshoots of the first axis are cut).
    Cubic,
    /// The nearest pixel.
    Nearest,
}

impl Default for DatasetConfig {
    fn default() -> Self {
        Self {
            resolution: (1024, 1024),
            enable_bucket: true,
            bucket_no_upscale: false,
            min_bucket_reso: 256,
            max_bucket_reso: 1024,
            bucket_reso_steps: 64,
            resize_interpolation: None,
            on_broken_image: OnBrokenImage::Skip,
            max_broken_share: 0.1,
            crop_condition: CropCondition::Pixel,
            subsets: Vec::new(),
        }
    }
}

impl Default for SubsetConfig {
    fn default() -> Self {
        Self {
            image_dir: PathBuf::new(),
            index: None,
            selection: "all".into(),
            caption_rules: None,
            num_repeats: 1,
            caption_extension: ".txt".into(),
            class_tokens: None,
            shuffle_caption: false,
            keep_tokens: 0,
            keep_tokens_separator: None,
            caption_separator: ",".into(),
            secondary_separator: None,
            caption_prefix: None,
            caption_suffix: None,
            caption_dropout_rate: 0.0,
            caption_dropout_every_n_epochs: 0,
            caption_tag_dropout_rate: 0.0,
            token_warmup_min: 1,
            token_warmup_step: 0.0,
            enable_wildcard: false,
            flip_aug: false,
            random_crop: false,
        }
    }
}

impl DatasetConfig {
    /// Checks every rule that can be checked without looking at a file.
    ///
    /// # Errors
    /// [`Error::Config`] with the keys and values that break a rule; its hint says what to change.
    pub fn check(&self) -> Result<()> {
        self.check_sizes()?;
        if !(0.0..=1.0).contains(&self.max_broken_share) {
            return Err(Error::config(format!("max_broken_share = {} is no share", self.max_broken_share), "use a number from 0 to 1"));
        }
        if self.subsets.is_empty() {
            return Err(Error::config("there are no subsets", "add a [[subsets]] table with image_dir = \"...\""));
        }
        for (i, subset) in self.subsets.iter().enumerate() {
            subset.check(i)?;
            let same = |other: &SubsetConfig| {
                let of = |s: &SubsetConfig| (s.index.clone(), s.index.as_ref().map(|_| s.selection.clone()));
                of(other) == of(subset) && (subset.index.is_some() || other.image_dir == subset.image_dir)
            };
            if let Some(j) = self.subsets[..i].iter().position(same) {
                if let Some(index) = &subset.index {
                    return Err(Error::config(
                        format!("subsets[{j}] and subsets[{i}] take the same selection of the index `{}`", index.display()),
                        format!("remove one of them; to use its images more often raise num_repeats of subsets[{j}]"),
                    ));
                }
                return Err(Error::config(
                    format!("subsets[{j}] and subsets[{i}] have the same image_dir `{}`", subset.image_dir.display()),
                    format!("remove one of them; to use its images more often raise num_repeats of subsets[{j}]"),
                ));
            }
        }
        Ok(())
    }

    /// Checks that latents may be cached, which needs the same pixels at every visit.
    ///
    /// # Errors
    /// [`Error::Config`] if a subset has `random_crop`.
    pub fn check_cacheable(&self) -> Result<()> {
        match self.subsets.iter().position(|s| s.random_crop) {
            None => Ok(()),
            Some(i) => Err(Error::config(
                format!("subsets[{i}].random_crop = true excludes cache_latents: each visit would need other latents"),
                "set random_crop = false or cache_latents = false",
            )),
        }
    }

    /// The error that ends a run in which `broken` images of `of` cannot be used, if that is more than `max_broken_share`.
    pub(crate) fn too_many_broken(&self, broken: usize, of: usize, example: String) -> Option<Error> {
        const FEW: usize = 100;
        let too_many = broken as f64 > self.max_broken_share * of.max(FEW) as f64;
        too_many.then(|| Error::TooManyBroken { broken, of, share: self.max_broken_share, example })
    }

    fn check_sizes(&self) -> Result<()> {
        let (w, h) = self.resolution;
        let steps = self.bucket_reso_steps;
        if w < 8 || h < 8 || w > 16384 || h > 16384 {
            return Err(Error::config(format!("resolution = [{w}, {h}] is outside of 8 to 16384"), "SDXL is trained at about 1024x1024"));
        }
        if !self.enable_bucket {
            if self.bucket_no_upscale {
                return Err(Error::config(
                    "bucket_no_upscale = true has no meaning with enable_bucket = false",
                    "set enable_bucket = true or remove bucket_no_upscale",
                ));
            }
            if w % 8 != 0 || h % 8 != 0 {
                return Err(Error::config(
                    format!("resolution = [{w}, {h}] must be multiples of 8 with enable_bucket = false, since it is the image size itself"),
                    format!("use [{}, {}] or enable_bucket = true", w / 8 * 8, h / 8 * 8),
                ));
            }
            return Ok(());
        }
        if steps == 0 || !steps.is_multiple_of(8) {
            return Err(Error::config(
                format!("bucket_reso_steps = {steps} is not a multiple of 8, the VAE's factor"),
                "use 64, or 32 for finer buckets",
            ));
        }
        let square = (f64::from(w) * f64::from(h)).sqrt() as u32;
        if square < steps {
            return Err(Error::config(
                format!("resolution = [{w}, {h}] is smaller than bucket_reso_steps = {steps}"),
                "raise resolution or lower bucket_reso_steps",
            ));
        }
        if !self.bucket_no_upscale { self.check_min_max() } else { Ok(()) }
    }

    /// sd-scripts' `adjust_min_max_bucket_reso_by_steps`, with messages.
    fn check_min_max(&self) -> Result<()> {
        let (w, h) = self.resolution;
        let (min, max) = self.bucket_range();
        if min == 0 {
            return Err(Error::config(
                format!("min_bucket_reso = {} is smaller than bucket_reso_steps = {}", self.min_bucket_reso, self.bucket_reso_steps),
                format!("set min_bucket_reso to at least {}", self.bucket_reso_steps),
            ));
        }
        if w.min(h) < min {
            return Err(Error::config(
                format!("min_bucket_reso = {} is larger than the shorter side of resolution = [{w}, {h}]", self.min_bucket_reso),
                format!("lower min_bucket_reso (to {} or less) or raise resolution", w.min(h)),
            ));
        }
        if w.max(h) > max {
            return Err(Error::config(
                format!("max_bucket_reso = {} is smaller than the longer side of resolution = [{w}, {h}]", self.max_bucket_reso),
                format!("raise max_bucket_reso (to {} or more; twice the resolution is usual) or lower resolution", w.max(h)),
            ));
        }
        Ok(())
    }

    /// (`min_bucket_reso` floored, `max_bucket_reso` rounded up) to steps. `bucket_reso_steps` must not be 0.
    pub(crate) fn bucket_range(&self) -> (u32, u32) {
        let steps = self.bucket_reso_steps;
        (self.min_bucket_reso / steps * steps, self.max_bucket_reso.min(1 << 20).div_ceil(steps) * steps)
    }
}

impl SubsetConfig {
    /// The rules of one subset; `index` names it in messages.
    fn check(&self, index: usize) -> Result<()> {
        let fail = |key: &str, value: &dyn std::fmt::Display, rule: &str, way_out: &str| {
            Err(Error::config(format!("subsets[{index}].{key} = {value} {rule}"), way_out))
        };
        if self.index.is_none() && self.image_dir.as_os_str().is_empty() {
            return Err(Error::config(format!("subsets[{index}].image_dir is missing"), "set it to the folder that holds the images"));
        }
        let plain = Self::default();
        if self.index.is_none() && (self.selection != plain.selection || self.caption_rules.is_some()) {
            let what = format!("subsets[{index}].selection and caption_rules have no meaning without subsets[{index}].index");
            return Err(Error::config(what, "make an index with `lokr dataset index` and name it as index, or remove them"));
        }
        if self.num_repeats == 0 {
            return fail("num_repeats", &0, "would use none of the images", "set it to 1 or more, or remove the subset");
        }
        for (key, rate) in
            [("caption_dropout_rate", self.caption_dropout_rate), ("caption_tag_dropout_rate", self.caption_tag_dropout_rate)]
        {
            if !(0.0..=1.0).contains(&rate) {
                return fail(key, &rate, "is not a probability", "use a number from 0 to 1");
            }
        }
        if !(self.token_warmup_step.is_finite() && self.token_warmup_step >= 0.0) {
            return fail("token_warmup_step", &self.token_warmup_step, "is not a number of steps", "use 0, a fraction below 1, or a count");
        }
        if self.caption_separator.is_empty() {
            return fail("caption_separator", &"\"\"", "cannot separate tags", "use \",\"");
        }
        let extension = &self.caption_extension;
        if !extension.starts_with('.') || extension.len() < 2 {
            let way_out = format!("write \".{}\"", if extension.len() < 2 { "txt" } else { extension });
            return fail("caption_extension", &format_args!("{extension:?}"), "does not start with a dot", &way_out);
        }
        Ok(())
    }
}

/// `1024` or `[1024, 768]`.
fn one_or_two<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<(u32, u32), D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "resolution is a number of pixels or [width, height]")]
    enum Resolution {
        Square(u32),
        Sides(u32, u32),
    }
    Ok(match Resolution::deserialize(deserializer)? {
        Resolution::Square(side) => (side, side),
        Resolution::Sides(w, h) => (w, h),
    })
}

/// `Some` text unless it is absent or empty: sd-scripts writes "" for "none".
pub(crate) fn set(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|t| !t.is_empty())
}
