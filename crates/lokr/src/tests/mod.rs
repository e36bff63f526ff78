//! Tests that take more than one part of the crate: against golden data, through files, on whole trees.

pub(crate) mod golden;

mod broken_file;
mod file;
mod gradient;
mod layer;
mod sdxl_tree;
mod tiny;
mod trees;

use candle_core::{D, Tensor};

/// The largest difference of two tensors, relative to the largest value of the second.
pub(crate) fn difference(got: &Tensor, want: &Tensor) -> f32 {
    assert_eq!(got.dims(), want.dims());
    let largest = |t: &Tensor| {
        let t = t.abs().and_then(|t| t.flatten_all()).and_then(|t| t.max(D::Minus1)).and_then(|t| t.to_scalar::<f32>());
        t.expect("a number")
    };
    let (error, scale) = (largest(&(got - want).expect("same shapes")), largest(want));
    // A tensor of zeros is compared absolutely.
    if scale == 0.0 { error } else { error / scale }
}

#[track_caller]
pub(crate) fn close(got: &Tensor, want: &Tensor, tolerance: f32, what: &str) {
    let error = difference(got, want);
    // Written so that NaN fails.
    assert!(error <= tolerance, "{what}: off by {error:e} of its largest value, {tolerance:e} is allowed");
}
