//! The samples of a dataset, by number, whatever source they are from: listed ones as they are, those of an index as the
//! 12 bytes that are kept of each.

use std::borrow::Cow;

use crate::index::Place;
use crate::select::Selected;
use crate::source::{self, Indexed};
use crate::{Buckets, DecodeError, Error, Placement, Result, Sample};

/// What buckets and plans need to know of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleRow {
    /// Index of its subset in the configuration.
    pub subset: usize,
    /// Visits per epoch.
    pub repeats: u32,
    /// Width and height of the image, after EXIF orientation.
    pub size: (u32, u32),
    /// Where it is resized and cropped to.
    pub placement: Placement,
}

/// Samples of one or more subsets.
#[derive(Debug)]
pub(crate) enum Segment {
    /// Of folders.
    Listed(Vec<Sample>),
    /// Of an index, for one subset.
    Indexed { source: Box<Indexed>, subset: usize, repeats: u32 },
}

/// A sample in its segment.
pub(crate) enum At<'a> {
    Listed(&'a Sample),
    Indexed { source: &'a Indexed, row: Selected, subset: usize, repeats: u32 },
}

/// All segments, their samples numbered through.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    segments: Vec<Segment>,
    /// Number of the first sample of each segment.
    starts: Vec<u32>,
    len: usize,
}

impl Rows {
    /// Adds a segment behind the others.
    pub fn push(&mut self, segment: Segment) {
        self.starts.push(self.len as u32);
        self.len += segment.len();
        self.segments.push(segment);
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The listed samples, if all are.
    pub fn all_listed(&self) -> Option<&[Sample]> {
        match self.segments.as_slice() {
            [Segment::Listed(samples)] => Some(samples),
            _ => None,
        }
    }

    /// A sample by number.
    pub fn at(&self, number: u32) -> Result<At<'_>> {
        let k = self.starts.partition_point(|&start| start <= number);
        let none = || Error::NoSuchSample { sample: number, len: self.len };
        let k = k.checked_sub(1).ok_or_else(none)?;
        let i = (number - self.starts[k]) as usize;
        match &self.segments[k] {
            Segment::Listed(samples) => samples.get(i).map(At::Listed),
            Segment::Indexed { source, subset, repeats } => {
                source.rows.get(i).map(|&row| At::Indexed { source, row, subset: *subset, repeats: *repeats })
            }
        }
        .ok_or_else(none)
    }

    /// The indexes that samples are of.
    pub fn indexes(&self) -> impl Iterator<Item = &Indexed> {
        self.segments.iter().filter_map(|segment| match segment {
            Segment::Listed(_) => None,
            Segment::Indexed { source, .. } => Some(&**source),
        })
    }

    /// Number of the sample with this id of an index; the first, if several subsets have it.
    pub fn find_id(&self, id: u32) -> Option<u32> {
        self.segments.iter().zip(&self.starts).find_map(|(segment, start)| match segment {
            Segment::Listed(_) => None,
            Segment::Indexed { source, .. } => source.rows.binary_search_by_key(&id, |row| row.id).ok().map(|i| start + i as u32),
        })
    }
}

impl Segment {
    fn len(&self) -> usize {
        match self {
            Segment::Listed(samples) => samples.len(),
            Segment::Indexed { source, .. } => source.rows.len(),
        }
    }
}

impl At<'_> {
    /// The row; `rule` places images of an index anew, which costs less than keeping it.
    pub fn row(&self, rule: &Buckets) -> SampleRow {
        match self {
            At::Listed(s) => SampleRow { subset: s.subset, repeats: s.repeats, size: s.size, placement: s.placement },
            At::Indexed { row, subset, repeats, .. } => {
                // Images that no bucket takes were left out when the dataset was opened.
                let placement = rule.place(row.size).unwrap_or(Placement { bucket: row.size, resized: row.size });
                SampleRow { subset: *subset, repeats: *repeats, size: row.size, placement }
            }
        }
    }

    /// Its id in its index.
    pub fn id(&self) -> Option<u32> {
        match self {
            At::Listed(_) => None,
            At::Indexed { row, .. } => Some(row.id),
        }
    }

    /// Path of the file, or the shard with the member's name.
    pub fn name(&self) -> std::path::PathBuf {
        match self {
            At::Listed(s) => s.path.clone(),
            At::Indexed { source, row, .. } => source.name(row.id),
        }
    }

    /// The bytes of the image.
    pub fn read(&self) -> std::result::Result<Vec<u8>, DecodeError> {
        match self {
            At::Listed(s) => source::read(&s.path),
            At::Indexed { source, row, .. } => {
                let place: std::result::Result<Place, Error> = source.place(row.id);
                Ok(place.map_err(|e| DecodeError::NoPlace { what: source::chain(&e) })?.read()?)
            }
        }
    }

    /// The caption before the pipeline, not drawn.
    pub fn caption(&self) -> Result<Cow<'_, str>> {
        Ok(match self {
            At::Listed(s) => Cow::Borrowed(s.caption.as_str()),
            At::Indexed { source, row, .. } => Cow::Owned(source.caption(row.id, None)?),
        })
    }
}
