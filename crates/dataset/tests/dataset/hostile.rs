//! One named test for each way in which an image can be broken: an error with its reason, never a panic, never gigabytes.

use dataset::image::{decode, probe};
use dataset::{Dataset, DecodeError, OnBrokenImage};

fn own(name: &str) -> Vec<u8> {
    std::fs::read(super::own_golden(name)).unwrap()
}

#[test]
fn empty_file() {
    assert!(matches!(probe(&[]), Err(DecodeError::Empty)));
}

#[test]
fn not_an_image() {
    let error = |bytes: &[u8]| decode(bytes).unwrap_err().to_string();
    assert_eq!(error(b"GIF89a\x01\x00\x01\x00\x80\x00\x00"), "the content is not png, jpeg, webp or bmp but gif");
    assert_eq!(error(b"<html>404</html>"), "the content is not png, jpeg, webp or bmp but text (an error page?)");
    assert_eq!(error(b"\0\0\0\0"), "the content is not png, jpeg, webp or bmp");
}

/// Cut anywhere, a file is an error (of whichever kind); cut after its header, it has a size but no pixels.
#[test]
fn cut_anywhere() {
    for name in ["rgb.png", "full.jpg", "progressive.jpg", "lossy.webp", "alpha.webp", "rgb.bmp", "exif-6.jpg"] {
        let whole = own(name);
        // The last bytes of a PNG are its end chunk, which holds nothing; a RIFF may end with a padding byte.
        let needed = whole.len() - if name.ends_with("png") { 12 } else { 1 };
        for length in 0..needed {
            assert!(decode(&whole[..length]).is_err(), "{name} cut to {length} of {} bytes decodes", whole.len());
        }
    }
    let whole = own("full.jpg");
    assert!(probe(&whole[..whole.len() - 20]).is_ok());
    let error = decode(&whole[..whole.len() - 20]).unwrap_err();
    assert_eq!(error.to_string(), "cut short: the jpeg data ends before the picture does");
}

/// Every byte changed in turn: a result or an error, never a panic that gets out.
#[test]
fn every_byte_changed() {
    for name in ["rgb.png", "exif-6.png", "full.jpg", "exif-6.jpg", "progressive.jpg", "cmyk.jpg", "alpha.webp", "exif-8.webp", "rgb.bmp"] {
        let whole = own(name);
        for at in 0..whole.len() {
            for change in [0xFF, 0x80, 0x01] {
                let mut bytes = whole.clone();
                bytes[at] ^= change;
                // A header byte may ask for many pixels: such a size is legal, and only costs time here.
                if probe(&bytes).is_ok_and(|h| u64::from(h.size.0) * u64::from(h.size.1) < 1 << 20) {
                    let _ = decode(&bytes);
                }
            }
        }
    }
}

/// A header that asks for more than 2^28 pixels is refused before anything is allocated.
#[test]
fn huge_dimensions() {
    let mut png = own("rgb.png");
    png[16..24].copy_from_slice(&[0, 1, 0x86, 0xA0, 0, 1, 0x86, 0xA0]);
    let checksum = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&checksum.to_be_bytes());
    let mut bmp = own("rgb.bmp");
    bmp[18..26].copy_from_slice(&[0x00, 0x80, 0, 0, 0x00, 0x80, 0, 0]);
    let mut jpeg = own("full.jpg");
    let frame = jpeg.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0xFF, 0xFF, 0xFF, 0xFF]);
    for (bytes, size) in [(png, (100_000, 100_000)), (bmp, (32_768, 32_768)), (jpeg, (65_535, 65_535))] {
        match decode(&bytes) {
            Err(DecodeError::TooLarge { width, height, .. }) => assert_eq!((width, height), size),
            other => panic!("{size:?}: {other:?}"),
        }
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &b| (0..8).fold(crc ^ u32::from(b), |c, _| if c & 1 == 1 { c >> 1 ^ 0xEDB8_8320 } else { c >> 1 }))
}

/// 40,000 x 1 pixels are few, but covering the longest bucket (256x64) would take 2,560,000 x 64.
#[test]
fn extreme_aspect_ratio() {
    let dir = super::folder(&[("line.png", &super::png(40_000, 1, 0)), ("ok.png", &super::png(40, 40, 0))]);
    let (dataset, report) = Dataset::open(&super::small_config(dir.path())).unwrap();
    assert_eq!((dataset.len(), report.broken_images.count), (1, 1), "{report}");
    assert!(
        report.broken_images.first[0].contains("40000x1 pixels are too long and narrow: cropping to 256x64"),
        "{:?}",
        report.broken_images
    );
}

#[test]
fn broken_files_are_named_and_skipped_or_fatal() {
    let good = super::png(200, 100, 0);
    let dir = super::folder(&[("a.png", &good), ("b.png", b""), ("c.jpg", b"no"), ("d.png", &good[..30])]);
    let mut config = super::small_config(dir.path());
    let (dataset, report) = Dataset::open(&config).unwrap();
    assert_eq!((dataset.len(), report.images_found, report.images_used, report.broken_images.count), (1, 4, 1, 3));
    let text = report.to_string();
    assert!(text.contains("left out, image not usable: 3") && text.contains("b.png: the file is empty"), "{text}");
    config.on_broken_image = OnBrokenImage::Fail;
    let error = Dataset::open(&config).unwrap_err();
    assert!(super::chain(&error).ends_with("b.png` cannot be used: the file is empty"), "{}", super::chain(&error));
    assert!(error.hint().unwrap().contains("on_broken_image = \"skip\""));
}

#[test]
fn nothing_but_broken_images() {
    let dir = super::folder(&[("b.png", b"")]);
    let error = Dataset::open(&super::small_config(dir.path())).unwrap_err().to_string();
    assert!(error.starts_with("none of the 1 images can be used; the first is ") && error.ends_with("b.png: the file is empty"), "{error}");
}

/// The header is whole, the data is not: found while loading, replaced by the next image of the same bucket.
#[test]
fn an_image_that_breaks_while_loading_is_replaced() {
    let whole = super::png(128, 128, 1);
    let cut = &whole[..whole.len() / 2];
    let dir = super::folder(&[("a.png", cut), ("b.png", &super::png(64, 160, 2)), ("c.png", cut), ("d.png", &whole), ("e.png", cut)]);
    let mut config = super::small_config(dir.path());
    let (dataset, report) = Dataset::open(&config).unwrap();
    assert_eq!(report.images_used, 5);
    let loaded = |s| dataset.load_pixels(s, 1, 0, 9).unwrap();
    // e's successor is a, cyclically, which is broken too; b is of another bucket.
    assert_eq!([0, 1, 2, 3, 4].map(|s| loaded(s).sample), [3, 1, 3, 3, 3]);
    assert_eq!(loaded(0).pixels, loaded(3).pixels);
    assert_eq!(dataset.broken().keys().copied().collect::<Vec<_>>(), [0, 2, 4]);
    // The order of loading makes no difference.
    let (again, _) = Dataset::open(&config).unwrap();
    assert_eq!([4, 2, 0].map(|s| again.load_pixels(s, 1, 0, 9).unwrap().sample), [3, 3, 3]);

    config.on_broken_image = OnBrokenImage::Fail;
    let (strict, _) = Dataset::open(&config).unwrap();
    assert!(strict.load_pixels(3, 1, 0, 9).is_ok());
    let error = super::chain(&strict.load_pixels(0, 1, 0, 9).unwrap_err());
    assert!(error.ends_with("a.png` cannot be used: cut short: the png data ends before the picture does"), "{error}");
}

#[test]
fn a_bucket_of_broken_images_is_an_error() {
    let whole = super::png(128, 128, 1);
    let dir = super::folder(&[("a.png", &whole[..whole.len() / 2]), ("b.png", &super::png(64, 160, 2))]);
    let (dataset, _) = Dataset::open(&super::small_config(dir.path())).unwrap();
    let error = dataset.load_pixels(0, 0, 0, 0).unwrap_err().to_string();
    assert!(error.starts_with("all 1 images of bucket 128x128 are broken"), "{error}");
}

#[test]
fn an_image_replaced_during_the_run_is_noticed() {
    let dir = super::folder(&[("a.png", &super::png(128, 128, 1)), ("b.png", &super::png(128, 128, 2))]);
    let (dataset, _) = Dataset::open(&super::small_config(dir.path())).unwrap();
    std::fs::write(dir.path().join("a.png"), super::png(64, 160, 1)).unwrap();
    assert_eq!(dataset.load_pixels(0, 0, 0, 0).unwrap().sample, 1);
    assert_eq!(dataset.broken()[&0], "its size changed from 128x128 to 64x160 since the start");
    std::fs::remove_file(dir.path().join("b.png")).unwrap();
    assert!(dataset.load_pixels(1, 0, 0, 0).is_err());
    assert!(dataset.load_pixels(7, 0, 0, 0).is_err(), "a number that does not exist");
}
