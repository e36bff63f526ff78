//! Both layouts of one model give the same canonical tensors, bit for bit, and exports lead from each to the other and
//! back. The tiny model's two forms were written by others (tests/golden/README: bit-equal values).

#![allow(clippy::disallowed_methods)]

mod checkpoint_common;

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use checkpoint_common::*;
use sdxl::checkpoint::{Checkpoint, HeadDims, Layout, Part, export};
use storage::safetensors::SafeTensors;

#[test]
fn the_single_file_and_the_folder_give_the_same_tensors() {
    let (single, folder) = (tiny(), Checkpoint::open(&golden("tiny-sdxl-diffusers")).unwrap());
    assert_eq!((single.layout(), folder.layout()), (Layout::SingleFile, Layout::Diffusers));
    let counts = Part::ALL.map(|part| single.names(part).count());
    // 620 and 244 as in the folder's own files, 52 in te1, 69 in te2 (16 for each of 4 layers, and 5).
    assert_eq!(counts, [620, 52, 69, 244]);
    assert_same(&single, &folder);
    assert_eq!(folder.head_dims().unwrap(), TINY);
    assert_eq!(Checkpoint::open(&golden("tiny-sdxl.safetensors")).unwrap().head_dims().unwrap(), HeadDims::default());
    assert!(single.diffusers_config(Part::Unet).is_none());
    assert_eq!(folder.diffusers_config(Part::Vae).unwrap()["scaling_factor"], 0.13025);
    assert_eq!(folder.prediction_type(), Some("epsilon"));
}

#[test]
fn shapes_are_canonical() {
    let single = tiny();
    let shape = |part, name: &str| single.shape(part, name).unwrap();
    assert_eq!(shape(Part::Vae, "encoder.mid.attn_1.q.weight"), [32, 32]);
    assert_eq!(shape(Part::Vae, "quant_conv.weight"), [8, 8, 1, 1]);
    assert_eq!(shape(Part::TextEncoder2, "text_model.encoder.layers.3.self_attn.v_proj.weight"), [32, 32]);
    assert_eq!(shape(Part::TextEncoder2, "text_model.encoder.layers.3.self_attn.v_proj.bias"), [32]);
    let original = |part, name| single.original_name(part, name).unwrap();
    assert_eq!(original(Part::Unet, "out.2.bias"), "model.diffusion_model.out.2.bias");
    assert_eq!(
        original(Part::TextEncoder2, "text_model.encoder.layers.3.self_attn.v_proj.bias"),
        "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_bias"
    );
    assert_eq!(single.shape(Part::Unet, "nothing"), None);
    let (message, _) = message(single.load(Part::Unet, "nothing"));
    assert!(message.ends_with("the unet has no tensor `nothing`"), "{message}");
}

#[test]
fn buffers_are_no_part_of_the_networks() {
    let single = tiny();
    for part in Part::ALL {
        assert!(single.names(part).all(|name| !name.contains("position_ids") && !name.contains("logit_scale")), "{part}");
    }
}

#[test]
fn the_projection_can_be_read_as_sd_scripts_reads_it() {
    let name = "text_projection.weight";
    let mut single = tiny();
    let transposed = single.load(Part::TextEncoder2, name).unwrap();
    single.untransposed_text_projection(true);
    let raw = single.load(Part::TextEncoder2, name).unwrap();
    let file = SafeTensors::open(&golden("tiny-sdxl.safetensors")).unwrap();
    assert_eq!(bytes(&raw), file.bytes("conditioner.embedders.1.model.text_projection").unwrap());
    assert_eq!(bytes(&raw.t().unwrap()), bytes(&transposed));
    assert_ne!(bytes(&raw), bytes(&transposed));
    let mut folder = Checkpoint::open(&golden("tiny-sdxl-diffusers")).unwrap();
    folder.untransposed_text_projection(true);
    assert_eq!(bytes(&folder.load(Part::TextEncoder2, name).unwrap()), bytes(&transposed));
    // What was read so is written so.
    let out = tempfile::tempdir().unwrap();
    convert(&single, &out.path().join("a.safetensors"), Layout::SingleFile).unwrap();
    assert_same_file(&out.path().join("a.safetensors"), &golden("tiny-sdxl.safetensors"));
}

#[test]
fn single_to_folder_and_back_is_bit_equal_with_the_same_keys() {
    let out = tempfile::tempdir().unwrap();
    let (folder, back) = (out.path().join("folder"), out.path().join("back.safetensors"));
    convert(&tiny(), &folder, Layout::Diffusers).unwrap();
    let reopened = Checkpoint::open(&folder).unwrap();
    assert_same(&tiny(), &reopened);
    assert_eq!(reopened.head_dims().unwrap(), TINY);
    for part in ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"] {
        let file = format!("{part}.safetensors");
        assert_same_file(&folder.join(&file), &golden("tiny-sdxl-diffusers").join(&file));
    }
    convert(&reopened, &back, Layout::SingleFile).unwrap();
    assert_same_file(&back, &golden("tiny-sdxl.safetensors"));
    assert_eq!(Checkpoint::open(&back).unwrap().head_dims().unwrap(), TINY);
}

#[test]
fn folder_to_single_and_back_is_bit_equal() {
    let out = tempfile::tempdir().unwrap();
    let folder = Checkpoint::open(&golden("tiny-sdxl-diffusers")).unwrap();
    let single = out.path().join("single.safetensors");
    convert(&folder, &single, Layout::SingleFile).unwrap();
    let reopened = Checkpoint::open(&single).unwrap();
    assert_same(&folder, &reopened);
    convert(&reopened, &out.path().join("folder"), Layout::Diffusers).unwrap();
    assert_same(&folder, &Checkpoint::open(&out.path().join("folder")).unwrap());
}

#[test]
fn derived_configs_say_what_the_folder_of_others_says() {
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("folder");
    convert(&tiny(), &target, Layout::Diffusers).unwrap();
    let (ours, theirs) = (Checkpoint::open(&target).unwrap(), Checkpoint::open(&golden("tiny-sdxl-diffusers")).unwrap());
    for part in Part::ALL {
        for (key, value) in theirs.diffusers_config(part).unwrap().as_object().unwrap() {
            // The pictures' usual size is no property of the weights.
            if key != "sample_size" {
                assert_eq!(ours.diffusers_config(part).unwrap().get(key), Some(value), "{part} {key}");
            }
        }
    }
    let index: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(target.join("model_index.json")).unwrap()).unwrap();
    assert_eq!(index["_class_name"], "StableDiffusionXLPipeline");
    let json = |path: &str| serde_json::from_str::<serde_json::Value>(&std::fs::read_to_string(target.join(path)).unwrap()).unwrap();
    assert_eq!(json("scheduler/scheduler_config.json")["prediction_type"], "epsilon");
    for (folder, pad) in [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")] {
        assert_eq!(json(&format!("{folder}/tokenizer_config.json"))["pad_token"], pad);
        assert_eq!(json(&format!("{folder}/special_tokens_map.json"))["pad_token"], pad);
        let vocabulary = json(&format!("{folder}/vocab.json"));
        assert_eq!(vocabulary.as_object().unwrap().len(), 49408);
        assert_eq!((&vocabulary["!"], &vocabulary["<|endoftext|>"]), (&0.into(), &49407.into()));
        let merges = std::fs::read_to_string(target.join(folder).join("merges.txt")).unwrap();
        assert_eq!(merges.lines().count(), 1 + 48894);
        assert!(merges.starts_with("#version: 0.2\ni n\nt h\n"));
    }
}

#[test]
fn exports_edit_cast_and_describe() {
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("edited.safetensors");
    let metadata = BTreeMap::from([("modelspec.author".to_owned(), "somebody".to_owned())]);
    let double = |part: Part, name: &str, tensor: Tensor| {
        let edited = part == Part::TextEncoder2 && (name.ends_with("3.self_attn.k_proj.weight") || name == "text_projection.weight");
        Ok(if edited { (tensor.to_dtype(DType::F32)? * 2.0)? } else { tensor })
    };
    export(&tiny(), &target, Layout::SingleFile, Some(DType::F32), &metadata, &double).unwrap();
    let edited = Checkpoint::open(&target).unwrap();
    for part in Part::ALL {
        for name in edited.names(part) {
            let base = tiny().load(part, name).unwrap().to_dtype(DType::F32).unwrap();
            // Doubling is exact.
            let expected = double(part, name, base).unwrap();
            assert_eq!(bytes(&edited.load(part, name).unwrap()), bytes(&expected), "{part} {name}");
        }
    }
    let file = SafeTensors::open(&target).unwrap();
    let ids = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids";
    assert_eq!(file.info(ids).unwrap().dtype, storage::safetensors::Dtype::I64, "integers are not cast");
    let said = |key: &str| file.metadata().get(key).map(String::as_str);
    assert_eq!(said("modelspec.sai_model_spec"), Some("1.0.1"));
    assert_eq!(said("modelspec.architecture"), Some("stable-diffusion-xl-v1-base"));
    assert_eq!(said("modelspec.title"), Some("edited"));
    assert_eq!(said("modelspec.prediction_type"), Some("epsilon"));
    assert_eq!(said("modelspec.author"), Some("somebody"));
    assert_eq!(said("format"), Some("pt"));
}

#[test]
fn equal_exports_have_equal_bytes() {
    let out = tempfile::tempdir().unwrap();
    let write = |folder: &str| {
        let target = out.path().join(folder).join("m.safetensors");
        std::fs::create_dir(target.parent().unwrap()).unwrap();
        convert(&tiny(), &target, Layout::SingleFile).unwrap();
        std::fs::read(target).unwrap()
    };
    assert!(write("a") == write("b"));
}
