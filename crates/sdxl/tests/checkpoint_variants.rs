//! Files as programs in the wild write them: other VAEs, fp16 variants, shards, EMA copies, markers, unknown tensors.

#![allow(clippy::disallowed_methods)]

mod checkpoint_common;

use std::collections::BTreeMap;
use std::path::Path;

use checkpoint_common::*;
use sdxl::checkpoint::{Checkpoint, Layout, Part, export};
use storage::safetensors::SafeTensors;

const VAE_PREFIX: &str = "first_stage_model.";

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in storage::list_dir(from).unwrap() {
        let target = to.join(entry.file_name().unwrap());
        if entry.is_dir() { copy_folder(&entry, &target) } else { std::fs::copy(&entry, &target).map(drop).unwrap() }
    }
}

#[test]
fn a_vae_is_taken_in_any_of_its_forms() {
    let out = tempfile::tempdir().unwrap();
    let single = golden("tiny-sdxl.safetensors");
    let (bare, prefixed, base) = (out.path().join("bare"), out.path().join("prefixed"), out.path().join("base"));
    rewrite(&single, &bare, |name| name.strip_prefix(VAE_PREFIX).map(String::from));
    rewrite(&single, &prefixed, |name| name.starts_with(VAE_PREFIX).then(|| name.into()));
    rewrite(&single, &base, |name| (!name.starts_with(VAE_PREFIX)).then(|| name.into()));
    let without = Checkpoint::open(&base).unwrap();
    assert!(!without.has_part(Part::Vae));
    let (text, hint) = message(without.load(Part::Vae, "encoder.conv_in.weight"));
    assert!(text.ends_with("has no vae (autoencoder)") && hint.contains("VAE file"), "{text}");
    let folder = golden("tiny-sdxl-diffusers");
    for vae in [&bare, &prefixed, &single, &folder, &folder.join("vae"), &folder.join("vae/diffusion_pytorch_model.safetensors")] {
        let whole = Checkpoint::open(&base).unwrap().with_vae(vae).unwrap();
        assert_same(&tiny(), &whole);
        assert_eq!(whole.vae_path(), Some(vae.as_path()));
    }
    let own = Checkpoint::open(&base).unwrap().with_vae(&folder).unwrap();
    assert_eq!(own.head_dims().unwrap().vae_norm_num_groups, 16, "the VAE's own config speaks for it");
    let (text, hint) = message(Checkpoint::open(&base).unwrap().with_vae(&base));
    assert!(text.contains("holds no SDXL VAE") && hint.contains("a VAE's safetensors file"), "{text}");
    let (text, _) = message(Checkpoint::open(&base).unwrap().with_vae(&folder.join("unet/diffusion_pytorch_model.safetensors")));
    assert!(text.ends_with("holds no SDXL VAE: it is a UNet alone"), "{text}");
    let (text, _) = message(Checkpoint::open(&base).unwrap().with_vae(&folder.join("unet")));
    assert!(text.contains("holds no SDXL VAE"), "{text}");
}

#[test]
fn fp16_variants_and_shards_are_found() {
    let out = tempfile::tempdir().unwrap();
    copy_folder(&golden("tiny-sdxl-diffusers"), out.path());
    let text = out.path().join("text_encoder");
    std::fs::rename(text.join("model.safetensors"), text.join("model.fp16.safetensors")).unwrap();
    let unet = out.path().join("unet");
    let whole = unet.join("diffusion_pytorch_model.safetensors");
    let down = |name: &str| name.starts_with("down_blocks.");
    rewrite(&whole, &unet.join("one.safetensors"), |name| down(name).then(|| name.into()));
    rewrite(&whole, &unet.join("two.safetensors"), |name| (!down(name)).then(|| name.into()));
    let map: BTreeMap<String, &str> = SafeTensors::open(&whole)
        .unwrap()
        .names()
        .map(|name| (name.into(), if down(name) { "one.safetensors" } else { "two.safetensors" }))
        .collect();
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    std::fs::write(unet.join("diffusion_pytorch_model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::remove_file(&whole).unwrap();
    assert_same(&tiny(), &Checkpoint::open(out.path()).unwrap());
    std::fs::remove_file(unet.join("two.safetensors")).unwrap();
    let (message, _) = message(Checkpoint::open(out.path()));
    assert!(message.contains("two.safetensors"), "{message}");
}

#[test]
fn the_plain_file_goes_before_its_fp16_variant() {
    let out = tempfile::tempdir().unwrap();
    copy_folder(&golden("tiny-sdxl-diffusers"), out.path());
    std::fs::write(out.path().join("vae/diffusion_pytorch_model.fp16.safetensors"), b"not looked at").unwrap();
    assert_same(&tiny(), &Checkpoint::open(out.path()).unwrap());
}

#[test]
fn text_encoders_without_the_outer_name_are_read() {
    let out = tempfile::tempdir().unwrap();
    copy_folder(&golden("tiny-sdxl-diffusers"), out.path());
    for part in ["text_encoder", "text_encoder_2"] {
        let file = out.path().join(part).join("model.safetensors");
        rewrite(&golden("tiny-sdxl-diffusers").join(part).join("model.safetensors"), &file, |name| {
            Some(name.strip_prefix("text_model.").unwrap_or(name).into())
        });
    }
    assert_same(&tiny(), &Checkpoint::open(out.path()).unwrap());
}

#[test]
fn second_copies_are_dropped_and_markers_kept() {
    let out = tempfile::tempdir().unwrap();
    let (base, single, folder) = (out.path().join("base"), out.path().join("single"), out.path().join("folder"));
    // Another tensor stands in for each kind.
    rewrite(&golden("tiny-sdxl.safetensors"), &base, |name| {
        Some(match name {
            "conditioner.embedders.1.model.logit_scale" => "v_pred".into(),
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids" => "denoiser.sigmas".into(),
            "model.diffusion_model.out.2.bias" => "model_ema.decay".into(),
            "model.diffusion_model.out.0.bias" => "model.diffusion_model.novel.bias".into(),
            "first_stage_model.quant_conv.bias" => "first_stage_model.loss.logvar".into(),
            name => name.into(),
        })
    });
    let checkpoint = Checkpoint::open(&base).unwrap().with_head_dims(TINY);
    assert_eq!(checkpoint.prediction_type(), Some("v"));
    assert!(checkpoint.names(Part::Unet).any(|name| name == "novel.bias"), "unknown tensors stay visible");
    assert!(checkpoint.names(Part::Vae).all(|name| !name.contains("loss")));
    convert(&checkpoint, &folder, Layout::Diffusers).unwrap();
    convert(&Checkpoint::open(&folder).unwrap(), &single, Layout::SingleFile).unwrap();
    let file = SafeTensors::open(&single).unwrap();
    let names: Vec<&str> = file.names().collect();
    for kept in ["v_pred", "denoiser.sigmas", "model.diffusion_model.novel.bias"] {
        assert!(names.contains(&kept), "{kept}");
    }
    assert!(names.iter().all(|name| !name.starts_with("model_ema.") && !name.contains("loss.")));
    assert_eq!(file.metadata()["modelspec.prediction_type"], "v");
    let scheduler = std::fs::read_to_string(folder.join("scheduler/scheduler_config.json")).unwrap();
    assert!(scheduler.contains("v_prediction"), "{scheduler}");
}

#[test]
fn exports_refuse_to_overwrite_what_is_not_theirs() {
    let out = tempfile::tempdir().unwrap();
    let foreign = out.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("thesis.txt"), "years of work").unwrap();
    let (text, hint) = message(convert(&tiny(), &foreign, Layout::Diffusers));
    assert!(text.contains("no export has written") && hint.contains("another path"), "{text}");
    assert!(foreign.join("thesis.txt").is_file());
    let (text, _) = message(convert(&tiny(), &foreign, Layout::SingleFile));
    assert!(text.contains("a folder is there"), "{text}");
    let (text, _) = message(convert(&tiny(), &foreign.join("thesis.txt"), Layout::Diffusers));
    assert!(text.contains("a file is there"), "{text}");
    // An empty folder, and an older export, are replaced.
    let target = out.path().join("target");
    std::fs::create_dir(&target).unwrap();
    convert(&tiny(), &target, Layout::Diffusers).unwrap();
    std::fs::write(target.join("stale"), "").unwrap();
    convert(&tiny(), &target, Layout::Diffusers).unwrap();
    assert!(target.join("model_index.json").is_file() && !target.join("stale").exists());
    let base = out.path().join("base.safetensors");
    std::fs::copy(golden("tiny-sdxl.safetensors"), &base).unwrap();
    let (text, _) = message(convert(&Checkpoint::open(&base).unwrap(), &base, Layout::SingleFile));
    assert!(text.contains("the base model is there"), "{text}");
    let (text, _) = message(convert(&Checkpoint::open(&target).unwrap(), &target, Layout::Diffusers));
    assert!(text.contains("the base model is there"), "{text}");
    let left: Vec<_> = storage::list_dir(out.path()).unwrap();
    assert_eq!(left.len(), 3, "no scratch folders stay: {left:?}");
}

#[test]
fn a_failed_export_leaves_nothing_and_tells_the_edit_s_error() {
    let out = tempfile::tempdir().unwrap();
    for (layout, name) in [(Layout::SingleFile, "a.safetensors"), (Layout::Diffusers, "a")] {
        let wrong_shape = |part: Part, name: &str, tensor: candle_core::Tensor| {
            Ok(if part == Part::Vae && name == "quant_conv.bias" { tensor.narrow(0, 0, 1)? } else { tensor })
        };
        let (text, _) = message(export(&tiny(), &out.path().join(name), layout, None, &BTreeMap::new(), &wrong_shape));
        assert_eq!(text, "vae `quant_conv.bias` has shape [8]; the export's edit gave [1]");
        assert!(storage::list_dir(out.path()).unwrap().is_empty());
    }
    // Heads that do not fit are refused before anything is written.
    let default = Checkpoint::open(&golden("tiny-sdxl.safetensors")).unwrap();
    let (text, hint) = message(convert(&default, &out.path().join("a"), Layout::Diffusers));
    assert!(text.contains("does not divide") && hint.contains("lokr.config"), "{text}");
    assert!(storage::list_dir(out.path()).unwrap().is_empty());
}

#[test]
fn hashes_are_those_that_sd_scripts_writes() {
    // Made by sha256sum, and by `tail -c +1048577 | head -c 65536 | sha256sum`.
    let hash = tiny().hash().unwrap();
    assert_eq!(hash.sha256, SHA256);
    assert_eq!(hash.short, SHORT);
    let folder = Checkpoint::open(&golden("tiny-sdxl-diffusers")).unwrap().hash().unwrap();
    assert_eq!((folder.sha256.len(), folder.short.as_str()), (64, "IsADirectory"));
    // A file that ends before the hashed bytes: sd-scripts hashes nothing.
    let out = tempfile::tempdir().unwrap();
    let small = out.path().join("small");
    write_names(
        &small,
        &["model.diffusion_model.a", "conditioner.embedders.0.transformer.text_model.a", "conditioner.embedders.1.model.a"],
    );
    assert_eq!(Checkpoint::open(&small).unwrap().hash().unwrap().short, "e3b0c442");
}

const SHA256: &str = "5528c6990215bfabe629bf8fa71496dbe69f813e55e4c1d2d758559f0c23210f";
const SHORT: &str = "55089156";
