//! An export never holds the model: the process's own memory is read at every tensor of a base far larger than the bound.
//! Alone in its binary, so that no other test's memory is counted.

mod checkpoint_common;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Tensor};
use checkpoint_common::{TINY, golden};
use sdxl::checkpoint::{Checkpoint, Layout, Part, export};
use storage::safetensors::{Dtype, SafeTensors, TensorSource};

const TENSORS: usize = 64;
/// 2 MiB in f16.
const SHAPE: [usize; 2] = [1024, 1024];

/// Memory of this process in KiB, without the pages of mapped files; `None` where the system does not tell.
fn own_memory() -> Option<usize> {
    let status = storage::read_to_string(Path::new("/proc/self/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?.split_whitespace().next()?.parse().ok()
}

#[test]
fn memory_stays_that_of_a_few_tensors() {
    let out = tempfile::tempdir().unwrap();
    let base = out.path().join("base.safetensors");
    let tiny = SafeTensors::open(&golden("tiny-sdxl.safetensors")).unwrap();
    let own = tiny.names().map(|name| {
        let info = tiny.info(name).unwrap().clone();
        let data = tiny.bytes(name).unwrap();
        TensorSource { name: name.into(), dtype: info.dtype, shape: info.shape, data: Box::new(move || Cow::Borrowed(data)) }
    });
    // 128 MiB of tensors that the network does not know; exports carry them all the same.
    let more = (0..TENSORS).map(|n| TensorSource {
        name: format!("model.diffusion_model.more.{n}"),
        dtype: Dtype::F16,
        shape: SHAPE.to_vec(),
        data: Box::new(move || Cow::Owned(vec![n as u8; 2 * SHAPE[0] * SHAPE[1]])),
    });
    storage::safetensors::write(&base, own.chain(more).collect(), &BTreeMap::new()).unwrap();
    let base = Checkpoint::open(&base).unwrap().with_head_dims(TINY);
    for (layout, name) in [(Layout::SingleFile, "out.safetensors"), (Layout::Diffusers, "out")] {
        let Some(before) = own_memory() else { return };
        let (peak, seen) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let widen = |part: Part, name: &str, tensor: Tensor| {
            peak.fetch_max(own_memory().unwrap_or_default(), Ordering::Relaxed);
            seen.fetch_add(usize::from(part == Part::Unet && name.starts_with("more.")), Ordering::Relaxed);
            Ok(tensor.to_dtype(DType::F32)?)
        };
        export(&base, &out.path().join(name), layout, None, &BTreeMap::new(), &widen).unwrap();
        assert_eq!(seen.into_inner(), TENSORS);
        // The largest tensors are 3 MiB in the file and 6 MiB widened; three or four copies of one may live at once, and
        // the allocator may keep as much again. Holding the model would take over 128 MiB.
        let grown = peak.into_inner().saturating_sub(before);
        assert!(grown < 48 << 10, "{layout:?}: {grown} KiB");
    }
}
