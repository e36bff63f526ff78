//! Decoding against what PIL shows, resizing against PIL and OpenCV (tests/golden/make.py), and the way to pixels.

use ::image::RgbImage;
use dataset::image::{Format, decode, prepare, probe, resize};
use dataset::{Interpolation, Placement};
use serde_json::Value;

fn hex(text: &Value) -> Vec<u8> {
    let text = text.as_str().unwrap();
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(super::own_golden(name)).unwrap()).unwrap()
}

fn largest_difference(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| a.abs_diff(b)).max().unwrap()
}

/// Every picture decodes to what PIL shows of it: turned by EXIF, on white, grey and 16 bits included.
#[test]
fn every_format_and_peculiarity() {
    let pictures = json("pictures.json");
    let pictures = pictures.as_object().unwrap();
    assert_eq!(pictures.len(), 27);
    for (name, expected) in pictures {
        let bytes = std::fs::read(super::own_golden(name)).unwrap();
        let (header, image) = (probe(&bytes).unwrap(), decode(&bytes).unwrap());
        let size = (expected["size"][0].as_u64().unwrap() as u32, expected["size"][1].as_u64().unwrap() as u32);
        assert_eq!((header.size, image.dimensions()), (size, size), "{name}");
        // Lossless formats and WebP (the same library): exact; blending rounds once where PIL rounds twice. JPEG decoders
        // may differ by a level in the inverse DCT, and by more in chroma upsampling next to a hard edge (measured: 3).
        let tolerance = match name.as_str() {
            "alpha.png" | "alpha.webp" | "grey-alpha.png" => 1,
            "subsampled.jpg" => 4,
            n if n.ends_with(".jpg") => 2,
            _ => 0,
        };
        let difference = largest_difference(image.as_raw(), &hex(&expected["rgb"]));
        assert!(difference <= tolerance, "{name}: differs by {difference}, allowed {tolerance}");
    }
}

#[test]
fn the_content_decides_not_the_extension() {
    let bytes = |name: &str| std::fs::read(super::own_golden(name)).unwrap();
    let formats = ["rgb.png", "full.jpg", "lossy.webp", "rgb.bmp"].map(|n| probe(&bytes(n)).unwrap().format);
    assert_eq!(formats, [Format::Png, Format::Jpeg, Format::WebP, Format::Bmp]);
    let dir = super::folder(&[("a.jpg", &bytes("rgb.png")), ("b.png", &bytes("full.jpg")), ("c.bmp", &bytes("lossy.webp"))]);
    let (dataset, report) = dataset::Dataset::open(&super::small_config(dir.path())).unwrap();
    assert_eq!((report.images_used, report.broken_images.count), (3, 0));
    (0..3).for_each(|s| assert_eq!(dataset.load_pixels(s, 0, 0, 0).unwrap().sample, s));
}

/// make.py's `rough`.
fn rough() -> RgbImage {
    RgbImage::from_fn(32, 24, |x, y| ::image::Rgb([0, 1, 2].map(|c| ((x * x * 7 + y * y * 13 + x * y * 5 + c * 101) % 256) as u8)))
}

#[test]
fn resizing_equals_pil_and_opencv() {
    let cases = json("resize.json");
    for case in cases.as_array().unwrap() {
        let size = (case["size"][0].as_u64().unwrap() as u32, case["size"][1].as_u64().unwrap() as u32);
        let method: Interpolation = serde_json::from_value(case["method"].clone()).unwrap();
        // One level: rounding (fixed point in PIL, fast_image_resize and OpenCV, each its own). At the border OpenCV's
        // cubic repeats the last pixel, fast_image_resize's leaves it out.
        let tolerance = match method {
            Interpolation::Nearest => 0,
            Interpolation::Cubic => 4,
            _ => 1,
        };
        let mut source = rough();
        if method == Interpolation::Cubic {
            source.iter_mut().for_each(|v| *v = (*v >> 2) + 96);
        }
        let difference = largest_difference(resize(source, size, Some(method)).as_raw(), &hex(&case["rgb"]));
        assert!(difference <= tolerance, "{method:?} to {size:?}: differs by {difference}, allowed {tolerance}");
    }
}

#[test]
fn without_a_method_area_shrinks_and_lanczos_enlarges() {
    let by = |size, method| resize(rough(), size, method).into_raw();
    for (size, method) in [
        ((21, 15), Interpolation::Area),
        ((32, 7), Interpolation::Area),
        ((50, 37), Interpolation::Lanczos),
        ((40, 15), Interpolation::Lanczos),
    ] {
        assert_eq!(by(size, None), by(size, Some(method)), "{size:?}");
    }
    assert_ne!(by((21, 15), None), by((21, 15), Some(Interpolation::Lanczos)));
    assert_eq!(by((32, 24), None), rough().into_raw());
}

#[test]
fn crop_flip_and_scale() {
    // A level that names the pixel: 8 x + y, 64 + .., 128 + ...
    let image = RgbImage::from_fn(6, 5, |x, y| ::image::Rgb([0, 64, 128].map(|c| (c + 8 * x + y) as u8)));
    let placement = Placement { bucket: (4, 3), resized: (6, 5) };
    let level = |v: u32| (v as f32 / 255.0 - 0.5) / 0.5;
    for flipped in [false, true] {
        let data = prepare(image.clone(), placement, (2, 1), flipped, None);
        assert_eq!(data.len(), 3 * 3 * 4);
        for (i, &value) in data.iter().enumerate() {
            let (c, y, x) = (i / 12, i / 4 % 3, i % 4);
            let x = 2 + if flipped { 3 - x } else { x };
            assert_eq!(value, level((64 * c + 8 * x + y + 1) as u32), "channel {c}, flipped {flipped}");
        }
    }
    assert_eq!((level(0), level(255)), (-1.0, 1.0));
}
