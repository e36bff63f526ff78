//! A weight that lies in a mapped file gives, bit for bit, what the same weight in a tensor gives, and is refused where it cannot be read
//! in place.

mod common;

use bytes::Bytes;
use candle_core::{DType, Tensor};
use common::randn;
use ops::kernel::{Delta, Frozen};
use ops::{Mapped, Parameter, Weight};

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn raw(tensor: &Tensor) -> Vec<u8> {
    let mut raw = Vec::new();
    tensor.write_bytes(&mut raw).unwrap();
    raw
}

/// The tensor's bytes, `shift` bytes past a border of 64.
fn at(tensor: &Tensor, shift: usize) -> Bytes {
    let raw = raw(tensor);
    let mut room = vec![0u8; raw.len() + 128];
    let start = room.as_ptr().align_offset(64) + shift;
    room[start..start + raw.len()].copy_from_slice(&raw);
    Bytes::from(room).slice(start..start + raw.len())
}

fn mapped(tensor: &Tensor) -> Weight {
    Weight::Mapped(Mapped::new(at(tensor, 0), tensor.dtype(), tensor.dims()).expect("aligned"))
}

#[test]
fn layers_compute_the_same() {
    for stored in TYPES {
        let linear = randn(&[24, 40], 1).to_dtype(stored).unwrap();
        let conv = randn(&[24, 16, 3, 3], 2).to_dtype(stored).unwrap();
        for compute in TYPES {
            let run = |weight: Weight, shape: &[usize], op: &dyn Fn(&ops::Value, &Weight) -> ops::Value| {
                let x = Parameter::new("x", randn(shape, 3));
                let y = op(&ops::to_dtype(&x.value(), compute).unwrap(), &weight);
                let (out, dy) = (raw(y.tensor()), randn(y.dims(), 4).to_dtype(compute).unwrap());
                ops::backward(vec![(y, dy)]).unwrap();
                (out, raw(&x.grad().unwrap()))
            };
            let as_linear: &dyn Fn(&ops::Value, &Weight) -> ops::Value = &|x, w| ops::linear(x, w, None).unwrap();
            let as_conv: &dyn Fn(&ops::Value, &Weight) -> ops::Value = &|x, w| ops::conv2d(x, w, None, 1, 1).unwrap();
            for (weight, shape, op) in [(&linear, &[5, 40][..], as_linear), (&conv, &[2, 16, 6, 7][..], as_conv)] {
                assert!(run(weight.into(), shape, op) == run(mapped(weight), shape, op), "{stored:?} in {compute:?}, {shape:?}");
            }
        }
    }
}

#[test]
fn an_adapter_is_added_on_the_way() {
    for stored in TYPES {
        let weight = randn(&[24, 40], 1).to_dtype(stored).unwrap();
        let (w1, w2, x) = (randn(&[4, 8], 2), randn(&[6, 5], 3), randn(&[9, 40], 4));
        let delta = Some(Delta { w1: &w1, w2: &w2 });
        let run = |weight| raw(&ops::kernel::linear_forward(&x, Frozen { weight, delta }, None).unwrap());
        assert!(run(Weight::from(&weight)) == run(mapped(&weight)), "{stored:?}");
    }
}

#[test]
fn only_what_can_be_read_in_place_is_taken() {
    let t = randn(&[6, 4], 1);
    let new = |t: &Tensor, shift, dtype, shape: &[usize]| Mapped::new(at(t, shift), dtype, shape);
    let half = t.to_dtype(DType::F16).unwrap();
    assert!(new(&t, 4, DType::F32, &[6, 4]).is_some());
    assert!(new(&t, 2, DType::F32, &[6, 4]).is_none(), "between two elements");
    assert!(new(&half, 2, DType::F16, &[6, 4]).is_some());
    assert!(new(&half, 1, DType::F16, &[6, 4]).is_none(), "between two elements");
    assert!(new(&t, 0, DType::F32, &[6, 5]).is_none(), "too few");
    assert!(new(&t, 0, DType::F32, &[6, 3]).is_none(), "too many");
    assert!(new(&t, 0, DType::U8, &[96]).is_none(), "codes are widened");
    assert!(raw(&mapped(&half).tensor().unwrap()) == raw(&half));
}
