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

#[test]
fn a_frozen_linear_layer_allocates_nothing_of_its_weights_size() -> Result<()> {
    let _alone = alone();
    let (weight, x) = (ones(&[1024, 1024])?, factor(&[4, 1024])?);
    let bytes = largest(|| {
        let y = ops::linear(&x.value(), &weight, None)?;
        ops::backward(vec![(y.clone(), y.tensor().clone())])
    })?;
    assert!(bytes > 0 && bytes <= BLOCKS, "{bytes}");
    assert!(x.grad().is_some());
    Ok(())
}

#[test]
fn a_frozen_convolution_allocates_nothing_of_its_weights_size() -> Result<()> {
    let _alone = alone();
    let (weight, x) = (ones(&[512, 512, 3, 3])?, factor(&[1, 512, 4, 4])?);
    let bytes = largest(|| {
        let y = ops::conv2d(&x.value(), &weight, None, 1, 1)?;
        ops::backward(vec![(y.clone(), y.tensor().clone())])
    })?;
    assert!(bytes > 0 && bytes <= BLOCKS, "{bytes}");
    Ok(())
}

#[test]
fn an_adapted_linear_layer_has_no_full_size_gradient() -> Result<()> {
    let _alone = alone();
    for path in [Path::Merged, Path::Factored] {
        for (a, b) in [(8, 8), (4, 8), (8, 4)] {
            let (weight, x) = (ones(&[1024, 1024])?, factor(&[4, 1024])?);
            let (w1, w2) = (factor(&[a, b])?, factor(&[1024 / a, 1024 / b])?);
            let bytes = largest(|| {
                let y = lokr_linear(&x.value(), &weight, None, &w1.value(), &w2.value(), 0.5, Some(path))?;
                ops::backward(vec![(y.clone(), y.tensor().clone())])
            })?;
            assert!(bytes > 0 && bytes <= BLOCKS, "{path:?}: {bytes}");
            assert!(w1.grad().is_some() && w2.grad().is_some() && x.grad().is_some());
        }
    }
    Ok(())
}

#[test]
fn an_adapted_convolution_has_no_full_size_gradient() -> Result<()> {
    let _alone = alone();
    for path in [Path::Merged, Path::Factored] {
        let (weight, x) = (ones(&[512, 512, 3, 3])?, factor(&[1, 512, 4, 4])?);
        let (w1, w2) = (factor(&[8, 8])?, factor(&[64, 64, 3, 3])?);
        let bytes = largest(|| {
            let y = lokr_conv2d(&x.value(), &weight, None, &w1.value(), &w2.value(), 0.5, (1, 1), Some(path))?;
            ops::backward(vec![(y.clone(), y.tensor().clone())])
        })?;
        // 9.4 MB would be a dW.
        assert!(bytes > 0 && bytes <= BLOCKS, "{path:?}: {bytes}");
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
