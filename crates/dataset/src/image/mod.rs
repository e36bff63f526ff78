//! From the bytes of an image file to the pixels that a VAE takes: sniffed, decoded, turned by EXIF, put on white,
//! resized, cropped, mirrored, scaled to -1..1.
//!
//! Where this differs from sd-scripts (`library/train_util.py` `load_image`), it does so for the picture that a viewer
//! shows: EXIF orientation is applied (there ignored), transparency is put on white (there the hidden colour shows),
//! 16-bit grey is scaled (there it turns white). Colour profiles are ignored, as there.
//!
//! Left to others: which file, bucket and crop (`source`, `bucket`, `Dataset`).

mod decode;
mod resize;

pub use decode::{Format, Header, MAX_PIXELS, decode, probe};
pub use resize::resize;

use ::image::RgbImage;

use crate::config::Interpolation;
use crate::{CropCondition, Placement, bucket};

/// Why an image cannot be used. Says nothing of the path: [`crate::Error::Image`] does.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The file cannot be read.
    #[error(transparent)]
    Read(#[from] storage::Error),
    /// The index cannot tell where it is.
    #[error("its place is not known: {what}")]
    NoPlace {
        /// What went wrong.
        what: String,
    },
    /// The file has no bytes.
    #[error("the file is empty")]
    Empty,
    /// The first bytes are of none of the formats.
    #[error("the content is not png, jpeg, webp or bmp{}", looks_like.map(|l| format!(" but {l}")).unwrap_or_default())]
    NotAnImage {
        /// What it is, if that can be told.
        looks_like: Option<&'static str>,
    },
    /// The decoder gave up.
    #[error("broken {format}: {what}")]
    Broken {
        /// By content, not by extension.
        format: Format,
        /// The decoder's words.
        what: String,
    },
    /// The file ends before the picture does.
    #[error("cut short: the {format} data ends before the picture does")]
    CutShort {
        /// By content, not by extension.
        format: Format,
    },
    /// More pixels than [`MAX_PIXELS`].
    #[error("{width}x{height} pixels are more than {MAX_PIXELS}")]
    TooLarge {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// So long and narrow that next to nothing of it fits any bucket.
    #[error("{}x{} pixels are too long and narrow: cropping to {}x{} would leave less than 1/{} of them", size.0, size.1, bucket.0, bucket.1, Placement::MAX_CROP)]
    TooNarrow {
        /// Width and height.
        size: (u32, u32),
        /// The closest bucket.
        bucket: (u32, u32),
    },
    /// A moving picture.
    #[error("it is animated")]
    Animated,
    /// With `bucket_no_upscale`: a side is shorter than `bucket_reso_steps`.
    #[error("{width}x{height} pixels leave nothing when floored to bucket_reso_steps = {steps} (bucket_no_upscale = true)")]
    TooSmall {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// `bucket_reso_steps`.
        steps: u32,
    },
    /// The file was replaced while the run goes on.
    #[error("its size changed from {}x{} to {}x{} since the start", before.0, before.1, now.0, now.1)]
    Changed {
        /// Width and height when the dataset was opened.
        before: (u32, u32),
        /// Width and height now.
        now: (u32, u32),
    },
}

/// The pixels of one visit, and what the network is told about them.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// `[3, height, width]`, red, green, blue, -1 to 1.
    pub data: Vec<f32>,
    /// Width and height of the file, after EXIF orientation.
    pub original_size: (u32, u32),
    /// Left and top as the network is told them (by `crop_condition`).
    pub crop_left_top: (u32, u32),
    /// Width and height of `data`.
    pub target_size: (u32, u32),
}

impl Pixels {
    /// SDXL's size conditioning of these pixels, see [`time_ids`].
    pub fn time_ids(&self) -> [u32; 6] {
        time_ids(self.original_size, self.crop_left_top, self.target_size)
    }
}

/// SDXL's size conditioning in the order the network takes it: original height, original width, crop top, crop left,
/// target height, target width (facts 2.7; arguments are (width, height) and (left, top)).
pub fn time_ids(original: (u32, u32), crop_left_top: (u32, u32), target: (u32, u32)) -> [u32; 6] {
    [original.1, original.0, crop_left_top.1, crop_left_top.0, target.1, target.0]
}

/// The (left, top) that the network is told. `pixel_crop` is the crop's place in the resized image before mirroring;
/// `size` is the image's.
pub fn crop_condition(rule: CropCondition, placement: Placement, size: (u32, u32), pixel_crop: (u32, u32), flipped: bool) -> (u32, u32) {
    match rule {
        // A mirrored image was cropped where the mirrored crop lies.
        CropCondition::Pixel if flipped => (placement.room().0.saturating_sub(pixel_crop.0), pixel_crop.1),
        CropCondition::Pixel => pixel_crop,
        CropCondition::SdScripts => {
            let (left, top) = bucket::letterbox_left_top(placement.bucket, size, flipped);
            (left as u32, top as u32)
        }
    }
}

/// Resizes, crops at (left, top) of the resized image, mirrors the crop if `flipped`, and scales u8 to -1..1
/// (x / 255 - 0.5) / 0.5. Gives `[3, height, width]` of `placement.bucket`.
pub fn prepare(image: RgbImage, placement: Placement, crop: (u32, u32), flipped: bool, interpolation: Option<Interpolation>) -> Vec<f32> {
    let image = resize(image, placement.resized, interpolation);
    let (width, height) = (placement.bucket.0 as usize, placement.bucket.1 as usize);
    let levels: [f32; 256] = std::array::from_fn(|v| (v as f32 / 255.0 - 0.5) / 0.5);
    let mut data = vec![0.0; 3 * width * height];
    let stride = image.width() as usize * 3;
    // One channel after the other: each is written in order, and a row of pixels stays in the cache meanwhile.
    let (red, others) = data.split_at_mut(width * height);
    let (green, blue) = others.split_at_mut(width * height);
    let rows = red.chunks_exact_mut(width).zip(green.chunks_exact_mut(width)).zip(blue.chunks_exact_mut(width));
    for (y, ((red, green), blue)) in rows.enumerate() {
        let start = (y + crop.1 as usize) * stride + crop.0 as usize * 3;
        let row = &image.as_raw()[start..start + width * 3];
        for (channel, to) in [red, green, blue].into_iter().enumerate() {
            for (to, pixel) in to.iter_mut().zip(row.chunks_exact(3)) {
                *to = levels[pixel[channel] as usize];
            }
            if flipped {
                to.reverse();
            }
        }
    }
    data
}
