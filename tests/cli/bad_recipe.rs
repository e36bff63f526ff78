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
    assert_snapshot!(refused(&world, &[]), @"
    error: recipe.toml:21: unknown key `train.unet_lrr`
    hint: did you mean `unet_lr`?
    ");
}

#[test]
fn an_unknown_section_is_named_with_its_line_and_the_nearest_name() {
    let world = World::new("unknown-section");
    world.edit_recipe("[network]", "[netwrok]");
    assert_snapshot!(refused(&world, &[]), @"
    error: the recipe has 4 faults
      recipe.toml:10: unknown section [netwrok]
      recipe.toml:11: `preset` is not a key of the top level
      recipe.toml:12: `factor` is not a key of the top level
      recipe.toml:13: `full_matrix` is not a key of the top level
    hint: recipe.toml:10: did you mean [network]?
    hint: recipe.toml:11: it belongs in [network]
    hint: recipe.toml:12: it belongs in [network]
    hint: recipe.toml:13: it belongs in [network]
    ");
}

#[test]
fn all_faults_of_a_recipe_are_listed_at_once() {
    let world = World::new("several-faults");
    world.edit_recipe("batch_size = 2", "batch_size = \"2\"");
    world.edit_recipe("seed = 1", "sed = 1");
    world.edit_recipe("optimizer = \"Lion\"", "optimizer = \"lion8bt\"");
    world.edit_recipe("shuffle_caption = true", "shuffle_caption = 1");
    assert_snapshot!(refused(&world, &[]), @r#"
    error: the recipe has 4 faults
      recipe.toml:17: train.batch_size: expected whole number, found the text "2"
      recipe.toml:19: unknown key `train.sed`
      recipe.toml:20: train.optimizer: expected one of "Lion", "Lion8bit", "AdamW", found the text "lion8bt"
      recipe.toml:36: dataset.subsets[0].shuffle_caption: expected true or false, found the number 1
    hint: recipe.toml:17: write 2 without quotes
    hint: recipe.toml:19: did you mean `seed`?
    hint: recipe.toml:20: did you mean "Lion8bit"?
    "#);
}

#[test]
fn a_key_of_sd_scripts_is_translated() {
    let world = World::new("foreign-key");
    world.edit_recipe("batch_size = 2", "train_batch_size = 2\nlearning_rate = 1e-4");
    assert_snapshot!(refused(&world, &[]), @"
    error: the recipe has 2 faults
      recipe.toml:17: unknown key `train.train_batch_size`: sd-scripts' `train_batch_size` is called train.batch_size here
      recipe.toml:18: unknown key `train.learning_rate`: sd-scripts' `learning_rate` has no key of its own here
    hint: recipe.toml:17: write train.batch_size
    hint: recipe.toml:18: each part has its own rate: train.unet_lr and train.text_encoder_lr
    ");
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
    assert_snapshot!(refused(&world, &["train.max_train_epochs=2", "train.lr_warmup_steps=3"]), @r#"
    error: the recipe has 2 faults
      train.max_train_steps = 7 and train.max_train_epochs = 2 both set the length of the run
      train.lr_warmup_steps = 3 with train.lr_scheduler = "constant", which has no warmup
    hint: remove one of them
    hint: set train.lr_scheduler = "constant_with_warmup", or remove train.lr_warmup_steps
    "#);
}

#[test]
fn a_wrong_set_argument_is_named_as_it_was_typed() {
    let world = World::new("wrong-set");
    assert_snapshot!(refused(&world, &["train.batch_size=two"]), @r#"error: --set train.batch_size=two: train.batch_size: expected whole number, found the text "two""#);
    assert_snapshot!(refused(&world, &["train.batchsize=2"]), @"
    error: --set train.batchsize=2: unknown key `train.batchsize`
    hint: did you mean `batch_size`?
    ");
    assert_snapshot!(refused(&world, &["batch_size"]), @"
    error: --set batch_size: no `=`
    hint: write section.key=value, as train.seed=1 or dataset.subsets[0].num_repeats=2
    ");
}

#[test]
fn a_missing_recipe_is_named() {
    let world = World::new("missing-recipe");
    let err = world.lokr(&["train", "--config", "recipes/mine.toml"]).refusal();
    assert_snapshot!(masked(&err, &world.folder), @"
    error: the recipe cannot be read
      because: cannot read `recipes/mine.toml`
      because: No such file or directory (os error 2)
    hint: the path is relative to the current folder `[folder]`
    ");
}

#[test]
fn a_loss_scale_outside_of_f16_is_refused_with_the_fix() {
    let world = World::new("loss-scale");
    assert_snapshot!(refused(&world, &["train.mixed_precision=bf16", "train.initial_loss_scale=1024"]), @r#"
    error: train.initial_loss_scale = 1024.0 has no effect with train.mixed_precision = "bf16"
    hint: remove it, or set train.mixed_precision = "fp16"
    "#);
}

#[test]
fn an_unknown_preset_is_named_with_the_nearest_name() {
    let world = World::new("unknown-preset");
    assert_snapshot!(refused(&world, &["network.preset=ful"]), @r#"
    error: network.preset = "ful": there is no preset named `ful`
    hint: did you mean `full`? For a file, give its path (it ends in .toml)
    "#);
    assert_snapshot!(refused(&world, &["network.preset=presets/mine.toml"]), @r#"
    error: network.preset = "presets/mine.toml": cannot read `presets/mine.toml`: No such file or directory (os error 2)
    hint: the path is relative to the current folder `[folder]`
    "#);
}

#[test]
fn a_preset_that_adapts_nothing_is_refused_with_its_patterns() {
    let world = World::new("preset-of-nothing");
    let preset = "unet_target_module = ['Attention3D']\ntext_encoder_target_module = ['CLIPGate']\nunet_target_name = ['nowhere\\..*']\n";
    std::fs::write(world.path("preset.toml"), preset).expect("written");
    assert_snapshot!(refused(&world, &["network.preset=preset.toml"]), @r"
    error: preset `preset.toml` adapts no layer of this model
    hint: none of these led to a layer: unet_target_module: Attention3D, unet_target_name: nowhere\..*, text_encoder_target_module: CLIPGate
    ");
}

#[test]
fn a_preset_pattern_that_matches_nothing_is_named_and_the_rest_is_trained() {
    let world = World::new("preset-with-idle-pattern");
    let preset = "unet_target_module = ['Transformer2DModel', 'Attention3D']\ntext_encoder_target_module = ['CLIPAttention']\nunet_target_name = ['nowhere\\..*']\n";
    std::fs::write(world.path("preset.toml"), preset).expect("written");
    let ran = world.train(&["network.preset=preset.toml", "train.max_train_steps=1"]).good();
    assert_snapshot!(ran.warnings().join("\n"), @r"
    warning: the preset's unet_target_module: Attention3D matches nothing in this model
    warning: the preset's unet_target_name: nowhere\..* matches nothing in this model
    ");
    let trained = tensors(checkpoint(&world.run(), 1).join("adapter.safetensors"));
    assert!(trained.keys().any(|k| k.contains("_attn1_")) && !trained.keys().any(|k| k.contains("_in_layers_")));
}

#[test]
fn a_preset_file_with_an_unknown_key_is_named_with_its_line() {
    let world = World::new("preset-with-unknown-key");
    std::fs::write(world.path("preset.toml"), "unet_target_modules = ['Transformer2DModel']\n").expect("written");
    assert_snapshot!(refused(&world, &["network.preset=preset.toml"]), @r#"
    error: network.preset = "preset.toml": preset.toml, line 1: unknown key `unet_target_modules`
    hint: did you mean `unet_target_module`?
    "#);
}

#[test]
fn wrong_arguments_are_explained_with_status_2() {
    let world = World::new("wrong-arguments");
    let ran = world.lokr(&["trian"]).ended_with(2);
    assert!(ran.err.contains("unrecognized subcommand 'trian'") && ran.err.contains("'train'"), "{}", ran.all());
    let ran = world.lokr(&["train"]).ended_with(2);
    assert!(ran.err.contains("--config <FILE>"), "{}", ran.all());
}
