//! Format and size of an image from as few of its bytes as possible: 4 KiB for nearly all, more where a JPEG begins with
//! a thumbnail or a colour profile, and the EXIF chunk where a WebP has one at its end.

use crate::image::{DecodeError, Format, Header, probe};

/// Bytes that are read at first.
pub(super) const FIRST: usize = 4096;
/// A header that needs more than this is taken for broken.
const MOST: u64 = 16 << 20;

/// Reads parts of a file: (offset, length) to up to so many bytes.
pub(super) type ReadAt<'a> = &'a mut dyn FnMut(u64, usize) -> storage::Result<Vec<u8>>;

/// Reads the header of an image of `len` bytes, of which `first` are the first.
///
/// # Errors
/// [`DecodeError`]; for a WebP also if it is shorter than its first bytes say.
pub(super) fn header(len: u64, mut first: Vec<u8>, read: ReadAt) -> Result<Header, DecodeError> {
    let header = loop {
        match probe(&first) {
            Ok(header) => break header,
            Err(error) => {
                let have = first.len() as u64;
                if have >= len || have >= MOST {
                    return Err(error);
                }
                // The length known is not the error's: a decoder tells "too short" in many ways.
                let more = (have * 15).max(FIRST as u64).min(len - have) as usize;
                let added = read(have, more)?;
                if added.is_empty() {
                    return Err(error);
                }
                first.extend(added);
            }
        }
    };
    if header.format != Format::WebP {
        return Ok(header);
    }
    let declared = first.get(4..8).map_or(0, |l| u64::from(u32::from_le_bytes([l[0], l[1], l[2], l[3]])) + 8);
    if declared > len {
        return Err(DecodeError::CutShort { format: Format::WebP });
    }
    match webp_exif(len, &first, read)? {
        // A file of the header and that chunk alone has all that a header's reader looks at.
        Some(chunk) => probe(&[&first[..30], chunk.as_slice()].concat()),
        None => Ok(header),
    }
}

/// The EXIF chunk, with its own head, of a WebP whose extended header says that there is one.
fn webp_exif(len: u64, first: &[u8], read: ReadAt) -> Result<Option<Vec<u8>>, DecodeError> {
    const EXIF_FLAG: u8 = 8;
    if first.get(12..16) != Some(b"VP8X") || first.len() < 30 || first[20] & EXIF_FLAG == 0 {
        return Ok(None);
    }
    let mut at = 12u64;
    while at + 8 <= len {
        let head = match first.get(at as usize..at as usize + 8) {
            Some(head) => head.to_vec(),
            None => read(at, 8)?,
        };
        let Some(&[a, b, c, d]) = head.get(4..8) else { return Ok(None) };
        let length = u64::from(u32::from_le_bytes([a, b, c, d]));
        if &head[..4] == b"EXIF" {
            let chunk = read(at, 8 + length.min(1 << 20) as usize)?;
            return Ok(Some(chunk));
        }
        at += 8 + length + length % 2;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every picture of the crate's own collection gives the header that the whole file gives, from its first bytes.
    #[test]
    fn parts_tell_what_the_whole_tells() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
        let mut seen = 0;
        for path in storage::list_dir(folder.as_ref()).unwrap() {
            let bytes = storage::read(&path).unwrap();
            let Ok(whole) = probe(&bytes) else { continue };
            for first in [0, 16, 64, FIRST] {
                let mut most = 0;
                let mut read = |offset: u64, len: usize| {
                    most = most.max(offset as usize + len);
                    Ok(bytes[bytes.len().min(offset as usize)..bytes.len().min(offset as usize + len)].to_vec())
                };
                let start = bytes[..first.min(bytes.len())].to_vec();
                assert_eq!(header(bytes.len() as u64, start, &mut read).unwrap(), whole, "{}", path.display());
            }
            seen += 1;
        }
        assert!(seen > 20, "{seen}");
    }
}
