//! The factored gradients against the reference, for both orders of the sums, and for what needs no gradient.

use super::close;
use crate::functional::{Path, lokr_conv2d, lokr_linear};
use crate::{Layer, reference};
use candle_core::{Device, Tensor};
use ops::{Parameter, Value};
use random::{Purpose, Stream};

fn random(seed: u64, dims: &[usize]) -> Tensor {
    let values = Stream::new(seed, Purpose::Noise, 0, 0).normal(dims.iter().product());
    Tensor::from_vec(values, dims, &Device::Cpu).expect("a tensor")
}

/// Sums of up to 3000 products in f32: 1e-6 each of the largest value, a few of them in one direction.
const TOLERANCE: f32 = 5e-6;

#[test]
fn linear_gradients_equal_the_reference_for_tall_wide_and_square_w1() {
    for (a, b, c, d) in [(4, 4, 6, 5), (2, 8, 6, 5), (8, 2, 3, 7), (1, 1, 12, 9), (1, 6, 4, 1), (5, 1, 1, 3)] {
        for path in [Path::Merged, Path::Factored] {
            let (weight, x, dy) = (random(1, &[a * c, b * d]), random(2, &[3, 4, b * d]), random(3, &[3, 4, a * c]));
            let (w1, w2) = (random(4, &[a, b]), random(5, &[c, d]));
            let (px, p1, p2) = (Parameter::new("x", x.clone()), Parameter::new("w1", w1.clone()), Parameter::new("w2", w2.clone()));
            let out = lokr_linear(&px.value(), &weight, None, &p1.value(), &p2.value(), 0.7, Some(path)).expect("runs");
            let want = reference::forward(Layer::Linear, &x, &weight, None, &w1, &w2, 0.7).expect("runs");
            let what = format!("a {a} b {b} c {c} d {d} {path:?}");
            close(out.tensor(), &want, TOLERANCE, &what);
            ops::backward(vec![(out, dy.clone())]).expect("runs");
            let (dx, dw1, dw2) = reference::backward(Layer::Linear, &x, &weight, &w1, &w2, 0.7, &dy).expect("runs");
            close(&px.grad().expect("dx"), &dx, TOLERANCE, &format!("dx {what}"));
            close(&p1.grad().expect("dw1"), &dw1, TOLERANCE, &format!("dw1 {what}"));
            close(&p2.grad().expect("dw2"), &dw2, TOLERANCE, &format!("dw2 {what}"));
        }
    }
}

#[test]
fn convolution_gradients_equal_the_reference_for_tall_wide_and_square_w1() {
    for (a, b, c, d, k, stride, padding) in
        [(4, 4, 3, 2, 3, 1, 1), (2, 4, 3, 2, 3, 2, 1), (4, 2, 3, 2, 3, 2, 1), (3, 1, 2, 4, 1, 1, 0), (2, 3, 2, 3, 3, 1, 0)]
    {
        for path in [Path::Merged, Path::Factored] {
            let layer = Layer::Conv2d { stride, padding };
            let (weight, x) = (random(1, &[a * c, b * d, k, k]), random(2, &[2, b * d, 7, 6]));
            let (w1, w2) = (random(4, &[a, b]), random(5, &[c, d, k, k]));
            let (px, p1, p2) = (Parameter::new("x", x.clone()), Parameter::new("w1", w1.clone()), Parameter::new("w2", w2.clone()));
            let out = lokr_conv2d(&px.value(), &weight, None, &p1.value(), &p2.value(), 0.7, (stride, padding), Some(path)).expect("runs");
            let want = reference::forward(layer, &x, &weight, None, &w1, &w2, 0.7).expect("runs");
            let what = format!("a {a} b {b} c {c} d {d} k {k} stride {stride} padding {padding} {path:?}");
            close(out.tensor(), &want, TOLERANCE, &what);
            let dy = random(3, out.dims());
            ops::backward(vec![(out, dy.clone())]).expect("runs");
            let (dx, dw1, dw2) = reference::backward(layer, &x, &weight, &w1, &w2, 0.7, &dy).expect("runs");
            close(&px.grad().expect("dx"), &dx, TOLERANCE, &format!("dx {what}"));
            close(&p1.grad().expect("dw1"), &dw1, TOLERANCE, &format!("dw1 {what}"));
            close(&p2.grad().expect("dw2"), &dw2, TOLERANCE, &format!("dw2 {what}"));
        }
    }
}

/// The directional derivative of the loss, by differences, against the gradients: the reference could share a mistake.
#[test]
fn gradients_are_the_slope_of_the_output() {
    let (weight, x, dy) = (random(1, &[12, 20]), random(2, &[6, 20]), random(3, &[6, 12]));
    let (w1, w2, v1, v2) = (random(4, &[4, 5]), random(5, &[3, 4]), random(6, &[4, 5]), random(7, &[3, 4]));
    let loss = |step: f64| {
        let (w1, w2) = ((&w1 + (&v1 * step).unwrap()).unwrap(), (&w2 + (&v2 * step).unwrap()).unwrap());
        let y =
            lokr_linear(&Value::constant(x.clone()), &weight, None, &Value::constant(w1), &Value::constant(w2), 1.3, Some(Path::Factored));
        (y.expect("runs").tensor() * &dy).and_then(|y| y.sum_all()).and_then(|y| y.to_scalar::<f32>()).expect("a number") as f64
    };
    let (p1, p2) = (Parameter::new("w1", w1.clone()), Parameter::new("w2", w2.clone()));
    let out = lokr_linear(&Value::constant(x.clone()), &weight, None, &p1.value(), &p2.value(), 1.3, None).expect("runs");
    ops::backward(vec![(out, dy.clone())]).expect("runs");
    let dot = |g: Tensor, v: &Tensor| (g * v).and_then(|t| t.sum_all()).and_then(|t| t.to_scalar::<f32>()).expect("a number") as f64;
    let slope = dot(p1.grad().expect("dw1"), &v1) + dot(p2.grad().expect("dw2"), &v2);
    // The loss is quadratic in the step, so the central difference is exact but for f32's rounding of a loss of some 100.
    let measured = (loss(0.05) - loss(-0.05)) / 0.1;
    assert!((slope - measured).abs() < 1e-3 * slope.abs().max(1.0), "slope {slope}, measured {measured}");
}

#[test]
fn only_what_is_needed_is_recorded() {
    let (weight, x) = (random(1, &[12, 20]), Value::constant(random(2, &[6, 20])));
    let (w1, w2) = (Value::constant(random(4, &[4, 5])), Value::constant(random(5, &[3, 4])));
    let out = lokr_linear(&x, &weight, None, &w1, &w2, 1.0, None).expect("runs");
    assert!(!out.requires_grad());
    let trained = Parameter::new("w2", w2.tensor().clone());
    let out = lokr_linear(&x, &weight, None, &w1, &trained.value(), 1.0, None).expect("runs");
    assert!(out.requires_grad());
    ops::backward(vec![(out, random(3, &[6, 12]))]).expect("runs");
    assert!(trained.grad().is_some());
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let x = Value::constant(random(2, &[6, 20]));
    let (w1, w2) = (Value::constant(random(4, &[4, 5])), Value::constant(random(5, &[3, 4])));
    let error = lokr_linear(&x, random(1, &[12, 21]), None, &w1, &w2, 1.0, None).err().expect("refused");
    assert!(error.to_string().contains("[12, 21]") && error.to_string().contains("[4, 5]"), "{error}");
}

#[test]
fn the_cheaper_path_follows_the_rows() {
    use candle_core::DType::{F16, F32};
    let layer = [8, 8, 160, 160];
    assert_eq!(Path::choose(4096, layer, 1, F32, F32), Path::Merged);
    assert_eq!(Path::choose(4, layer, 1, F32, F32), Path::Factored);
    // GEGLU's projection under factor 2: one product beats a chain of half its size from a few rows on.
    let wide = [2, 2, 5120, 640];
    assert_eq!(Path::choose(2, wide, 1, F32, F32), Path::Factored);
    assert_eq!(Path::choose(128, wide, 1, F32, F32), Path::Merged);
    assert_eq!(Path::choose(4096, layer, 1, F16, F16), Path::Factored);
}
