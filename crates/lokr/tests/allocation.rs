//! No buffer of the size of a frozen weight is ever allocated: no gradient of one, no full-size dW, and in f32 on the CPU no merged
//! weight either. The largest single allocation is counted while layers run forward and backward.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use candle_core::{DType, Device, Result, Tensor};
use lokr::functional::{Path, lokr_conv2d, lokr_linear};
use ops::Parameter;

struct Counting;

static LARGEST: AtomicUsize = AtomicUsize::new(0);
/// One test at a time: the count is the process's.
static ALONE: Mutex<()> = Mutex::new(());

// SAFETY: every call goes to the system's allocator as it came; only a number is kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: the caller's promises.
        unsafe { System.realloc(ptr, layout, size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Bytes of the largest allocation that `f` made.
fn largest(f: impl FnOnce() -> Result<()>) -> Result<usize> {
    LARGEST.store(0, Ordering::Relaxed);
    f()?;
    Ok(LARGEST.load(Ordering::Relaxed))
}

fn ones(shape: &[usize]) -> Result<Tensor> {
    Tensor::ones(shape, DType::F32, &Device::Cpu)
}

fn factor(shape: &[usize]) -> Result<Parameter> {
    Ok(Parameter::new("factor", ones(shape)?))
}

/// Bytes that a product may hold beside its result: packed blocks of both operands (`ops`, gemm.rs), whatever the weight's size.
const BLOCKS: usize = 1 << 20;

/// Types in which a weight may be kept without being converted whole.
const STORED: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Convolutions of 512 channels on few pixels: 3x3, with stride, and 1x1 (the side of the kernel, stride, padding, pixels).
const CONVOLUTIONS: [(usize, usize, usize, usize); 3] = [(3, 1, 1, 4), (3, 2, 1, 8), (1, 1, 0, 4)];

#[test]
fn a_frozen_linear_layer_allocates_nothing_of_its_weights_size() -> Result<()> {
    let _alone = alone();
    for stored in STORED {
        let (weight, x) = (ones(&[1024, 2048])?.to_dtype(stored)?, factor(&[4, 2048])?);
        let bytes = largest(|| {
            let y = ops::linear(&x.value(), &weight, None)?;
            ops::backward(vec![(y.clone(), y.tensor().clone())])
        })?;
        assert!(bytes > 0 && bytes <= BLOCKS, "{stored:?}: {bytes}");
        assert!(x.grad().is_some());
    }
    Ok(())
}

#[test]
fn a_frozen_convolution_allocates_nothing_of_its_weights_size() -> Result<()> {
    let _alone = alone();
    for (stored, (k, stride, padding, side)) in STORED.into_iter().flat_map(|stored| CONVOLUTIONS.map(|c| (stored, c))) {
        // A 1x1 weight has a ninth of the elements, so it gets more channels.
        let channels = if k == 1 { 2048 } else { 512 };
        let (weight, x) = (ones(&[channels, channels, k, k])?.to_dtype(stored)?, factor(&[1, channels, side, side])?);
        let bytes = largest(|| {
            let y = ops::conv2d(&x.value(), &weight, None, stride, padding)?;
            ops::backward(vec![(y.clone(), y.tensor().clone())])
        })?;
        assert!(bytes > 0 && bytes <= BLOCKS, "{stored:?} {k}x{k} stride {stride}: {bytes}");
    }
    Ok(())
}

#[test]
fn an_adapted_linear_layer_has_no_full_size_gradient() -> Result<()> {
    let _alone = alone();
    for (stored, path) in STORED.into_iter().flat_map(|stored| [(stored, Path::Merged), (stored, Path::Factored)]) {
        for (a, b) in [(8, 8), (4, 8), (8, 4)] {
            let (weight, x) = (ones(&[1024, 2048])?.to_dtype(stored)?, factor(&[4, 2048])?);
            let (w1, w2) = (factor(&[a, b])?, factor(&[1024 / a, 2048 / b])?);
            let bytes = largest(|| {
                let y = lokr_linear(&x.value(), &weight, None, &w1.value(), &w2.value(), 0.5, Some(path))?;
                ops::backward(vec![(y.clone(), y.tensor().clone())])
            })?;
            assert!(bytes > 0 && bytes <= BLOCKS, "{stored:?} {path:?}: {bytes}");
            assert!(w1.grad().is_some() && w2.grad().is_some() && x.grad().is_some());
        }
    }
    Ok(())
}

#[test]
fn an_adapted_convolution_has_no_full_size_gradient() -> Result<()> {
    let _alone = alone();
    for (stored, path) in STORED.into_iter().flat_map(|stored| [(stored, Path::Merged), (stored, Path::Factored)]) {
        for ((a, b), (k, stride, padding, side)) in [(8, 8), (4, 8), (8, 4)].into_iter().flat_map(|f| CONVOLUTIONS.map(|c| (f, c))) {
            let channels = if k == 1 { 2048 } else { 512 };
            let (weight, x) = (ones(&[channels, channels, k, k])?.to_dtype(stored)?, factor(&[1, channels, side, side])?);
            let (w1, w2) = (factor(&[a, b])?, factor(&[channels / a, channels / b, k, k])?);
            let bytes = largest(|| {
                let y = lokr_conv2d(&x.value(), &weight, None, &w1.value(), &w2.value(), 0.5, (stride, padding), Some(path))?;
                ops::backward(vec![(y.clone(), y.tensor().clone())])
            })?;
            // 9.4 MB would be a dW, 16.8 MB one of 1x1.
            assert!(bytes > 0 && bytes <= BLOCKS, "{stored:?} {path:?} {a}x{b}, {k}x{k} stride {stride}: {bytes}");
        }
    }
    Ok(())
}

/// Attention holds the scores of some queries: 2048 of them with as many keys would be 16.8 MB, and are held by no buffer.
#[test]
fn attention_has_no_score_matrix() -> Result<()> {
    let _alone = alone();
    for causal in [false, true] {
        let [q, k, v] = [factor(&[1, 2048, 8])?, factor(&[1, 2048, 8])?, factor(&[1, 2048, 8])?];
        let bytes = largest(|| {
            let y = ops::attention(&q.value(), &k.value(), &v.value(), 1, causal)?;
            ops::backward(vec![(y.clone(), y.tensor().clone())])
        })?;
        // Both kinds of scores of a chunk, for one thread, and a cache line.
        let chunk = ops::attention_buffers(2048, 1) + 64;
        assert!(bytes > 0 && bytes <= chunk && chunk < 4 << 20, "{bytes}");
    }
    Ok(())
}

/// The count can fail: the widened weight that this path needs where products are not fused is seen.
#[test]
fn a_buffer_of_the_weights_size_would_be_seen() -> Result<()> {
    let _alone = alone();
    let (weight, w1, w2) = (ones(&[1024, 1024])?, ones(&[8, 8])?, ones(&[128, 128])?);
    let bytes = largest(|| lokr::functional::merged_weight(&weight, &w1, &w2, 1.0).map(|_| ()))?;
    assert!(bytes >= 4 << 20, "{bytes}");
    Ok(())
}
