//! The small vocabularies of an index: classes of tags, ratings, formats, states. Each is stored as its number, so a
//! number is never given a new meaning.

use serde::{Deserialize, Serialize};

use crate::image::Format;

/// Class of a tag, numbered as HakuBooru numbers them (danbooru's own API has 3, 4, 5 for copyright, character, meta).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TagClass {
    /// What the picture shows.
    General = 0,
    /// Who drew it.
    Artist = 1,
    /// Who is on it.
    Character = 2,
    /// The series they are from.
    Copyright = 3,
    /// About the file, the medium or the post.
    Meta = 4,
}

impl TagClass {
    /// All classes, by number.
    pub const ALL: [TagClass; 5] = [TagClass::General, TagClass::Artist, TagClass::Character, TagClass::Copyright, TagClass::Meta];

    pub(crate) fn from_number(number: i64) -> Option<Self> {
        usize::try_from(number).ok().and_then(|i| Self::ALL.get(i)).copied()
    }
}

/// Rating of a post, numbered as HakuBooru numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rating {
    /// For everybody.
    General = 0,
    /// Slightly revealing.
    Sensitive = 1,
    /// Not safe for work.
    Questionable = 2,
    /// Pornographic.
    Explicit = 3,
}

impl Rating {
    /// All ratings, by number.
    pub const ALL: [Rating; 4] = [Rating::General, Rating::Sensitive, Rating::Questionable, Rating::Explicit];

    pub(crate) fn from_number(number: i64) -> Option<Self> {
        usize::try_from(number).ok().and_then(|i| Self::ALL.get(i)).copied()
    }

    /// From danbooru's letter or word. Old dumps know `s` as "safe": where there is no `g`, it cannot be told apart.
    pub(crate) fn from_text(text: &str) -> Option<Self> {
        Some(match text {
            "g" | "general" | "safe" => Rating::General,
            "s" | "sensitive" => Rating::Sensitive,
            "q" | "questionable" => Rating::Questionable,
            "e" | "explicit" => Rating::Explicit,
            _ => return None,
        })
    }
}

/// Format of a file: by content where there is a file, else by the extension that the metadata names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileFormat {
    /// Not known, or none of the others (videos, archives).
    Other = 0,
    /// PNG.
    Png = 1,
    /// JPEG.
    Jpeg = 2,
    /// WebP.
    WebP = 3,
    /// Windows bitmap.
    Bmp = 4,
    /// GIF.
    Gif = 5,
    /// AVIF.
    Avif = 6,
}

impl FileFormat {
    const ALL: [FileFormat; 7] =
        [FileFormat::Other, FileFormat::Png, FileFormat::Jpeg, FileFormat::WebP, FileFormat::Bmp, FileFormat::Gif, FileFormat::Avif];

    pub(crate) fn from_number(number: i64) -> Self {
        usize::try_from(number).ok().and_then(|i| Self::ALL.get(i)).copied().unwrap_or(FileFormat::Other)
    }

    /// By extension, without its dot, in any case.
    pub(crate) fn from_extension(extension: &str) -> Self {
        const KNOWN: [(&str, FileFormat); 8] = [
            ("png", FileFormat::Png),
            ("jpg", FileFormat::Jpeg),
            ("jpeg", FileFormat::Jpeg),
            ("jfif", FileFormat::Jpeg),
            ("webp", FileFormat::WebP),
            ("bmp", FileFormat::Bmp),
            ("gif", FileFormat::Gif),
            ("avif", FileFormat::Avif),
        ];
        KNOWN.iter().find(|(known, _)| known.eq_ignore_ascii_case(extension)).map_or(FileFormat::Other, |(_, format)| *format)
    }

    /// Whether images of this format can be decoded.
    pub fn is_readable(self) -> bool {
        matches!(self, FileFormat::Png | FileFormat::Jpeg | FileFormat::WebP | FileFormat::Bmp)
    }
}

impl From<Format> for FileFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Png => FileFormat::Png,
            Format::Jpeg => FileFormat::Jpeg,
            Format::WebP => FileFormat::WebP,
            Format::Bmp => FileFormat::Bmp,
        }
    }
}

/// Whether there is a file that can be trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// A file with a good header.
    Present = 0,
    /// Metadata alone: no file was found.
    Absent = 1,
    /// A file was found once, and is not there any more.
    Gone = 2,
    /// A file whose header cannot be read.
    Broken = 3,
}

impl State {
    pub(crate) fn from_number(number: i64) -> Self {
        match number {
            0 => State::Present,
            2 => State::Gone,
            3 => State::Broken,
            _ => State::Absent,
        }
    }
}

/// A day as year * 10000 + month * 100 + day in the post's own time zone, from text as `2024-05-19T01:30:25.096-04:00`;
/// 0 where the text cannot be read.
pub(crate) fn day(text: &str) -> i32 {
    let part = |range: std::ops::Range<usize>| {
        let digits = text.get(range)?;
        if digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse::<i32>().ok() } else { None }
    };
    let dashes = text.as_bytes().get(4) == Some(&b'-') && text.as_bytes().get(7) == Some(&b'-');
    match (part(0..4), part(5..7), part(8..10)) {
        (Some(year), Some(month @ 1..=12), Some(day @ 1..=31)) if dashes => year * 10_000 + month * 100 + day,
        _ => 0,
    }
}
