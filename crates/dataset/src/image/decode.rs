//! Decoding: the format is told by the content, never by the extension; sizes are checked before anything is allocated;
//! a decoder's panic on a hostile file is an error like any other.

use std::fmt::{self, Display, Formatter};
use std::io::Cursor;
use std::panic::catch_unwind;

use ::image::metadata::Orientation;
use ::image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::DecodeError;

/// The most pixels that an image may have: 2^28, half as many again as PIL allows. Decoded, they take at most 2 GiB.
pub const MAX_PIXELS: u64 = 1 << 28;

/// A format that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// PNG, the first frame if animated.
    Png,
    /// JPEG, baseline or progressive, grey, colour or CMYK.
    Jpeg,
    /// WebP, lossy or lossless; not animated.
    WebP,
    /// Windows bitmap.
    Bmp,
}

impl Display for Format {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Png => "png",
            Format::Jpeg => "jpeg",
            Format::WebP => "webp",
            Format::Bmp => "bmp",
        })
    }
}

/// What the head of a file tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// By content.
    pub format: Format,
    /// Width and height as the picture is shown: after [`Header::orientation`].
    pub size: (u32, u32),
    /// What EXIF says is to be done to the stored pixels.
    pub orientation: Orientation,
}

/// Reads format, size and orientation from the head of a file; decodes no pixel.
///
/// # Errors
/// [`DecodeError`], in particular for sizes over [`MAX_PIXELS`].
pub fn probe(bytes: &[u8]) -> Result<Header, DecodeError> {
    let format = sniff(bytes)?;
    guarded(format, || {
        let (stored, orientation) = match format {
            Format::Jpeg => jpeg_header(&mut jpeg(bytes))?,
            Format::WebP => webp_header(bytes)?,
            Format::Png | Format::Bmp => {
                let mut decoder = reader(format, bytes).into_decoder().map_err(|e| broken(format, e))?;
                (decoder.dimensions(), decoder.orientation().unwrap_or(Orientation::NoTransforms))
            }
        };
        check_size(format, stored)?;
        let size = if swaps_sides(orientation) { (stored.1, stored.0) } else { stored };
        Ok(Header { format, size, orientation })
    })
}

/// Decodes a file to 8-bit RGB as a viewer shows it: oriented by EXIF, transparency on white, 16 bits rounded to 8.
///
/// # Errors
/// [`DecodeError`]; a file that ends early is one, even where a decoder could fill the rest with grey.
pub fn decode(bytes: &[u8]) -> Result<RgbImage, DecodeError> {
    let header = probe(bytes)?;
    let format = header.format;
    guarded(format, || {
        let image = match format {
            Format::Jpeg => decode_jpeg(bytes)?,
            Format::WebP => decode_webp(bytes)?,
            Format::Png | Format::Bmp => {
                let decoder = reader(format, bytes).into_decoder().map_err(|e| broken(format, e))?;
                on_white(DynamicImage::from_decoder(decoder).map_err(|e| broken(format, e))?)
            }
        };
        let mut image = DynamicImage::ImageRgb8(image);
        image.apply_orientation(header.orientation);
        Ok(image.into_rgb8())
    })
}

fn sniff(bytes: &[u8]) -> Result<Format, DecodeError> {
    if bytes.is_empty() {
        return Err(DecodeError::Empty);
    }
    match ::image::guess_format(bytes) {
        Ok(ImageFormat::Png) => Ok(Format::Png),
        Ok(ImageFormat::Jpeg) => Ok(Format::Jpeg),
        Ok(ImageFormat::WebP) => Ok(Format::WebP),
        Ok(ImageFormat::Bmp) => Ok(Format::Bmp),
        Ok(other) => Err(DecodeError::NotAnImage { looks_like: other.extensions_str().first().copied() }),
        Err(_) => Err(DecodeError::NotAnImage { looks_like: bytes.starts_with(b"<").then_some("text (an error page?)") }),
    }
}

/// Runs a decoder so that a panic inside it costs one image, not the run.
fn guarded<T>(format: Format, f: impl FnOnce() -> Result<T, DecodeError> + std::panic::UnwindSafe) -> Result<T, DecodeError> {
    catch_unwind(f).unwrap_or_else(|_| Err(DecodeError::Broken { format, what: "the decoder panicked".into() }))
}

fn check_size(format: Format, (width, height): (u32, u32)) -> Result<(), DecodeError> {
    if width == 0 || height == 0 {
        return Err(DecodeError::Broken { format, what: format!("its header says {width}x{height} pixels") });
    }
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(DecodeError::TooLarge { width, height });
    }
    Ok(())
}

fn broken(format: Format, error: ImageError) -> DecodeError {
    match error {
        ImageError::IoError(io) if io.kind() == std::io::ErrorKind::UnexpectedEof => DecodeError::CutShort { format },
        error => DecodeError::Broken { format, what: error.to_string() },
    }
}

fn reader(format: Format, bytes: &[u8]) -> ImageReader<Cursor<&[u8]>> {
    let format = if format == Format::Png { ImageFormat::Png } else { ImageFormat::Bmp };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    // Eight bytes per pixel (16-bit RGBA), and as much again for what a decoder keeps besides.
    limits.max_alloc = Some(16 * MAX_PIXELS);
    reader.limits(limits);
    reader
}

fn swaps_sides(orientation: Orientation) -> bool {
    use Orientation::*;
    matches!(orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
}

/// 8-bit RGB; transparent parts show white.
fn on_white(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let image = image.into_rgba8();
    let mut rgb = RgbImage::new(image.width(), image.height());
    blend(image.as_raw(), &mut rgb);
    rgb
}

/// c * a + white * (1 - a), rounded.
fn blend(rgba: &[u8], rgb: &mut RgbImage) {
    for (to, from) in rgb.chunks_exact_mut(3).zip(rgba.chunks_exact(4)) {
        let alpha = u32::from(from[3]);
        for (t, &f) in to.iter_mut().zip(from) {
            *t = ((u32::from(f) * alpha + 255 * (255 - alpha) + 127) / 255) as u8;
        }
    }
}

fn jpeg(bytes: &[u8]) -> JpegDecoder<ZCursor<&[u8]>> {
    // Not strict: cameras write harmless oddities. Sides are bounded by the format, pixels by `check_size`.
    let options = DecoderOptions::default()
        .set_strict_mode(false)
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    JpegDecoder::new_with_options(ZCursor::new(bytes), options)
}

fn jpeg_error(error: impl std::fmt::Debug) -> DecodeError {
    DecodeError::Broken { format: Format::Jpeg, what: format!("{error:?}") }
}

fn jpeg_header(decoder: &mut JpegDecoder<ZCursor<&[u8]>>) -> Result<((u32, u32), Orientation), DecodeError> {
    decoder.decode_headers().map_err(jpeg_error)?;
    let (width, height) = decoder.dimensions().unwrap_or((0, 0));
    let orientation = decoder.exif().and_then(|exif| Orientation::from_exif_chunk(exif)).unwrap_or(Orientation::NoTransforms);
    Ok(((width as u32, height as u32), orientation))
}

fn decode_jpeg(bytes: &[u8]) -> Result<RgbImage, DecodeError> {
    // The decoder fills what is missing with grey; PIL (and so sd-scripts) refuses such a file.
    if !jpeg_is_complete(bytes) {
        return Err(DecodeError::CutShort { format: Format::Jpeg });
    }
    let mut decoder = jpeg(bytes);
    let ((width, height), _) = jpeg_header(&mut decoder)?;
    let pixels = decoder.decode().map_err(jpeg_error)?;
    RgbImage::from_raw(width, height, pixels)
        .ok_or_else(|| DecodeError::Broken { format: Format::Jpeg, what: "fewer pixels than its header says".into() })
}

/// Whether the end marker stands where the segments lead, not merely somewhere (a thumbnail in EXIF has one too).
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        if byte != 0xFF {
            continue;
        }
        while bytes.get(at) == Some(&0xFF) {
            at += 1;
        }
        let Some(&marker) = bytes.get(at) else { return false };
        at += 1;
        match marker {
            // Stuffed zero, TEM, restarts, start of image: no length follows.
            0x00 | 0x01 | 0xD0..=0xD8 => {}
            0xD9 => return true,
            _ => match bytes.get(at..at + 2) {
                Some(length) => at += usize::from(u16::from_be_bytes([length[0], length[1]])),
                None => return false,
            },
        }
    }
    false
}

fn webp_features(bytes: &[u8]) -> Result<webp::BitstreamFeatures, DecodeError> {
    let broken = || DecodeError::Broken { format: Format::WebP, what: "unreadable header".into() };
    let features = webp::BitstreamFeatures::new(bytes).ok_or_else(broken)?;
    if features.has_animation() { Err(DecodeError::Animated) } else { Ok(features) }
}

fn webp_header(bytes: &[u8]) -> Result<((u32, u32), Orientation), DecodeError> {
    let features = webp_features(bytes)?;
    let orientation = riff_chunk(bytes, b"EXIF").and_then(|chunk| {
        // Some writers keep JPEG's prefix.
        Orientation::from_exif_chunk(chunk.strip_prefix(b"Exif\0\0").unwrap_or(chunk))
    });
    Ok(((features.width(), features.height()), orientation.unwrap_or(Orientation::NoTransforms)))
}

/// The first chunk of that name in a RIFF file: name, length (little endian), content, padded to even.
fn riff_chunk<'a>(bytes: &'a [u8], name: &[u8; 4]) -> Option<&'a [u8]> {
    let mut rest = bytes.get(12..)?;
    loop {
        let head = rest.get(..8)?;
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if &head[..4] == name {
            return rest.get(8..8usize.checked_add(length)?);
        }
        rest = rest.get(length.checked_add(8 + length % 2)?..)?;
    }
}

fn decode_webp(bytes: &[u8]) -> Result<RgbImage, DecodeError> {
    // The whole file's length stands in its head.
    let declared = bytes.get(4..8).map_or(0, |l| u64::from(u32::from_le_bytes([l[0], l[1], l[2], l[3]])) + 8);
    if (bytes.len() as u64) < declared {
        return Err(DecodeError::CutShort { format: Format::WebP });
    }
    let failed = || DecodeError::Broken { format: Format::WebP, what: "libwebp cannot decode it".into() };
    let image = webp::Decoder::new(bytes).decode().ok_or_else(failed)?;
    let (width, height) = (image.width(), image.height());
    if image.is_alpha() {
        let mut rgb = RgbImage::new(width, height);
        blend(&image, &mut rgb);
        Ok(rgb)
    } else {
        RgbImage::from_raw(width, height, image.to_vec()).ok_or_else(failed)
    }
}
