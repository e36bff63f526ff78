//! Aspect ratio buckets by sd-scripts' rules (`library/model_util.py` `make_bucket_resolutions`,
//! `library/train_util.py` `BucketManager`), equal to them bit for bit: the arithmetic is Python's, in f64, in its order.
//!
//! Left to others: which images there are (`source`), what the resized pixels look like (`image`).

use crate::DatasetConfig;

/// The set of buckets of one configuration, and the rule that finds an image's place among them.
#[derive(Debug, Clone)]
pub struct Buckets {
    rule: Rule,
}

#[derive(Debug, Clone)]
enum Rule {
    /// One of these sizes, sorted by (width, height); beside them their different aspect ratios, ascending, each with the
    /// place of the first size that has it.
    Nearest(Vec<(u32, u32)>, Vec<(f64, usize)>),
    /// The image's own size, shrunk to `area` where larger, floored to `steps`.
    NoUpscale { area: u64, steps: u32 },
}

/// Where an image goes: it is resized to `resized`, then cropped to `bucket`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Placement {
    /// Width and height of the batch's images.
    pub bucket: (u32, u32),
    /// Width and height before the crop; no side is smaller than the bucket's.
    pub resized: (u32, u32),
}

impl Buckets {
    /// The buckets of a configuration that [`DatasetConfig::check`] accepts.
    pub fn new(config: &DatasetConfig) -> Self {
        let (w, h) = config.resolution;
        let area = u64::from(w) * u64::from(h);
        let steps = config.bucket_reso_steps;
        let rule = if !config.enable_bucket {
            Rule::nearest(vec![config.resolution])
        } else if config.bucket_no_upscale {
            Rule::NoUpscale { area, steps }
        } else {
            let (min, max) = config.bucket_range();
            Rule::nearest(bucket_sizes(area, min, max, steps))
        };
        Self { rule }
    }

    /// The sizes of the set, sorted by (width, height); empty with `bucket_no_upscale`, where any size may arise.
    pub fn sizes(&self) -> &[(u32, u32)] {
        match &self.rule {
            Rule::Nearest(sizes, _) => sizes,
            Rule::NoUpscale { .. } => &[],
        }
    }

    /// Where an image of `size` goes; `None` where the rule leaves nothing of it (`bucket_no_upscale` with a side below
    /// `bucket_reso_steps`).
    pub fn place(&self, size: (u32, u32)) -> Option<Placement> {
        if size.0 == 0 || size.1 == 0 {
            return None;
        }
        match &self.rule {
            Rule::Nearest(sizes, ratios) => nearest(sizes, ratios, size),
            Rule::NoUpscale { area, steps } => no_upscale(*area, *steps, size),
        }
    }
}

/// `make_bucket_resolutions`: for each width the largest height within the area, both ways round, and the square.
fn bucket_sizes(area: u64, min: u32, max: u32, steps: u32) -> Vec<(u32, u32)> {
    let square = ((area as f64).sqrt() / f64::from(steps)) as u32 * steps;
    let mut sizes = vec![(square, square)];
    for width in (min..=max).step_by(steps as usize) {
        let height = (area / u64::from(width) / u64::from(steps) * u64::from(steps)).min(u64::from(max)) as u32;
        if height >= min {
            sizes.extend([(width, height), (height, width)]);
        }
    }
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

fn ratio((w, h): (u32, u32)) -> f64 {
    f64::from(w) / f64::from(h)
}

/// Python's `int(x + 0.5)` for x >= 0.
fn round(x: f64) -> u32 {
    (x + 0.5) as u32
}

impl Rule {
    fn nearest(sizes: Vec<(u32, u32)>) -> Self {
        let mut ratios: Vec<(f64, usize)> = sizes.iter().map(|&size| ratio(size)).zip(0..).collect();
        ratios.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        ratios.dedup_by_key(|r| r.0);
        Rule::Nearest(sizes, ratios)
    }
}

fn nearest(sizes: &[(u32, u32)], ratios: &[(f64, usize)], size: (u32, u32)) -> Option<Placement> {
    let aspect = ratio(size);
    let bucket = if sizes.binary_search(&size).is_ok() {
        size
    } else {
        // The closest ratio is a neighbour of the image's. Of equal errors the first size wins, as with numpy's argmin.
        let above = ratios.partition_point(|r| r.0 < aspect);
        let neighbours = &ratios[above.saturating_sub(1)..(above + 1).min(ratios.len())];
        let error = |r: &(f64, usize)| ((r.0 - aspect).abs(), r.1);
        let closest = neighbours.iter().map(error).min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)))?;
        sizes[closest.1]
    };
    let scale = if aspect > ratio(bucket) { f64::from(bucket.1) / f64::from(size.1) } else { f64::from(bucket.0) / f64::from(size.0) };
    Some(Placement { bucket, resized: (round(f64::from(size.0) * scale), round(f64::from(size.1) * scale)) })
}

fn no_upscale(area: u64, steps: u32, size: (u32, u32)) -> Option<Placement> {
    let floor = |x: u32| x / steps * steps;
    let resized = if u64::from(size.0) * u64::from(size.1) > area {
        let aspect = ratio(size);
        let width = (area as f64 * aspect).sqrt();
        let height = area as f64 / width;
        // Two candidates: round the width and derive the height, or the other way; the closer ratio wins.
        let (w1, h2) = (floor(round(width)), floor(round(height)));
        if w1 == 0 || h2 == 0 {
            return None;
        }
        let (h1, w2) = (floor(round(f64::from(w1) / aspect)), floor(round(f64::from(h2) * aspect)));
        if h1 == 0 || w2 == 0 {
            return None;
        }
        if (ratio((w1, h1)) - aspect).abs() < (ratio((w2, h2)) - aspect).abs() {
            (w1, round(f64::from(w1) / aspect))
        } else {
            (round(f64::from(h2) * aspect), h2)
        }
    } else {
        size
    };
    let bucket = (floor(resized.0), floor(resized.1));
    (bucket.0 > 0 && bucket.1 > 0).then_some(Placement { bucket, resized })
}

impl Placement {
    /// How many times larger than the bucket a resized image may be: beyond it the picture is a line, and enlarging it to
    /// cover the bucket would take gigabytes.
    pub const MAX_CROP: u64 = 64;

    /// Whether the crop would leave less than 1/64 of the image.
    pub fn is_too_narrow(&self) -> bool {
        let area = |(w, h): (u32, u32)| u64::from(w) * u64::from(h);
        area(self.resized) > area(self.bucket).saturating_mul(Self::MAX_CROP)
    }

    /// Left and top of the centre crop, in pixels of the resized image.
    pub fn centre_crop(&self) -> (u32, u32) {
        let room = self.room();
        (room.0 / 2, room.1 / 2)
    }

    /// How far a crop may be moved, in pixels: (horizontally, vertically).
    pub fn room(&self) -> (u32, u32) {
        (self.resized.0.saturating_sub(self.bucket.0), self.resized.1.saturating_sub(self.bucket.1))
    }

    /// The part of the resized image that the crop takes away, 0 to 1.
    pub fn crop_loss(&self) -> f64 {
        let area = |(w, h): (u32, u32)| f64::from(w) * f64::from(h);
        1.0 - area(self.bucket) / area(self.resized)
    }
}

/// The (left, top) that sd-scripts feeds as the crop (`BucketManager.get_crop_ltrb`), before it is cut to integers:
/// the margin left when the whole image of `size` is fitted inside `bucket`. `flipped` mirrors it.
pub fn letterbox_left_top(bucket: (u32, u32), size: (u32, u32), flipped: bool) -> (f64, f64) {
    let (bw, bh) = (f64::from(bucket.0), f64::from(bucket.1));
    let aspect = ratio(size);
    let (rw, rh) = if ratio(bucket) > aspect { (bh * aspect, bh) } else { (bw, bw / aspect) };
    let (left, top) = (((bw - rw) / 2.0).floor(), ((bh - rh) / 2.0).floor());
    (if flipped { bw - (left + rw) } else { left }, top)
}
