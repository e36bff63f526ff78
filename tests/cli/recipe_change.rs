//! A checkpoint goes on under the recipe, pictures and base model that it was made with, or by express wish.

use insta::assert_snapshot;

use crate::support::*;

/// A folder with a run that stopped after step 2 of 7.
fn stopped(name: &str) -> World {
    let world = World::new(name);
    world.train(&["train.max_train_steps=2"]).good();
    world
}

/// What the program refuses, leaving the run as it was.
fn refused(world: &World, set: &[&str]) -> String {
    let before = contents(world.run());
    let err = world.train(set).refusal();
    assert!(before == contents(world.run()), "the run was touched");
    masked(&err, &world.folder)
}

#[test]
fn a_changed_recipe_is_refused_with_the_list_and_taken_if_asked() {
    let world = stopped("changed-recipe");
    let changed = ["train.unet_lr=1e-4", "train.betas=[0.9, 0.95]", "dataset.subsets[0].keep_tokens=2", "train.lr_scheduler=cosine"];
    assert_snapshot!(refused(&world, &changed), @r#"
    error: checkpoint `run/checkpoints/step-00000002` was made by another recipe:
      dataset.subsets[0].keep_tokens: 1 -> 2
      train.betas: [0.9, 0.99] -> [0.9, 0.95]
      train.lr_scheduler: "constant" -> "cosine"
      train.max_train_steps: 2 -> 7
      train.unet_lr: 0.0002 -> 0.0001
      dataset: pictures, captions or their places are not those of the checkpoint
    hint: restore these keys, choose another output.dir, or resume with --allow-recipe-change if the change is meant
    "#);
    let ran = world.train_with(&changed, &["--allow-recipe-change"]).good();
    assert!(ran.out.contains("resuming from run/checkpoints/step-00000002: 2 of 7 steps done, 5 remain"), "{}", ran.all());
    assert_eq!(metrics(&world.run()).iter().filter(|l| l["lr_unet"] == 2e-4).count(), 2, "the old rate for two steps");
    assert_eq!(metrics(&world.run()).iter().filter(|l| l["lr_unet"] == 1e-4).count(), 0, "a cosine from the third on");
}

#[test]
fn a_changed_shape_cannot_be_taken_even_if_asked() {
    let world = stopped("changed-shape");
    let before = contents(world.run());
    let err = world.train_with(&["network.factor=4"], &["--allow-recipe-change"]).refusal();
    assert!(err.contains("step-00000002") && err.contains("lokr_w1 is F32 [2, 2], the recipe's adapter has f32 [4, 4]"), "{err}");
    assert!(before == contents(world.run()), "the run was touched");
}

#[test]
fn changed_captions_and_pictures_are_refused() {
    let world = stopped("changed-pictures");
    let caption = text(world.path("pictures/03.txt"));
    std::fs::write(world.path("pictures/03.txt"), "something else").expect("written");
    assert_snapshot!(refused(&world, &[]), @"
    error: checkpoint `run/checkpoints/step-00000002` was made by another recipe:
      dataset: pictures, captions or their places are not those of the checkpoint
    hint: restore these keys, choose another output.dir, or resume with --allow-recipe-change if the change is meant
    ");
    std::fs::write(world.path("pictures/03.txt"), caption).expect("written");
    let picture = bytes(world.path("pictures/03.png"));
    let of_the_dataset = "dataset: pictures, captions or their places are not those of the checkpoint";
    std::fs::copy(world.path("pictures/04.png"), world.path("pictures/03.png")).expect("copied");
    assert!(refused(&world, &[]).contains(of_the_dataset), "another size");
    std::fs::remove_file(world.path("pictures/03.png")).expect("removed");
    assert!(refused(&world, &[]).contains(of_the_dataset), "one picture less");
    std::fs::write(world.path("pictures/03.png"), picture).expect("written");
    world.train(&[]).good();
}

#[test]
fn another_picture_of_the_same_name_and_size_is_refused() {
    let world = stopped("changed-content");
    std::fs::copy(world.path("pictures/05.png"), world.path("pictures/03.png")).expect("copied");
    refused(&world, &[]);
}

#[test]
fn another_base_model_is_refused() {
    let world = stopped("changed-base");
    std::fs::copy(tiny_base(), world.path("base.safetensors")).expect("copied");
    let err = refused(&world, &["model.base=base.safetensors"]);
    assert_snapshot!(err, @r#"
    error: checkpoint `run/checkpoints/step-00000002` was made by another recipe:
      model.base: "[golden]/tiny-sdxl.safetensors" -> "base.safetensors"
      model.base: another file than the checkpoint's
    hint: restore these keys, choose another output.dir, or resume with --allow-recipe-change if the change is meant
    "#);
}

#[test]
fn what_does_not_change_the_result_may_change() {
    let world = stopped("free-keys");
    let set = [
        "output.name=other",
        "output.keep_last=1",
        "output.save_every_n_steps=3",
        "sample.prompts=['disk']",
        "sample.sample_every_n_steps=4",
        "sample.width=64",
        "sample.height=64",
        "sample.steps=1",
        "validation.image_dir=held-out",
        "validation.every_n_steps=4",
        "train.threads=2",
        "dataset.vae_batch_size=3",
    ];
    world.train(&set).good();
    let (whole, _) = finished();
    for file in ["adapter.safetensors", "optimizer.safetensors", "state.json"] {
        assert_same_file(checkpoint(&whole.run(), 7).join(file), checkpoint(&world.run(), 7).join(file));
    }
    assert_eq!(checkpoints(&world.run()), ["step-00000007"]);
}

#[test]
fn a_run_that_begins_anew_refuses_a_used_folder() {
    let world = stopped("never-resume");
    assert_snapshot!(refused(&world, &["output.resume=never"]), @r#"
    error: `run` holds checkpoints of an earlier run, and output.resume is "never"
    hint: set output.resume = "auto" to go on, or choose another output.dir
    "#);
}

#[test]
fn another_run_folder_is_another_run() {
    let world = stopped("other-folder");
    let ran = world.train(&["output.dir=other", "train.max_train_steps=1"]).good();
    assert!(ran.lines("resuming").is_empty(), "{}", ran.all());
}
