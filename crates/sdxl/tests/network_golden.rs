//! UNet, text encoders and VAE of the tiny SDXL, from both layouts, against what diffusers, transformers and SGM gave.

use std::path::PathBuf;

use candle_core::{DType, Tensor};
use ops::{Value, Weight};
use sdxl::checkpoint::{Checkpoint, HeadDims, Shapes};
use sdxl::conditioning::{added_condition, timestep_embedding};
use sdxl::layers::Leaf;
use sdxl::{Error, GradientCheckpointing, Sdxl};
use storage::safetensors::SafeTensors;

fn golden(name: &str) -> PathBuf {
    std::env::var_os("LOKR_GOLDEN")
        .map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden").into(), PathBuf::from)
        .join(name)
}

/// The tiny model's numbers that its tensors do not show (tests/golden/tiny-sdxl.json).
const TINY: HeadDims = HeadDims { head_dim: 8, norm_num_groups: 8, te1_heads: 2, te2_heads: 4, vae_norm_num_groups: 16 };

fn tiny() -> [(&'static str, Sdxl); 2] {
    let single = Checkpoint::open(&golden("tiny-sdxl.safetensors")).unwrap().with_head_dims(TINY);
    let folder = Checkpoint::open(&golden("tiny-sdxl-diffusers")).unwrap();
    assert_eq!(folder.head_dims().unwrap(), TINY);
    [("single file", Sdxl::load(&single, DType::F32).unwrap()), ("diffusers", Sdxl::load(&folder, DType::F32).unwrap())]
}

struct Forward(SafeTensors);

impl Forward {
    fn open() -> Self {
        Self(SafeTensors::open(&golden("forward.safetensors")).unwrap())
    }

    fn get(&self, name: &str) -> Tensor {
        let info = self.0.info(name).unwrap_or_else(|| panic!("no {name}"));
        let dtype = DType::try_from(info.dtype).unwrap();
        Tensor::from_raw_buffer(self.0.bytes(name).unwrap(), dtype, &info.shape, &candle_core::Device::Cpu).unwrap()
    }

    fn f32(&self, name: &str) -> Tensor {
        self.get(name).to_dtype(DType::F32).unwrap()
    }

    fn ids(&self, name: &str) -> Vec<Vec<u32>> {
        self.get(name).to_dtype(DType::U32).unwrap().to_vec2().unwrap()
    }
}

fn worst(got: &Tensor, want: &Tensor) -> f32 {
    assert_eq!(got.dims(), want.dims());
    (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// The golden README's bound.
fn close(what: &str, got: &Tensor, want: &Tensor, tolerance: f32) {
    let d = worst(got, want);
    assert!(d <= tolerance, "{what}: {d}");
}

#[test]
fn text_encoders() {
    let f = Forward::open();
    for (layout, model) in tiny() {
        let (ids1, ids2) = (f.ids("ids1"), f.ids("ids2"));
        let h1 = model.te1.penultimate(&ids1, GradientCheckpointing::None).unwrap();
        close(&format!("{layout} te1.penultimate"), h1.tensor(), &f.f32("te1.penultimate"), 2e-5);
        close(&format!("{layout} te1.last"), model.te1.last(&h1, GradientCheckpointing::None).unwrap().tensor(), &f.f32("te1.last"), 2e-5);
        let h2 = model.te2.penultimate(&ids2, GradientCheckpointing::None).unwrap();
        close(&format!("{layout} te2.penultimate"), h2.tensor(), &f.f32("te2.penultimate"), 2e-5);
        let last = model.te2.last(&h2, GradientCheckpointing::None).unwrap();
        close(&format!("{layout} te2.last"), last.tensor(), &f.f32("te2.last"), 2e-5);
        close(&format!("{layout} te2.pooled"), model.te2.pooled(&last, &ids2).unwrap().tensor(), &f.f32("te2.pooled"), 2e-5);
        let text = model.encode_text(&ids1, &ids2, 1, None, GradientCheckpointing::Block).unwrap();
        let context = Tensor::cat(&[f.f32("te1.penultimate"), f.f32("te2.penultimate")], 2).unwrap();
        close(&format!("{layout} context"), text.context.tensor(), &context, 2e-5);
    }
}

#[test]
fn sd_scripts_projection_is_untransposed() {
    let f = Forward::open();
    let mut single = Checkpoint::open(&golden("tiny-sdxl.safetensors")).unwrap().with_head_dims(TINY);
    single.untransposed_text_projection(true);
    let model = Sdxl::load(&single, DType::F32).unwrap();
    let ids = f.ids("ids2");
    let last = model.te2.last(&model.te2.penultimate(&ids, GradientCheckpointing::None).unwrap(), GradientCheckpointing::None).unwrap();
    close("pooled", model.te2.pooled(&last, &ids).unwrap().tensor(), &f.f32("te2.pooled_untransposed"), 2e-5);
}

#[test]
fn long_prompts_join_their_chunks() {
    let (_, model) = &tiny()[0];
    let f = Forward::open();
    // Two prompts of three rows each, made of the recorded rows.
    let (ids1, ids2) = (f.ids("ids1"), f.ids("ids2"));
    let rows = |ids: &[Vec<u32>]| [0, 1, 2, 2, 0, 1].map(|i: usize| ids[i].clone()).to_vec();
    let text = model.encode_text(&rows(&ids1), &rows(&ids2), 3, None, GradientCheckpointing::None).unwrap();
    assert_eq!(text.context.dims(), [2, 227, 48]);
    let h1 = f.f32("te1.penultimate");
    let at = |n: usize, t: usize| text.context.tensor().get(n).unwrap().get(t).unwrap().narrow(0, 0, 16).unwrap();
    let row = |r: usize, t: usize| h1.get(r).unwrap().get(t).unwrap();
    for (prompt, position, source, token) in [(0, 0, 0, 0), (0, 75, 0, 75), (0, 76, 1, 1), (0, 226, 2, 76), (1, 1, 2, 1), (1, 151, 1, 1)] {
        close(&format!("position {position}"), &at(prompt, position), &row(source, token), 2e-5);
    }
    let pooled = f.f32("te2.pooled");
    close("pooled", &text.pooled.tensor().get(1).unwrap(), &pooled.get(2).unwrap(), 2e-5);
}

#[test]
fn embeddings_and_unet() {
    let f = Forward::open();
    // cos and sin of arguments up to 1000 radians in f32 differ by the rounding of the argument: 6e-5.
    println!("temb {}", worst(&timestep_embedding(&f.get("temb.t"), 256).unwrap(), &f.f32("temb.out_256")));
    close("temb", &timestep_embedding(&f.get("temb.t"), 256).unwrap(), &f.f32("temb.out_256"), 1e-4);
    for (layout, model) in tiny() {
        for i in 0..2 {
            let get = |name: &str| f.f32(&format!("unet.{i}.{name}"));
            let vector = added_condition(&Value::constant(get("pooled")), &f.get(&format!("unet.{i}.time_ids"))).unwrap();
            close("adm", vector.tensor(), &get("adm"), 1e-4);
            let (latents, context) = (Value::constant(get("latents")), Value::constant(get("context")));
            let mut tapped = 0;
            let out = model
                .unet
                .forward_with(&latents, &get("timesteps"), &context, &vector, GradientCheckpointing::None, &mut |name, value| {
                    if f.0.info(&format!("unet.{i}.{name}")).is_some() {
                        close(&format!("{layout} {i} {name}"), value.tensor(), &get(name), 1e-4);
                        tapped += 1;
                    }
                })
                .unwrap();
            assert_eq!(tapped, 12);
            close(&format!("{layout} {i} out"), out.tensor(), &get("out"), 1e-4);
            for checkpointing in [GradientCheckpointing::Block, GradientCheckpointing::Layer] {
                let again = model.unet.forward(&latents, &get("timesteps"), &context, &vector, checkpointing).unwrap();
                assert_eq!(worst(again.tensor(), out.tensor()), 0.0, "checkpointing changed the forward pass");
            }
        }
    }
}

#[test]
fn vae() {
    let f = Forward::open();
    let pixels = ((f.f32("vae.pixels_u8") / 127.5).unwrap() - 1.0).unwrap();
    for (layout, model) in tiny() {
        let (mean, logvar) = model.vae.encode(&pixels).unwrap();
        close(&format!("{layout} mean"), &mean, &f.f32("vae.mean"), 1e-4);
        close(&format!("{layout} logvar"), &logvar, &f.f32("vae.logvar"), 1e-4);
        close(&format!("{layout} scaled"), &(&mean * sdxl::vae::LATENT_SCALE).unwrap(), &f.f32("vae.scaled_latent"), 1e-4);
        close(&format!("{layout} decoded"), &model.vae.decode(&f.f32("vae.mean")).unwrap(), &f.f32("vae.decoded"), 1e-4);
    }
}

/// The VAE's weights are in memory only from the first use to the release, and come back the same.
#[test]
fn the_vae_is_read_when_it_is_needed() {
    let f = Forward::open();
    let (_, model) = &tiny()[0];
    assert!(!model.vae.is_loaded());
    let first = model.vae.decode(&f.f32("vae.mean")).unwrap();
    assert!(model.vae.is_loaded());
    model.vae.release();
    assert!(!model.vae.is_loaded());
    assert_eq!(worst(&model.vae.decode(&f.f32("vae.mean")).unwrap(), &first), 0.0);
}

/// Weights stay as the file has them, or become what is asked for; norms are f32. Computing widens them, so that f16 weights of an f16
/// file give what the same weights in f32 give.
#[test]
fn weights_are_kept_in_the_type_that_is_asked_for() {
    let f = Forward::open();
    let open = || Checkpoint::open(&golden("tiny-sdxl.safetensors")).unwrap().with_head_dims(TINY);
    let out = |model: &Sdxl| {
        let get = |name: &str| f.f32(&format!("unet.0.{name}"));
        let vector = added_condition(&Value::constant(get("pooled")), &f.get("unet.0.time_ids")).unwrap();
        let (latents, context) = (Value::constant(get("latents")), Value::constant(get("context")));
        model.unet.forward(&latents, &get("timesteps"), &context, &vector, GradientCheckpointing::None).unwrap().tensor().clone()
    };
    let wide = out(&Sdxl::load(&open(), DType::F32).unwrap());
    for (asked, kept) in
        [(None, DType::F16), (Some(DType::F16), DType::F16), (Some(DType::BF16), DType::BF16), (Some(DType::F32), DType::F32)]
    {
        let model = Sdxl::load(&open(), asked).unwrap();
        for node in model.unet.tree.nodes.iter().chain(&model.te1.tree.nodes).chain(&model.te2.tree.nodes) {
            match &node.leaf {
                Leaf::Linear(layer) => assert_eq!(layer.weight.dtype(), kept, "{}", node.path),
                Leaf::Conv2d(layer) => assert_eq!(layer.weight.dtype(), kept, "{}", node.path),
                Leaf::Norm(layer) => assert_eq!(layer.weight.dtype(), DType::F32, "{}", node.path),
                Leaf::Other => {}
            }
        }
        // bf16 keeps 8 bits of a weight: outputs of order one move by a few hundredths.
        let bound = if kept == DType::BF16 { 0.1 } else { 0.0 };
        let moved = worst(&out(&model), &wide);
        assert!(moved <= bound && (kept != DType::BF16 || moved > 0.0), "{asked:?}: {moved}");
    }
}

fn weights(model: &Sdxl) -> Vec<Weight> {
    let weight = |leaf: &Leaf| match leaf {
        Leaf::Linear(layer) => Some(layer.weight.clone()),
        Leaf::Conv2d(layer) => Some(layer.weight.clone()),
        Leaf::Norm(_) | Leaf::Other => None,
    };
    let nodes = model.te1.tree.nodes.iter().chain(&model.te2.tree.nodes).chain(&model.unet.tree.nodes);
    nodes.filter_map(|node| weight(&node.leaf)).collect()
}

/// Weights that need no conversion stay in the file's map, the thirds of a fused tensor too, and hold what a copy holds.
#[test]
fn weights_stay_in_the_map_where_nothing_is_done_to_them() {
    let files = [golden("tiny-sdxl.safetensors"), golden("tiny-sdxl-diffusers")];
    for file in files {
        let open = || Checkpoint::open(&file).unwrap().with_head_dims(TINY);
        let is_mapped = |w: &Weight| matches!(w, Weight::Mapped(_));
        let bytes = |w: &Weight| {
            let mut bytes = Vec::new();
            w.tensor().unwrap().write_bytes(&mut bytes).unwrap();
            bytes
        };
        let mapped = weights(&Sdxl::load(&open(), None).unwrap());
        // The single file's text projection is turned on the way.
        let turned = if file.is_file() { 1 } else { 0 };
        assert_eq!(mapped.iter().filter(|w| !is_mapped(w)).count(), turned, "{}", file.display());
        let copied = weights(&Sdxl::load(&open().with_mapped_weights(false), None).unwrap());
        assert!(copied.iter().all(|w| !is_mapped(w)));
        assert_eq!(mapped.len(), copied.len());
        assert!(mapped.iter().zip(&copied).all(|(a, b)| (a.dims(), a.dtype()) == (b.dims(), b.dtype()) && bytes(a) == bytes(b)));
        let converted = weights(&Sdxl::load(&open(), DType::F32).unwrap());
        assert!(converted.iter().all(|w| !is_mapped(w)), "the file is f16");
    }
}

/// A checkpoint of which only shapes are used gives the same modules, in the memory of none.
#[test]
fn a_model_without_weights_has_the_same_modules() {
    let open = || Checkpoint::open(&golden("tiny-sdxl.safetensors")).unwrap().with_head_dims(TINY);
    let (whole, bare) = (Sdxl::load(&open(), None).unwrap(), Sdxl::load(&open().without_weights(), None).unwrap());
    let described = Checkpoint::described(&golden("none"), &Shapes::tiny(), storage::safetensors::Dtype::F16).unwrap();
    let described = Sdxl::load(&described, None).unwrap();
    let modules = |model: &Sdxl| {
        let nodes = model.te1.tree.nodes.iter().chain(&model.te2.tree.nodes).chain(&model.unet.tree.nodes);
        let weight = |leaf: &Leaf| match leaf {
            Leaf::Linear(layer) => Some((layer.weight.dims().to_vec(), layer.weight.dtype())),
            Leaf::Conv2d(layer) => Some((layer.weight.dims().to_vec(), layer.weight.dtype())),
            Leaf::Norm(layer) => Some((layer.weight.dims().to_vec(), layer.weight.dtype())),
            Leaf::Other => None,
        };
        nodes.map(|n| (n.path.clone(), n.class, weight(&n.leaf))).collect::<Vec<_>>()
    };
    assert!(modules(&whole).len() > 300);
    assert_eq!(modules(&bare), modules(&whole));
    assert_eq!(modules(&described), modules(&whole));
}

#[test]
fn heads_that_do_not_divide_are_named() {
    let wrong = HeadDims { head_dim: 7, ..TINY };
    let single = Checkpoint::open(&golden("tiny-sdxl.safetensors")).unwrap().with_head_dims(wrong);
    let error = Sdxl::load(&single, DType::F32).err().unwrap().to_string();
    assert!(error.contains("head_dim = 7") && error.contains("32"), "{error}");
}

/// The tiny checkpoint with one tensor left out, one of another shape and one too many: all three are named at once.
#[test]
fn missing_misshapen_and_extra_tensors_are_all_listed() {
    let base = SafeTensors::open(&golden("tiny-sdxl.safetensors")).unwrap();
    let unet = "model.diffusion_model.";
    let mut tensors = Vec::new();
    for name in base.names() {
        let info = base.info(name).unwrap();
        let mut shape = info.shape.clone();
        if name == format!("{unet}middle_block.0.in_layers.2.bias") {
            continue;
        }
        if name == format!("{unet}middle_block.1.proj_in.weight") {
            shape = vec![shape[0] / 2, shape[1] * 2];
        }
        let bytes = base.bytes(name).unwrap();
        tensors.push(storage::safetensors::TensorSource {
            name: name.to_string(),
            dtype: info.dtype,
            shape,
            data: Box::new(move || bytes.into()),
        });
    }
    tensors.push(storage::safetensors::TensorSource {
        name: format!("{unet}middle_block.3.weight"),
        dtype: storage::safetensors::Dtype::F16,
        shape: vec![2],
        data: Box::new(|| vec![0u8; 4].into()),
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("broken.safetensors");
    storage::safetensors::write(&path, tensors, &Default::default()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap().with_head_dims(TINY);
    let error = Sdxl::load(&checkpoint, DType::F32).err().unwrap();
    assert!(
        matches!(&error, Error::Mismatch { missing, misshapen, extra, .. } if (missing.len(), misshapen.len(), extra.len()) == (1, 1, 1))
    );
    let text = error.to_string();
    for part in [
        "broken.safetensors",
        "middle_block.0.in_layers.2.bias [64]",
        "middle_block.1.proj_in.weight: [32, 128], expected [64, 64]",
        "middle_block.3.weight [2]",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}
