//! `lokr export` and `lokr inspect`.

use insta::assert_snapshot;
use safetensors::tensor::Dtype;

use crate::support::*;

fn base() -> String {
    tiny_base().display().to_string()
}

fn adapter() -> String {
    finished().0.path("run/shapes.safetensors").display().to_string()
}

/// Draws one picture with a model.
fn draw(world: &World, model: &str, more: &[&str]) -> image::RgbImage {
    let args = ["sample", "--base", model, "--width", "64", "--height", "64", "--steps", "3", "--seed", "5", "--prompt", "disk, red"];
    world.lokr(&[&args, more, &["--out", "out.png"]].concat()).good();
    picture(world.path("out.png"))
}

#[test]
fn a_merged_model_draws_what_base_and_adapter_draw_in_both_layouts() {
    let world = World::new("merged");
    let with_adapter = draw(&world, &base(), &["--lokr", &adapter()]);
    assert!(difference(&draw(&world, &base(), &[]), &with_adapter) > 2, "the adapter would be within the bound");
    for (format, out) in [("single", "merged.safetensors"), ("diffusers", "merged")] {
        let args = ["export", "merged", "--base", &base(), "--lokr", &adapter(), "--format", format, "--precision", "float", "--out", out];
        let ran = world.lokr(&args).good();
        assert_eq!(ran.out, format!("wrote {out}: 300 tensors merged\n"));
        // The same numbers in another order: rounding, and then to 255 levels.
        let off = difference(&with_adapter, &draw(&world, out, &[]));
        assert!(off <= 2, "{format}: off by {off} levels");
    }
}

#[test]
fn a_merged_model_keeps_number_format_and_metadata_and_tells_what_was_merged() {
    let world = World::new("merged-f16");
    let args = ["export", "merged", "--base", &base(), "--lokr", &format!("{}:0.5", adapter()), "--out", "merged.safetensors"];
    world.lokr(&args).good();
    let (before, after) = (tensors(tiny_base()), tensors(world.path("merged.safetensors")));
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    for (name, tensor) in &before {
        assert_eq!((tensor.dtype, &tensor.shape), (after[name].dtype, &after[name].shape), "{name}");
        if name.starts_with("first_stage_model.") {
            assert!(tensor == &after[name], "{name}: the VAE is not adapted");
        }
    }
    assert!(before.iter().any(|(name, tensor)| *tensor != after[name]), "nothing was merged");
    let told = metadata(world.path("merged.safetensors"));
    assert_eq!(told.get("lokr.config"), metadata(tiny_base()).get("lokr.config"));
    assert_eq!(told.get("modelspec.merged_from").map(String::as_str), Some("tiny.safetensors, shapes.safetensors x 0.5"), "{told:?}");
}

#[test]
fn strength_0_merges_nothing() {
    let world = World::new("merged-0");
    world.lokr(&["export", "merged", "--base", &base(), "--lokr", &format!("{}:0", adapter()), "--out", "merged.safetensors"]).good();
    assert!(tensors(tiny_base()) == tensors(world.path("merged.safetensors")));
}

#[test]
fn an_export_overwrites_no_model_and_no_folder() {
    let world = World::new("merged-over");
    std::fs::copy(tiny_base(), world.path("base.safetensors")).expect("copied");
    std::fs::create_dir(world.path("folder")).expect("a folder");
    std::fs::write(world.path("folder/mine.txt"), "mine").expect("written");
    let refused = |base: &str, out: &str, format: &str| {
        world.lokr(&["export", "merged", "--base", base, "--lokr", &adapter(), "--out", out, "--format", format]).refusal()
    };
    assert_snapshot!(refused("base.safetensors", "base.safetensors", "single"), @"
    error: will not write to `base.safetensors`: the base model is there
    hint: choose another path, or remove what is there
    ");
    assert_snapshot!(refused("base.safetensors", "folder", "single"), @"
    error: will not write to `folder`: a folder is there, and the single-file layout is a file
    hint: choose another path, or remove what is there
    ");
    assert_snapshot!(refused("base.safetensors", "folder", "diffusers"), @"
    error: will not write to `folder`: the folder holds files that no export has written
    hint: choose another path, or remove what is there
    ");
    assert_same_file(tiny_base(), world.path("base.safetensors"));
    assert_eq!(listing(world.path("folder")), ["mine.txt"]);
}

#[test]
fn an_adapter_is_exported_from_a_run_and_from_one_of_its_checkpoints() {
    let (run, _) = finished();
    let out = World::new("export-lokr");
    let to = |name: &str| out.path(name).display().to_string();
    let ran = run.lokr(&["export", "lokr", "--run", "run", "--out", &to("whole.safetensors"), "--precision", "float"]).good();
    assert_eq!(ran.out, format!("wrote {} from run/checkpoints/step-00000007\n", to("whole.safetensors")));
    assert!(tensors(out.path("whole.safetensors")) == tensors(adapter()), "the run's adapter and the exported one differ");
    run.lokr(&["export", "lokr", "--run", "run/checkpoints/step-00000006", "--out", &to("six.safetensors"), "--precision", "float"]).good();
    assert!(tensors(out.path("six.safetensors")) == tensors(run.path("run/shapes-step00000006.safetensors")));

    run.lokr(&["export", "lokr", "--run", "run", "--out", &to("half.safetensors")]).good();
    let (whole, half) = (tensors(out.path("whole.safetensors")), tensors(out.path("half.safetensors")));
    assert_eq!(whole.keys().collect::<Vec<_>>(), half.keys().collect::<Vec<_>>());
    assert!(half.values().all(|t| t.dtype == Dtype::F16), "f16 is what is given away");
}

#[test]
fn what_an_exported_adapter_tells_of_its_run_is_true() {
    let (run, _) = finished();
    let out = World::new("export-lokr-metadata");
    let file = out.path("lokr.safetensors");
    run.lokr(&["export", "lokr", "--run", "run", "--out", &file.display().to_string(), "--precision", "float"]).good();
    let (of_run, exported) = (metadata(adapter()), metadata(file));
    let false_ones: Vec<_> = exported.iter().filter(|(key, value)| of_run.get(*key) != Some(value)).collect();
    assert!(false_ones.is_empty(), "{false_ones:#?}");
}

#[test]
fn a_folder_without_a_whole_checkpoint_gives_no_adapter() {
    let world = World::new("export-lokr-none");
    let err = world.lokr(&["export", "lokr", "--run", "pictures", "--out", "x.safetensors"]).refusal();
    assert_snapshot!(err, @"
    error: `pictures` has no whole checkpoint
    hint: name the folder of a run, its output.dir
    ");
}

#[test]
fn inspect_tells_what_a_file_is() {
    let (run, _) = finished();
    let world = World::new("inspect");
    let inspect = |path: &std::path::Path| masked(&world.lokr(&["inspect", &path.display().to_string()]).good().out, &run.folder);
    assert_snapshot!(inspect(tiny_base()), @"
    [base]: SDXL, single file, predicts epsilon (not said)
      unet    620 tensors      2,137,380 parameters  F16
      te1      52 tensors        801,632 parameters  F16
      te2      69 tensors      1,635,424 parameters  F16
      vae     244 tensors        354,391 parameters  F16
      unet channels [16, 32, 64], transformer depth [0, 1, 2] + 2, heads of 8, 8 groups, context 48, added condition 1568
    ");
    assert_snapshot!(inspect(&golden("tiny-sdxl-diffusers")), @"
    [golden]/tiny-sdxl-diffusers: SDXL, diffusers folder, predicts epsilon
      unet    620 tensors      2,137,380 parameters  F16
      te1      52 tensors        801,632 parameters  F16
      te2      69 tensors      1,635,424 parameters  F16
      vae     244 tensors        354,391 parameters  F16
      unet channels [16, 32, 64], transformer depth [0, 1, 2] + 2, heads of 8, 8 groups, context 48, added condition 1568
    ");
    assert_snapshot!(inspect(&run.path("run/shapes.safetensors")), @r#"
    [folder]/run/shapes.safetensors: lokr
      te1      18 modules    0 norms         2,376 parameters
      te2      24 modules    0 norms        12,384 parameters
      unet    258 modules    0 norms       501,640 parameters
      rank (modules): full (300)
      w1 (modules): 2x2 (300)
      types: {"f32": 900}
    "#);
    assert_snapshot!(inspect(&golden("lokr-tiny.safetensors")), @r#"
    [golden]/lokr-tiny.safetensors: lokr
      te1      18 modules    0 norms         1,320 parameters
      te2      24 modules    0 norms         2,592 parameters
      unet    260 modules    0 norms       251,168 parameters
      rank (modules): full (288), 2 (14)
      w1 (modules): 2x2 (90), 4x4 (164), 4x8 (5), 8x2 (1), 8x4 (5), 8x8 (37)
      types: {"f32": 920}
    "#);
    assert_snapshot!(inspect(&golden("delta-tiny.safetensors")), @r#"
    [golden]/delta-tiny.safetensors: lokr + norm
      te1      18 modules    0 norms         1,296 parameters
      te2      24 modules    0 norms         2,560 parameters
      unet    264 modules   97 norms       233,512 parameters
      rank (modules): full (306)
      w1 (modules): 2x2 (56), 2x4 (4), 2x6 (2), 2x8 (8), 4x2 (2), 4x4 (170), 4x6 (2), 4x8 (13), 8x2 (4), 8x4 (6), 8x8 (39)
      types: {"f32": 1112}
    "#);
    let ran = world.lokr(&["inspect", "--metadata", &adapter()]).good();
    assert!(ran.out.contains("\n  ss_output_name = shapes\n"), "{}", ran.all());
}

#[test]
fn inspect_says_what_a_file_is_not() {
    let world = World::new("inspect-refused");
    let refused = |path: &str| masked(&world.lokr(&["inspect", path]).refusal(), &world.folder);
    assert_snapshot!(refused("none.safetensors"), @"
    error: cannot read `none.safetensors`
      because: No such file or directory (os error 2)
    hint: the path is relative to the current folder `[folder]`
    ");
    assert_snapshot!(refused("pictures"), @"
    error: `pictures` is not an SDXL base model: it is a folder without `unet` in it
    hint: give a single .safetensors file, or the diffusers folder that holds model_index.json
    ");
    assert_snapshot!(refused(&golden("forward.safetensors").display().to_string()), @"
    error: `[golden]/forward.safetensors` is not an SDXL base model: it is a file with tensors as `ids1`, `ids2`, `te1.last`
    hint: only Stable Diffusion XL and its fine-tunes can be trained here; give an SDXL model
    ");
    std::fs::write(world.path("half.safetensors"), &bytes(adapter())[..5000]).expect("written");
    assert_snapshot!(refused("half.safetensors"), @"
    error: safetensors file `half.safetensors`: it is cut short: it declares a header of 115040 bytes, 4992 follow
    hint: the file is damaged or was not fully copied; fetch or write it again
    ");
    assert!(refused("pictures/00.png").contains("`pictures/00.png`"));
}
