//! Writing a safetensors file: the header is laid out from dtypes and shapes alone, then each tensor's bytes are asked
//! for when their turn comes, so that no more than one tensor need be in memory. Equal input gives equal bytes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use ::safetensors::Dtype;
use serde_json::json;

use super::byte_len;
use super::header::{MAX_HEADER, METADATA_KEY};
use crate::whole::write_with;
use crate::{Error, Result};

/// One tensor to be written.
pub struct TensorSource<'a> {
    /// Its key.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Extent of each dimension, slowest first (C order).
    pub shape: Vec<usize>,
    /// Gives the bytes, little endian, C order; called once, when its turn to be written comes.
    pub data: Box<dyn Fn() -> Cow<'a, [u8]> + Send + Sync + 'a>,
}

/// Writes a file, whole or absent (see [`crate::write_whole_with`]). Order: widest element type first, then by name, as
/// the `safetensors` crate writes; metadata by key. The header is padded with blanks to a multiple of 8 bytes.
///
/// # Errors
/// [`Error::Io`] if it cannot be written; [`Error::Layout`] if two tensors share a name, one is called `__metadata__`, a
/// source gives another number of bytes than its shape wants, or the header would pass 100 MB. The target is then as it
/// was before.
pub fn write(path: &Path, mut tensors: Vec<TensorSource>, metadata: &BTreeMap<String, String>) -> Result<()> {
    let refuse = |what: String| Error::Layout { path: path.to_path_buf(), what };
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let lengths = check(&tensors).map_err(refuse)?;
    let header = layout(&tensors, &lengths, metadata);
    if header.len() > MAX_HEADER {
        return Err(refuse(format!("its header would take {} bytes; the format allows {MAX_HEADER}", header.len())));
    }
    write_with(path, |out| {
        let io = |result: std::io::Result<()>| result.map_err(Error::io("write", path));
        io(out.write_all(&(header.len() as u64).to_le_bytes()))?;
        io(out.write_all(&header))?;
        for (tensor, &wants) in tensors.iter().zip(&lengths) {
            let data = (tensor.data)();
            if data.len() != wants {
                let (name, dtype, shape, gives) = (&tensor.name, tensor.dtype, &tensor.shape, data.len());
                return Err(refuse(format!("tensor `{name}` gives {gives} bytes; {dtype} {shape:?} wants {wants}")));
            }
            io(out.write_all(&data))?;
        }
        Ok(())
    })
}

/// Each tensor's length in bytes, after checking names and sizes.
fn check(tensors: &[TensorSource]) -> std::result::Result<Vec<usize>, String> {
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("two tensors are called `{}`", pair[0]));
    }
    if names.binary_search(&METADATA_KEY).is_ok() {
        return Err(format!("a tensor cannot be called `{METADATA_KEY}`"));
    }
    let mut total = 0usize;
    tensors
        .iter()
        .map(|tensor| {
            let length = byte_len(tensor.dtype, &tensor.shape).filter(|&length| {
                let sum = total.checked_add(length);
                total = sum.unwrap_or(total);
                sum.is_some()
            });
            length.ok_or_else(|| {
                format!("tensor `{}`: no whole number of bytes below 2^64 holds {} {:?}", tensor.name, tensor.dtype, tensor.shape)
            })
        })
        .collect()
}

/// The header's text, padded. Written entry by entry, because the order of keys is the order of the data.
fn layout(tensors: &[TensorSource], lengths: &[usize], metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let mut entries = Vec::with_capacity(tensors.len() + 1);
    if !metadata.is_empty() {
        entries.push(format!("{}:{}", json!(METADATA_KEY), json!(metadata)));
    }
    let mut start = 0;
    for (tensor, length) in tensors.iter().zip(lengths) {
        let end = start + length;
        let (name, dtype, shape) = (json!(tensor.name), json!(tensor.dtype.to_string()), json!(tensor.shape));
        entries.push(format!("{name}:{{\"dtype\":{dtype},\"shape\":{shape},\"data_offsets\":[{start},{end}]}}"));
        start = end;
    }
    let mut header = format!("{{{}}}", entries.join(",")).into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}
