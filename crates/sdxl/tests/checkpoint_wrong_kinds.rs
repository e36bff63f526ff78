//! Each thing that people do give where an SDXL base model is wanted has its own message and a way out.

#![allow(clippy::disallowed_methods)]

mod checkpoint_common;

use std::path::Path;

use checkpoint_common::*;
use sdxl::checkpoint::{Checkpoint, Part};

const UNET: &str = "model.diffusion_model.input_blocks.0.0.weight";
const TE1: &str = "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight";
const TE2: &str = "conditioner.embedders.1.model.ln_final.weight";
const VAE: [&str; 2] = ["first_stage_model.encoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight"];

fn refused(names: &[&str]) -> (String, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    write_names(&path, names);
    let (text, hint) = message(Checkpoint::open(&path));
    (text.replace(&path.display().to_string(), "X"), hint)
}

#[test]
fn files_of_other_kinds_are_named() {
    let sd1 = [UNET, "cond_stage_model.transformer.text_model.final_layer_norm.weight", VAE[0], VAE[1]];
    let sd2 = [UNET, "cond_stage_model.model.ln_final.weight", VAE[0], VAE[1]];
    for (names, kind, way_out) in [
        (&sd1[..], "a Stable Diffusion 1.x model", "give an SDXL model"),
        (&sd2, "a Stable Diffusion 2.x model", "give an SDXL model"),
        (&[UNET, "conditioner.embedders.0.model.ln_final.weight", VAE[0]], "the SDXL refiner", "the SDXL base model"),
        (&["double_blocks.0.img_attn.proj.weight"], "a Flux model", "SDXL"),
        (&["model.diffusion_model.double_blocks.0.img_attn.proj.weight"], "a Flux model", "SDXL"),
        (&["model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight"], "a Stable Diffusion 3 model", "SDXL"),
        (&["lora_unet_input_blocks_4_1_proj_in.lokr_w1"], "an adapter", "as the base"),
        (&["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"], "an adapter", "as the base"),
        (&["unet.down_blocks.1.attentions.0.proj_in.lora_A.weight"], "an adapter", "as the base"),
        (&["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE alone", "as its VAE"),
        (&VAE, "a VAE alone", "as its VAE"),
        (&["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "a UNet alone", "the whole model"),
        (&[UNET], "a UNet alone", "the whole model"),
        (&["text_model.final_layer_norm.weight"], "a text encoder alone", "the whole model"),
        (&["control_model.input_hint_block.0.weight", UNET], "a ControlNet", "SDXL"),
        (&["clip_g", "clip_l"], "a textual inversion embedding", "SDXL"),
        (&["a", "b", "c", "d"], "a file with tensors as `a`, `b`, `c`", "SDXL"),
        (&[], "without tensors", "fetch it again"),
    ] {
        let (text, hint) = refused(names);
        assert!(text.starts_with("`X` is not an SDXL base model: it is ") && text.contains(kind), "{names:?}: {text}");
        assert!(hint.contains(way_out), "{names:?}: {hint}");
    }
}

#[test]
fn a_missing_part_is_named() {
    let (text, hint) = refused(&[UNET, TE2, VAE[0], VAE[1]]);
    assert_eq!(text, "`X` has no te1 (text encoder CLIP-L)");
    assert!(hint.contains("both text encoders"), "{hint}");
    let (text, _) = refused(&[UNET, TE1, VAE[0], VAE[1]]);
    assert_eq!(text, "`X` has no te2 (text encoder OpenCLIP bigG)");
}

#[test]
fn files_that_are_no_safetensors_are_refused_by_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes, what) in [
        ("model.ckpt", &b"PK\x03\x04 and a pickle inside"[..], "pickled"),
        ("old.pt", b"\x80\x02}q\x00 and more of it", "pickled"),
        ("page.safetensors", b"<!DOCTYPE html><html>not found</html>", "web page"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let (text, hint) = message(Checkpoint::open(&path));
        assert!(text.contains(name) && text.contains(what), "{text}");
        assert!(!hint.is_empty(), "{text}");
    }
    let (text, _) = message(Checkpoint::open(&folder.path().join("absent.safetensors")));
    assert!(text.contains("absent.safetensors"), "{text}");
}

fn folder_refused(make: impl FnOnce(&Path)) -> (String, String) {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path());
    let (text, hint) = message(Checkpoint::open(folder.path()));
    (text.replace(&folder.path().display().to_string(), "X"), hint)
}

#[test]
fn folders_of_other_kinds_are_named() {
    let index = |class: &str| {
        let text = format!("{{\"_class_name\": \"{class}\", \"text_encoder\": [null, null]}}");
        folder_refused(|folder| std::fs::write(folder.join("model_index.json"), text).unwrap()).0
    };
    assert!(index("FluxPipeline").contains("a Flux model"));
    assert!(index("StableDiffusion3Pipeline").contains("Stable Diffusion 3"));
    assert!(index("StableDiffusionPipeline").contains("Stable Diffusion 1.x"));
    assert!(index("PixArtSigmaPipeline").contains("a folder for diffusers' PixArtSigmaPipeline"));
    assert!(index("StableDiffusionXLImg2ImgPipeline").contains("the SDXL refiner"));
    let (text, hint) = folder_refused(|_| {});
    assert!(text.contains("a folder without `unet` in it") && hint.contains("model_index.json"), "{text}");
    let (text, _) = folder_refused(|folder| {
        std::fs::create_dir(folder.join("unet")).unwrap();
        std::fs::create_dir(folder.join("text_encoder")).unwrap();
    });
    assert!(text.contains("Stable Diffusion 1.x"), "{text}");
    let (text, hint) = folder_refused(|folder| {
        for part in Part::ALL {
            std::fs::create_dir(folder.join(part.folder())).unwrap();
        }
        std::fs::write(folder.join("unet/diffusion_pytorch_model.bin"), b"PK").unwrap();
    });
    assert!(text.contains("pickled") && hint.contains("safetensors"), "{text}");
    let (text, _) = folder_refused(|folder| {
        for part in Part::ALL {
            std::fs::create_dir(folder.join(part.folder())).unwrap();
        }
    });
    assert_eq!(text, "`X` has no unet (denoising network)");
    let (text, _) = folder_refused(|folder| std::fs::write(folder.join("model_index.json"), "{").unwrap());
    assert!(text.contains("model_index.json"), "{text}");
}

#[test]
fn a_fused_tensor_that_cannot_be_split_is_refused() {
    let name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight";
    let (text, _) = refused(&[UNET, TE1, TE2, name]);
    assert!(text.contains(name) && text.contains("[2, 2]"), "{text}");
}

#[test]
fn two_tensors_for_one_weight_are_refused() {
    let (a, b) = ("conditioner.embedders.1.model.text_projection", "conditioner.embedders.1.model.text_projection.weight");
    let (text, hint) = refused(&[UNET, TE1, TE2, a, b]);
    assert!(text.contains(a) && text.contains(b) && hint.contains("two layouts"), "{text}");
}
