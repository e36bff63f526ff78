//! Safetensors files: 8 bytes of header length (little endian), a JSON header, then the tensors' bytes without gaps
//! (<https://github.com/huggingface/safetensors>). Reading is a memory map whose header is checked as hostile input;
//! writing streams one tensor at a time into a file that is whole or absent.
//!
//! The header is parsed here and not by the `safetensors` crate because its errors name neither tensor nor path, and a
//! repeated key passes there.

mod header;
mod write;

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

pub use ::safetensors::Dtype;
use bytes::Bytes;
use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
pub use write::{TensorSource, write};

use crate::{Error, Result};

/// Element type and shape of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: Dtype,
    /// Extent of each dimension, slowest first (C order).
    pub shape: Vec<usize>,
}

/// An open safetensors file: the checked header and a memory map of the data. Cloning is cheap and shares the map.
///
/// A file that another program cuts short while it is mapped kills the reader (SIGBUS), and one that it overwrites changes under the
/// reader, see [`SafeTensors::unchanged`]; files written by this crate are replaced by rename, which leaves a mapped one alone.
#[derive(Debug, Clone)]
pub struct SafeTensors {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: File,
    /// Length and time of the last change that is known.
    known: Mutex<Stamp>,
    map: Mmap,
    data_start: usize,
    tensors: BTreeMap<String, (TensorInfo, Range<usize>)>,
    metadata: BTreeMap<String, String>,
}

impl SafeTensors {
    /// Opens and checks a file. Only the header is read; memory used is bounded by a small multiple of the header, and a
    /// header over 100 MB is refused.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened or mapped, [`Error::Header`] if the header or the tensors' places do not fit
    /// the file exactly, [`Error::NotSafetensors`] where the file is recognizably of another kind.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let meta = file.metadata().map_err(Error::io("read", path))?;
        if meta.is_dir() {
            return Err(Error::io("read", path)(io::Error::from(ErrorKind::IsADirectory)));
        }
        if meta.len() == 0 {
            return Err(Error::Header { path: path.to_path_buf(), what: "the file is empty".into() });
        }
        // SAFETY: the map is read-only and private to `Inner`; the type's doc states the hazards of every map, that another program
        // shortens the file or writes to it.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        // Weights that are computed with where they lie cost a look into the page table for each page: 2 MiB ones where the system
        // has them for files (seen on Linux 6.18 with ext4). It is an advice, and whether it is taken changes no byte.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let header = header::parse(path, &map)?;
        let header::Header { data_start, tensors, metadata } = header;
        let inner = Inner { path: path.to_path_buf(), file, known: stamp(&meta).into(), map, data_start, tensors, metadata };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The file's path as it was given to [`SafeTensors::open`].
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.inner.tensors.keys().map(String::as_str)
    }

    /// Element type and shape of a tensor; `None` if the file has none of that name.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.inner.tensors.get(name).map(|(info, _)| info)
    }

    /// A tensor's bytes, little endian, C order; `None` if the file has none of that name. The length fits
    /// [`SafeTensors::info`]; the address need not be aligned to the element.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.inner.tensors.get(name).map(|(_, range)| &self.data_section()[range.clone()])
    }

    /// The same bytes, which keep the map open for as long as they are used.
    pub fn shared(&self, name: &str) -> Option<Bytes> {
        struct Map(Arc<Inner>);
        impl AsRef<[u8]> for Map {
            fn as_ref(&self) -> &[u8] {
                &self.0.map
            }
        }
        let (_, range) = self.inner.tensors.get(name)?;
        let start = self.inner.data_start;
        Some(Bytes::from_owner(Map(self.inner.clone())).slice(start + range.start..start + range.end))
    }

    /// Whether the file is as long and as old as when it was opened or last asked about. One that was replaced by another of its name is
    /// unchanged: the map is of the file that was opened.
    ///
    /// # Errors
    /// [`Error::Io`] if the system does not say.
    pub fn unchanged(&self) -> Result<bool> {
        let now = stamp(&self.inner.file.metadata().map_err(Error::io("read", self.path()))?);
        let mut known = self.inner.known.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::replace(&mut *known, now) == now)
    }

    /// Takes a tensor's pages out of this process's memory; they are read again from the file if asked for. Without it, what was
    /// read through the map counts as resident until the map is closed.
    pub fn release(&self, name: &str) {
        #[cfg(unix)]
        if let Some((_, range)) = self.inner.tensors.get(name) {
            let start = self.inner.data_start + range.start;
            // SAFETY: the map is shared and read-only, so its pages hold the file's own bytes: dropping them changes no value that
            // a later or concurrent read sees.
            let advised = unsafe { self.inner.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, range.len()) };
            // An advice that is not taken leaves the pages where they were.
            let _ = advised;
        }
        #[cfg(not(unix))]
        let _ = name;
    }

    /// Where a tensor's bytes stand in the file; `None` if the file has none of that name.
    pub fn place(&self, name: &str) -> Option<Range<u64>> {
        let at = |offset: usize| (self.inner.data_start + offset) as u64;
        self.inner.tensors.get(name).map(|(_, range)| at(range.start)..at(range.end))
    }

    /// The header's `__metadata__`; empty if it has none.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.inner.metadata
    }

    /// All bytes after the header, as kohya's model hashes take them.
    pub fn data_section(&self) -> &[u8] {
        &self.inner.map[self.inner.data_start..]
    }
}

/// Length and time of the last change.
type Stamp = (u64, Option<SystemTime>);

fn stamp(meta: &Metadata) -> Stamp {
    (meta.len(), meta.modified().ok())
}

/// Bytes that a tensor takes; `None` where the product overflows or sub-byte elements do not fill whole bytes.
fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent))?;
    let bits = elements.checked_mul(dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}
