//! Parsing and checking of a header, as of hostile input: nothing is indexed before it is asked for, no size is trusted
//! before it is compared with the file, and every refusal names the tensor and both values.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use ::safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::{TensorInfo, byte_len};
use crate::{Error, Result};

/// The format's own bound on the header, in bytes.
pub(super) const MAX_HEADER: usize = 100_000_000;
/// The key that holds free text instead of a tensor.
pub(super) const METADATA_KEY: &str = "__metadata__";

/// A checked header.
pub(super) struct Header {
    /// Where the data section starts in the file.
    pub data_start: usize,
    /// Each tensor's place, relative to the data section; the places fill it without gaps.
    pub tensors: BTreeMap<String, (TensorInfo, Range<usize>)>,
    pub metadata: BTreeMap<String, String>,
}

/// Reads and checks the header of a whole file.
pub(super) fn parse(path: &Path, file: &[u8]) -> Result<Header> {
    let refuse = |what: String| match looks_like(file) {
        Some((what, way_out)) => Error::NotSafetensors { path: path.to_path_buf(), what, way_out },
        None => Error::Header { path: path.to_path_buf(), what },
    };
    let Some((prefix, rest)) = file.split_first_chunk::<8>() else {
        return Err(refuse(format!("it has {} bytes; the header's length alone takes 8", file.len())));
    };
    let declared = u64::from_le_bytes(*prefix);
    let length = usize::try_from(declared).ok().filter(|&length| length <= MAX_HEADER);
    let Some(length) = length else {
        return Err(refuse(format!("it declares a header of {declared} bytes; the format allows {MAX_HEADER}")));
    };
    let Some((text, data)) = rest.split_at_checked(length) else {
        return Err(refuse(format!("it is cut short: it declares a header of {length} bytes, {} follow", rest.len())));
    };
    let text = std::str::from_utf8(text).map_err(|e| refuse(format!("header byte {} is not UTF-8", e.valid_up_to())))?;
    let raw: RawHeader = serde_json::from_str(text).map_err(|e| refuse(format!("the header cannot be read: {e}")))?;
    let tensors = place(raw.tensors, data.len()).map_err(refuse)?;
    Ok(Header { data_start: 8 + length, tensors, metadata: raw.metadata })
}

/// Checks that the tensors' places fit their shapes and fill the data section exactly.
fn place(raw: BTreeMap<String, RawTensor>, data_len: usize) -> std::result::Result<BTreeMap<String, (TensorInfo, Range<usize>)>, String> {
    let mut order: Vec<(&str, (u64, u64))> = Vec::with_capacity(raw.len());
    for (name, tensor) in &raw {
        let (start, end) = tensor.data_offsets;
        let Some(takes) = end.checked_sub(start) else {
            return Err(format!("tensor `{name}` ends at byte {end}, before its start {start}"));
        };
        let Some(wants) = byte_len(tensor.dtype, &tensor.shape) else {
            return Err(format!("tensor `{name}`: no whole number of bytes below 2^64 holds {} {:?}", tensor.dtype, tensor.shape));
        };
        if takes != wants as u64 {
            return Err(format!("tensor `{name}` takes {takes} bytes; {} {:?} wants {wants}", tensor.dtype, tensor.shape));
        }
        order.push((name, (start, end)));
    }
    order.sort_by_key(|&(_, place)| place);
    let mut before: (&str, u64) = ("", 0);
    for &(name, (start, end)) in &order {
        if start < before.1 {
            return Err(format!("tensors `{}` and `{name}` overlap: one ends at byte {}, the other starts at {start}", before.0, before.1));
        }
        if start > before.1 {
            return Err(format!("bytes {}..{start}, before tensor `{name}`, belong to no tensor", before.1));
        }
        before = (name, end);
    }
    let (last, end) = before;
    if end > data_len as u64 {
        return Err(format!("it is cut short: tensor `{last}` ends at byte {end} of the data, the file holds {data_len}"));
    }
    if end < data_len as u64 {
        return Err(format!("{} bytes follow the last tensor", data_len as u64 - end));
    }
    Ok(raw
        .into_iter()
        .map(|(name, RawTensor { dtype, shape, data_offsets: (start, end) })| {
            // Both fit in usize: they are at most `data_len`.
            (name, (TensorInfo { dtype, shape }, start as usize..end as usize))
        })
        .collect())
}

/// What a file that is no safetensors file is, with the way out: the kinds that people do meet.
fn looks_like(file: &[u8]) -> Option<(&'static str, &'static str)> {
    let start = file.get(..64).unwrap_or(file).trim_ascii_start();
    if start.starts_with(b"version https://git-lfs") {
        Some(("a git-lfs pointer", "run `git lfs pull` in its folder, or download the file itself"))
    } else if start.starts_with(b"<!DOCTYPE") || start.starts_with(b"<!doctype") || start.starts_with(b"<html") {
        Some(("a web page", "the download saved the site's page; use the file's direct address"))
    } else if start.starts_with(b"PK\x03\x04") || start.starts_with(b"\x80\x02") {
        Some(("a pickled PyTorch file or an archive", "convert it to safetensors first"))
    } else if start.starts_with(b"GGUF") {
        Some(("a GGUF file", "use the model's safetensors release"))
    } else {
        None
    }
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

struct RawHeader {
    tensors: BTreeMap<String, RawTensor>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
        let mut tensors = BTreeMap::new();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA_KEY {
                let entries: Option<UniqueStrings> = map.next_value()?;
                if metadata.replace(entries.map_or_else(BTreeMap::new, |entries| entries.0)).is_some() {
                    return Err(A::Error::custom(format!("`{METADATA_KEY}` appears twice")));
                }
                continue;
            }
            let tensor: RawTensor = map.next_value().map_err(|e| A::Error::custom(format!("tensor `{name}`: {e}")))?;
            match tensors.entry(name) {
                Entry::Vacant(place) => place.insert(tensor),
                Entry::Occupied(place) => return Err(A::Error::custom(format!("tensor `{}` appears twice", place.key()))),
            };
        }
        Ok(RawHeader { tensors, metadata: metadata.unwrap_or_default() })
    }
}

/// An object of strings that refuses a repeated key.
struct UniqueStrings(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for UniqueStrings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = UniqueStrings;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<UniqueStrings, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    match entries.entry(key) {
                        Entry::Vacant(place) => place.insert(value),
                        Entry::Occupied(place) => return Err(A::Error::custom(format!("metadata key `{}` appears twice", place.key()))),
                    };
                }
                Ok(UniqueStrings(entries))
            }
        }
        deserializer.deserialize_map(Strings)
    }
}
