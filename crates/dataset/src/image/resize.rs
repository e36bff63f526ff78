//! Resizing by sd-scripts' rule (`library/utils.py` `resize_image`): area averaging (OpenCV's INTER_AREA) where neither
//! side grows, PIL's Lanczos otherwise; or one method for all.
//!
//! Area averaging is written here, because `fast_image_resize`'s box filter (as PIL's) counts a pixel wholly or not at
//! all, while INTER_AREA counts the covered part of it. The golden test compares both with their originals.

use ::image::RgbImage;
use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{Filter, FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use crate::config::Interpolation;

/// Resizes to (width, height), both at least 1. `method` absent: area where neither side grows, else Lanczos.
pub fn resize(image: RgbImage, size: (u32, u32), method: Option<Interpolation>) -> RgbImage {
    if image.dimensions() == size || size.0 == 0 || size.1 == 0 || image.is_empty() {
        return image;
    }
    let shrinks = size.0 <= image.width() && size.1 <= image.height();
    let algorithm = match method {
        None | Some(Interpolation::Area) if shrinks => return area(&image, size),
        None | Some(Interpolation::Lanczos) => ResizeAlg::Convolution(FilterType::Lanczos3),
        Some(Interpolation::Box) => ResizeAlg::Convolution(FilterType::Box),
        Some(Interpolation::Area | Interpolation::Linear) => ResizeAlg::Interpolation(FilterType::Bilinear),
        Some(Interpolation::Cubic) => ResizeAlg::Interpolation(FilterType::Custom(cubic())),
        Some(Interpolation::Nearest) => ResizeAlg::Nearest,
    };
    // Across, then down, as PIL: u8 is cut to 0..255 in between, so the order shows.
    let across = by_filter(&image, (size.0, image.height()), algorithm);
    by_filter(&across, size, algorithm)
}

fn by_filter(image: &RgbImage, (width, height): (u32, u32), algorithm: ResizeAlg) -> RgbImage {
    if image.dimensions() == (width, height) {
        return image.clone();
    }
    let source = ImageRef::new(image.width(), image.height(), image.as_raw(), PixelType::U8x3);
    let source = source.expect("the buffer of an RgbImage has the size of its pixels, and bytes need no alignment");
    let mut target = Image::new(width, height, PixelType::U8x3);
    let options = ResizeOptions::new().resize_alg(algorithm);
    Resizer::new().resize(&source, &mut target, &options).expect("both images are U8x3 and the whole source is taken");
    RgbImage::from_raw(width, height, target.into_vec()).expect("the target was made with this size")
}

/// OpenCV's cubic: Keys 1981, equation 4, with a = -0.75 (Catmull-Rom has -0.5).
fn cubic() -> Filter {
    const A: f64 = -0.75;
    let kernel = |x: f64| match x.abs() {
        x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        x if x < 2.0 => ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A,
        _ => 0.0,
    };
    Filter::new("cubic", kernel, 2.0).expect("the support is finite and positive")
}

/// The source pixels that one target pixel covers along an axis: the first, and the part of the target that each fills.
struct Cover {
    first: usize,
    weights: Vec<f32>,
}

fn covers(source: u32, target: u32) -> Vec<Cover> {
    let scale = f64::from(source) / f64::from(target);
    let cover = |i: u32| {
        let (low, high) = (f64::from(i) * scale, f64::from(i + 1) * scale);
        let (first, last) = (low as usize, (high.ceil() as usize).min(source as usize));
        let part = |x: usize| ((high.min((x + 1) as f64) - low.max(x as f64)) / scale) as f32;
        Cover { first, weights: (first..last).map(part).collect() }
    };
    (0..target).map(cover).collect()
}

/// Mean over the covered area. Rows first: that pass runs along memory and leaves fewer rows for the second.
fn area(image: &RgbImage, (width, height): (u32, u32)) -> RgbImage {
    let stride = image.width() as usize * 3;
    let columns = covers(image.width(), width);
    let mut line = vec![0f32; stride];
    let mut out = Vec::with_capacity(width as usize * height as usize * 3);
    for row in covers(image.height(), height) {
        line.fill(0.0);
        let rows = image.as_raw()[row.first * stride..].chunks_exact(stride);
        for (pixels, &weight) in rows.zip(&row.weights) {
            for (sum, &value) in line.iter_mut().zip(pixels) {
                *sum += weight * f32::from(value);
            }
        }
        for column in &columns {
            let mut sum = [0f32; 3];
            for (pixel, &weight) in line[column.first * 3..].chunks_exact(3).zip(&column.weights) {
                for (s, &value) in sum.iter_mut().zip(pixel) {
                    *s += weight * value;
                }
            }
            out.extend(sum.map(|s| (s + 0.5) as u8));
        }
    }
    RgbImage::from_raw(width, height, out).expect("width x height pixels were written")
}
