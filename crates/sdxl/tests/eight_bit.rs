//! The frozen base in 8 bits: what is kept in which type, what it takes, and that a layer computes with exactly what its codes say.

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use ops::{Value, Weight};
use sdxl::Sdxl;
use sdxl::checkpoint::{Checkpoint, HeadDims};
use sdxl::layers::{Leaf, ModuleTree};

fn golden(name: &str) -> PathBuf {
    std::env::var_os("LOKR_GOLDEN")
        .map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden").into(), PathBuf::from)
        .join(name)
}

const TINY: HeadDims = HeadDims { head_dim: 8, norm_num_groups: 8, te1_heads: 2, te2_heads: 4, vae_norm_num_groups: 16 };

fn checkpoint() -> Checkpoint {
    Checkpoint::open(&golden("tiny-sdxl.safetensors")).unwrap().with_head_dims(TINY)
}

/// Weights of linear layers and convolutions, and the other tensors of layers.
fn tensors(tree: &ModuleTree) -> (Vec<&Weight>, Vec<&Tensor>) {
    let (mut weights, mut others) = (vec![], vec![]);
    for node in &tree.nodes {
        match &node.leaf {
            Leaf::Linear(l) => {
                weights.push(&l.weight);
                others.extend(&l.bias);
            }
            Leaf::Conv2d(l) => {
                weights.push(&l.weight);
                others.extend(&l.bias);
            }
            Leaf::Norm(l) => others.extend([&l.weight, &l.bias]),
            Leaf::Other => {}
        }
    }
    (weights, others)
}

fn bytes(weights: &[&Weight]) -> usize {
    weights.iter().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
}

#[test]
fn weights_take_a_byte_for_each_number_and_the_rest_stays_as_it_is() {
    let checkpoint = checkpoint();
    let full = Sdxl::load(&checkpoint, DType::F32).unwrap();
    let all = Sdxl::load_as(&checkpoint, DType::F8E4M3, DType::F8E4M3).unwrap();
    let unet = Sdxl::load_as(&checkpoint, DType::F16, DType::F8E4M3).unwrap();
    for (eight, full) in [(&all.unet.tree, &full.unet.tree), (&all.te1.tree, &full.te1.tree), (&all.te2.tree, &full.te2.tree)] {
        let ((weights, others), (plain, _)) = (tensors(eight), tensors(full));
        assert_eq!(bytes(&weights) * 4, bytes(&plain), "a quarter of f32");
        assert!(weights.iter().all(|t| t.dtype() == DType::U8));
        // Biases as in the file, norms widened as always.
        assert!(others.iter().all(|t| matches!(t.dtype(), DType::F16 | DType::F32)));
        for (codes, plain) in weights.iter().zip(&plain) {
            let codes: Vec<u8> = codes.tensor().unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let values: Vec<f32> = plain.tensor().unwrap().flatten_all().unwrap().to_vec1().unwrap();
            assert!(codes.iter().zip(&values).all(|(&c, &v)| c == ops::e4m3_encode(v)));
        }
    }
    assert!(tensors(&unet.te1.tree).0.iter().all(|t| t.dtype() == DType::F16), "only the UNet is in 8 bits");
    assert!(tensors(&unet.unet.tree).0.iter().all(|t| t.dtype() == DType::U8));
}

/// Forward and input gradient of layers in 8 bits are those of a layer that holds the decoded values, bit for bit.
#[test]
fn a_layer_computes_with_what_its_codes_say() {
    let model = Sdxl::load_as(&checkpoint(), DType::F32, DType::F8E4M3).unwrap();
    let (mut linear, mut conv) = (0, 0);
    for node in &model.unet.tree.nodes {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let like = |dims: &[usize]| {
                let n: usize = dims.iter().product();
                let values: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
                Tensor::from_vec(values, dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
            };
            let same = |run: &dyn Fn(&Tensor, &Value) -> Value, weight: &Tensor, x: Tensor| {
                let flat = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let plain = ops::widen(weight, DType::F32).unwrap();
                let of = |weight: &Tensor| {
                    let p = ops::Parameter::new("x", x.to_dtype(DType::F32).unwrap());
                    let y = run(weight, &ops::to_dtype(&p.value(), dtype).unwrap());
                    let out = flat(y.tensor());
                    let dy = like(y.dims());
                    ops::backward(vec![(y, dy)]).unwrap();
                    (out, flat(&p.grad().unwrap()))
                };
                assert!(of(weight) == of(&plain), "{} {dtype:?}", node.path);
            };
            match &node.leaf {
                Leaf::Linear(l) if linear < 9 => {
                    linear += 1;
                    let run = |w: &Tensor, x: &Value| ops::linear(x, w, l.bias.as_ref()).unwrap();
                    same(&run, &l.weight.tensor().unwrap(), like(&[3, l.weight.dims()[1]]));
                }
                Leaf::Conv2d(l) if conv < 9 => {
                    conv += 1;
                    let run = |w: &Tensor, x: &Value| ops::conv2d(x, w, l.bias.as_ref(), l.stride, l.padding).unwrap();
                    same(&run, &l.weight.tensor().unwrap(), like(&[2, l.weight.dims()[1], 6, 6]));
                }
                _ => {}
            }
        }
    }
    assert_eq!((linear, conv), (9, 9));
}
