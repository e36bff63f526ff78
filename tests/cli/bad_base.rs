//! Base models that are none, or not whole.

use insta::assert_snapshot;

use crate::support::*;

/// What the program says to this base model.
fn refused(world: &World, base: &str) -> String {
    let err = world.train(&[&format!("model.base={base}")]).refusal();
    assert!(!world.run().join("checkpoints").exists());
    masked(&err, &world.folder)
}

#[test]
fn a_missing_file_is_named() {
    assert_snapshot!(refused(&World::new("base-missing"), "models/sdxl.safetensors"), @r#"
    error: model.base = "models/sdxl.safetensors" does not exist
    hint: relative paths start at the current folder, [folder]: go to another one or correct model.base
    "#);
}

#[test]
fn a_stable_diffusion_1_model_is_named_as_one() {
    let world = World::new("base-sd1");
    let names = [
        "model.diffusion_model.input_blocks.0.0.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "first_stage_model.encoder.conv_in.weight",
        "first_stage_model.decoder.conv_in.weight",
    ];
    write_tensors(&world.path("v1-5.safetensors"), &names);
    assert_snapshot!(refused(&world, "v1-5.safetensors"), @"
    error: `v1-5.safetensors` is not an SDXL base model: it is a Stable Diffusion 1.x model
    hint: only Stable Diffusion XL and its fine-tunes can be trained here; give an SDXL model
    ");
}

#[test]
fn an_adapter_given_as_base_is_named_as_one() {
    let world = World::new("base-adapter");
    assert_snapshot!(refused(&world, &golden("lokr-tiny.safetensors").display().to_string()), @"
    error: `[golden]/lokr-tiny.safetensors` is not an SDXL base model: it is an adapter (LoRA, LoKr or alike)
    hint: give the SDXL model that the adapter was made for as the base; the adapter itself goes where an adapter is asked for
    ");
}

#[test]
fn a_file_that_is_cut_short_is_named_with_the_place() {
    let world = World::new("base-cut");
    let whole = bytes(golden("tiny-sdxl.safetensors"));
    for (name, length) in
        [("half.safetensors", whole.len() / 2), ("header.safetensors", 1000), ("start.safetensors", 5), ("empty.safetensors", 0)]
    {
        std::fs::write(world.path(name), &whole[..length]).expect("written");
    }
    assert_snapshot!(refused(&world, "half.safetensors"), @"
    error: safetensors file `half.safetensors`: it is cut short: tensor `model.diffusion_model.time_embed.2.weight` ends at byte 9858272 of the data, the file holds 4866136
    hint: the file is damaged or was not fully copied; fetch or write it again
    ");
    assert_snapshot!(refused(&world, "header.safetensors"), @"
    error: safetensors file `header.safetensors`: it is cut short: it declares a header of 125992 bytes, 992 follow
    hint: the file is damaged or was not fully copied; fetch or write it again
    ");
    assert_snapshot!(refused(&world, "start.safetensors"), @"
    error: safetensors file `start.safetensors`: it has 5 bytes; the header's length alone takes 8
    hint: the file is damaged or was not fully copied; fetch or write it again
    ");
    assert_snapshot!(refused(&world, "empty.safetensors"), @"
    error: safetensors file `empty.safetensors`: the file is empty
    hint: the file is damaged or was not fully copied; fetch or write it again
    ");
}

#[test]
fn missing_and_unexpected_tensors_are_listed_with_their_shapes() {
    let world = World::new("base-missing-tensor");
    let from = bytes(golden("tiny-sdxl.safetensors"));
    // The same length, so that the header stays valid.
    let (name, other) = (b"\"model.diffusion_model.out.0.bias\"", b"\"model.diffusion_model.out.9.bias\"");
    let at = from.windows(name.len()).position(|w| w == name).expect("the tensor is there");
    let renamed = [&from[..at], other, &from[at + name.len()..]].concat();
    std::fs::write(world.path("renamed.safetensors"), renamed).expect("written");
    assert_snapshot!(refused(&world, "renamed.safetensors"), @"
    error: `renamed.safetensors`: the unet does not fit
      missing (1):
        out.0.bias [16]
      unexpected (1):
        out.9.bias [16]
    ");
}

#[test]
fn a_wrong_head_width_is_named_with_what_it_does_not_divide() {
    let world = World::new("base-head-dim");
    let err = world.train(&["model.head_dim=7"]).refusal();
    assert_snapshot!(masked(&err, &world.folder), @"
    error: `[golden]/tiny-sdxl.safetensors`: head_dim = 7 does not divide 32 channels of the unet
    hint: an SDXL of other dimensions carries them in the metadata key `lokr.config` (single file) or in each part's config.json
    ");
    let err = world.train(&["model.te2_heads=5"]).refusal();
    assert!(err.contains("te2_heads = 5 does not divide 32"), "{err}");
    // Without [model], the values are SDXL's, which do not fit this model.
    let recipe = text(world.path("recipe.toml"));
    for key in ["head_dim", "norm_num_groups", "te1_heads", "te2_heads", "vae_norm_num_groups"] {
        let line = recipe.lines().find(|l| l.starts_with(key)).expect("the recipe has it");
        world.edit_recipe(&format!("{line}\n"), "");
    }
    let err = world.train(&[]).refusal();
    assert_snapshot!(masked(&err, &world.folder), @"
    error: `[golden]/tiny-sdxl.safetensors`: te1_heads = 12 does not divide 16 channels of the te1
    hint: an SDXL of other dimensions carries them in the metadata key `lokr.config` (single file) or in each part's config.json
    ");
}

#[test]
fn the_diffusers_folder_and_the_single_file_train_alike() {
    let (finished, _) = finished();
    let world = World::new("base-diffusers");
    // Compared by the tensors: the hash of the base model, and so the state, is another.
    world.train(&[&format!("model.base={}", golden("tiny-sdxl-diffusers").display())]).good();
    let adapter = |w: &World| tensors(checkpoint(&w.run(), 7).join("adapter.safetensors"));
    assert!(adapter(finished) == adapter(&world), "the adapters differ");
}
