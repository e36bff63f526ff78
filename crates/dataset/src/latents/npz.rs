//! Latents that sd-scripts left beside the pictures (`library/strategy_sd.py`, `strategy_base.py`): numpy archives
//! `<stem>.npz` (its older form, which wins) or `<stem>_<width>x<height>_sdxl.npz`, sides of four digits or more.
//!
//! They do not name the VAE that made them, so they are read only where the caller asks for it. sd-scripts checks no shape; here
//! one that does not fit the picture's bucket, is of another original size, or is older than the picture is not taken.

use std::io::{Cursor, Read};
use std::path::Path;

use half::f16;

use super::LatentItem;

/// Reads the values of one picture's latent, before the scaling by 0.13025; `None` if none fits. `size` is the picture's.
pub(super) fn read(image: &Path, size: (u32, u32), item: &LatentItem) -> Option<Vec<f32>> {
    let stem = image.file_stem()?.to_string_lossy();
    let names = [format!("{stem}.npz"), format!("{stem}_{:04}x{:04}_sdxl.npz", size.0, size.1)];
    let path = names.iter().map(|name| image.with_file_name(name)).find(|path| path.is_file())?;
    match parse(&path, image, size, item) {
        Ok(values) => Some(values),
        Err(why) => {
            tracing::warn!("`{}` is not used: {why}", path.display());
            None
        }
    }
}

fn parse(path: &Path, image: &Path, size: (u32, u32), item: &LatentItem) -> Result<Vec<f32>, String> {
    let modified = |path: &Path| storage::stamp(path).map(|stamp| stamp.modified).map_err(|e| e.to_string());
    if modified(path)? < modified(image)? {
        return Err("it is older than the picture".into());
    }
    let bytes = storage::read(path).map_err(|e| e.to_string())?;
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).map_err(|e| format!("it is no npz file: {e}"))?;
    if let Ok((_, original)) = array(&mut archive, "original_size")
        && original != [size.0 as f32, size.1 as f32]
    {
        return Err(format!("it is of a picture of {original:?}, not of {}x{}", size.0, size.1));
    }
    let (shape, values) = array(&mut archive, if item.key.flipped { "latents_flipped" } else { "latents" })?;
    if shape != item.shape {
        return Err(format!("its shape is {shape:?}, the bucket's is {:?}", item.shape));
    }
    match values.iter().find(|v| !f16::from_f32(**v).is_finite()) {
        Some(value) => Err(format!("it holds {value}")),
        None => Ok(values),
    }
}

/// Shape and values of an array, in C order.
fn array(archive: &mut zip::ZipArchive<Cursor<Vec<u8>>>, name: &str) -> Result<(Vec<usize>, Vec<f32>), String> {
    const MOST: u64 = 1 << 26;
    let file = archive.by_name(&format!("{name}.npy")).map_err(|e| format!("it has no `{name}`: {e}"))?;
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes).map_err(|e| format!("`{name}`: {e}"))?;
    npy(&bytes).ok_or_else(|| format!("`{name}` is no array of numbers that can be read"))
}

/// numpy's format (`numpy/lib/format.py`): magic, version, length of the header, a Python literal with `descr`,
/// `fortran_order` and `shape`, then the values.
fn npy(bytes: &[u8]) -> Option<(Vec<usize>, Vec<f32>)> {
    let rest = bytes.strip_prefix(b"\x93NUMPY")?;
    let (start, len): (usize, usize) = match rest.first()? {
        1 => (4, usize::from(u16::from_le_bytes(rest.get(2..4)?.try_into().ok()?))),
        _ => (6, u32::from_le_bytes(rest.get(2..6)?.try_into().ok()?) as usize),
    };
    let header = std::str::from_utf8(rest.get(start..start.checked_add(len)?)?).ok()?;
    let data = &rest[start + len..];
    let value = |key: &str| header.split_once(&format!("'{key}':")).map(|(_, after)| after.trim_start());
    if !value("fortran_order")?.starts_with("False") {
        return None;
    }
    let inside = value("shape")?.strip_prefix('(')?.split_once(')')?.0;
    let sides = inside.split(',').map(str::trim).filter(|side| !side.is_empty()).map(|side| side.parse().ok());
    let shape: Vec<usize> = sides.collect::<Option<_>>()?;
    let count = shape.iter().try_fold(1usize, |n, &side| n.checked_mul(side))?;
    fn all<const N: usize>(data: &[u8], number: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        data.as_chunks::<N>().0.iter().map(|&bytes| number(bytes)).collect()
    }
    let values = match value("descr")?.get(1..4)? {
        "<f4" => all(data, f32::from_le_bytes),
        "<f2" => all(data, |b| f16::from_le_bytes(b).to_f32()),
        "<i4" => all(data, |b| i32::from_le_bytes(b) as f32),
        "<i8" => all(data, |b| i64::from_le_bytes(b) as f32),
        "<f8" => all(data, |b| f64::from_le_bytes(b) as f32),
        _ => return None,
    };
    (values.len() == count).then_some((shape, values))
}
