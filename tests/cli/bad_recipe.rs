//! Recipes that cannot be run: what is wrong, where, and the way out.

use insta::assert_snapshot;

use crate::support::*;

/// What the program refuses before it writes anything.
fn refused(world: &World, set: &[&str]) -> String {
    let err = masked(&world.train(set).refusal(), &world.folder);
    let left: Vec<String> = if world.run().exists() { listing(world.run()) } else { Vec::new() };
    assert!(left.iter().all(|f| f == "run.lock"), "{left:?}");
    err
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_name() {
    let world = World::new("unknown-key");
    world.edit_recipe("unet_lr = 2e-4", "unet_lrr = 2e-4");
    assert_snapshot!(refused(&world, &[]), @"");
}

#[test]
fn an_unknown_section_is_named_with_its_line_and_the_nearest_name() {
    let world = World::new("unknown-section");
    world.edit_recipe("[network]", "[netwrok]");
    assert_snapshot!(refused(&world, &[]), @"");
}

#[test]
fn all_faults_of_a_recipe_are_listed_at_once() {
    let world = World::new("several-faults");
    world.edit_recipe("batch_size = 2", "batch_size = \"2\"");
    world.edit_recipe("seed = 1", "sed = 1");
    world.edit_recipe("optimizer = \"Lion\"", "optimizer = \"lion8bt\"");
    world.edit_recipe("shuffle_caption = true", "shuffle_caption = 1");
    assert_snapshot!(refused(&world, &[]), @"");
}

#[test]
fn a_key_of_sd_scripts_is_translated() {
    let world = World::new("foreign-key");
    world.edit_recipe("batch_size = 2", "train_batch_size = 2\nlearning_rate = 1e-4");
    assert_snapshot!(refused(&world, &[]), @"");
}

#[test]
fn text_that_is_no_toml_is_named_with_line_and_column() {
    let world = World::new("no-toml");
    world.edit_recipe("factor = 2", "factor = = 2");
    let err = refused(&world, &[]);
    assert!(err.starts_with("error: recipe.toml:12:10: not valid TOML: "), "{err}");
}

#[test]
fn keys_that_do_not_go_together_are_both_named() {
    let world = World::new("contradiction");
    assert_snapshot!(refused(&world, &["train.max_train_epochs=2", "train.lr_warmup_steps=3"]), @"");
}

#[test]
fn a_wrong_set_argument_is_named_as_it_was_typed() {
    let world = World::new("wrong-set");
    assert_snapshot!(refused(&world, &["train.batch_size=two"]), @"");
    assert_snapshot!(refused(&world, &["train.batchsize=2"]), @"");
    assert_snapshot!(refused(&world, &["batch_size"]), @"");
}

#[test]
fn a_missing_recipe_is_named() {
    let world = World::new("missing-recipe");
    let err = world.lokr(&["train", "--config", "recipes/mine.toml"]).refusal();
    assert_snapshot!(masked(&err, &world.folder), @"");
}

#[test]
fn half_precision_on_the_cpu_is_refused_with_the_fix() {
    let world = World::new("half-precision");
    assert_snapshot!(refused(&world, &["train.mixed_precision=fp16"]), @"");
    assert_snapshot!(refused(&world, &["train.mixed_precision=bf16"]), @"");
}

#[test]
fn an_unknown_preset_is_named_with_the_nearest_name() {
    let world = World::new("unknown-preset");
    assert_snapshot!(refused(&world, &["network.preset=ful"]), @"");
    assert_snapshot!(refused(&world, &["network.preset=presets/mine.toml"]), @"");
}

#[test]
fn a_preset_that_adapts_nothing_is_refused_with_its_patterns() {
    let world = World::new("preset-of-nothing");
    let preset = "unet_target_module = ['Attention3D']\ntext_encoder_target_module = ['CLIPGate']\nunet_target_name = ['nowhere\\..*']\n";
    std::fs::write(world.path("preset.toml"), preset).expect("written");
    assert_snapshot!(refused(&world, &["network.preset=preset.toml"]), @"");
}

#[test]
fn a_preset_pattern_that_matches_nothing_is_named_and_the_rest_is_trained() {
    let world = World::new("preset-with-idle-pattern");
    let preset = "unet_target_module = ['Transformer2DModel', 'Attention3D']\ntext_encoder_target_module = ['CLIPAttention']\nunet_target_name = ['nowhere\\..*']\n";
    std::fs::write(world.path("preset.toml"), preset).expect("written");
    let ran = world.train(&["network.preset=preset.toml", "train.max_train_steps=1"]).good();
    assert_snapshot!(ran.warnings().join("\n"), @"");
    let trained = tensors(checkpoint(&world.run(), 1).join("adapter.safetensors"));
    assert!(trained.keys().any(|k| k.contains("_attn1_")) && !trained.keys().any(|k| k.contains("_in_layers_")));
}

#[test]
fn a_preset_file_with_an_unknown_key_is_named_with_its_line() {
    let world = World::new("preset-with-unknown-key");
    std::fs::write(world.path("preset.toml"), "unet_target_modules = ['Transformer2DModel']\n").expect("written");
    assert_snapshot!(refused(&world, &["network.preset=preset.toml"]), @"");
}

#[test]
fn wrong_arguments_are_explained_with_status_2() {
    let world = World::new("wrong-arguments");
    let ran = world.lokr(&["trian"]).ended_with(2);
    assert!(ran.err.contains("unrecognized subcommand 'trian'") && ran.err.contains("'train'"), "{}", ran.all());
    let ran = world.lokr(&["train"]).ended_with(2);
    assert!(ran.err.contains("--config <FILE>"), "{}", ran.all());
}
