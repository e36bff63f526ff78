//! Damaged checkpoints are named and passed over, never gone on from, and never cost a good one.

use crate::support::*;

/// Files of a checkpoint.
const FILES: [&str; 6] = ["adapter.safetensors", "optimizer.safetensors", "state.json", "recipe.toml", "manifest.json", "metrics.jsonl"];

/// A folder with a run of four steps and checkpoints after the second and the fourth.
fn four_steps(name: &str) -> World {
    let world = World::new(name);
    world.train(&["train.max_train_steps=4"]).good();
    assert_eq!(checkpoints(&world.run()), ["step-00000002", "step-00000004"]);
    world
}

#[test]
fn a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken() {
    let world = four_steps("damaged");
    let good = world.path("good");
    copy_folder(&world.run(), &good);
    let newest = checkpoint(&world.run(), 4);
    for (file, how, why) in [
        (FILES[0], Damage::Flip, "adapter.safetensors was altered since it was written"),
        (FILES[0], Damage::Cut, "adapter.safetensors has "),
        (FILES[1], Damage::Flip, "optimizer.safetensors was altered since it was written"),
        (FILES[1], Damage::Gone, "optimizer.safetensors: cannot "),
        (FILES[2], Damage::Flip, "state.json was altered since it was written"),
        (FILES[2], Damage::Cut, "state.json has "),
        (FILES[3], Damage::Flip, "recipe.toml was altered since it was written"),
        (FILES[3], Damage::Gone, "recipe.toml: cannot "),
        (FILES[4], Damage::Flip, ""),
        (FILES[4], Damage::Cut, "manifest.json: "),
        (FILES[4], Damage::Gone, "no manifest "),
        (FILES[5], Damage::Flip, "metrics.jsonl was altered since it was written"),
        (FILES[5], Damage::Gone, "metrics.jsonl: cannot "),
    ] {
        std::fs::remove_dir_all(world.run()).expect("removed");
        copy_folder(&good, &world.run());
        damage(&newest.join(file), how);
        let ran = world.train(&["train.max_train_steps=4"]).good();
        let warnings = ran.warnings();
        let named = format!("warning: passed over checkpoint `run/checkpoints/step-00000004`: {why}");
        assert!(warnings[0].starts_with(&named), "{file} {how:?}: {}", ran.all());
        assert_eq!(
            warnings[1..],
            ["warning: a checkpoint that this run does not go on from is kept as run/checkpoints/passed-over-00000004"]
        );
        assert!(ran.out.contains("resuming from run/checkpoints/step-00000002: 2 of 4 steps done, 2 remain"), "{}", ran.all());
        assert_same_folder(checkpoint(&good, 4), &newest);
        assert_eq!(steps_in_metrics(&world.run()), [1, 2, 3, 4]);
    }
}

#[test]
fn a_damaged_checkpoint_that_is_asked_for_by_name_is_an_error() {
    let world = four_steps("damaged-named");
    damage(&checkpoint(&world.run(), 4).join("optimizer.safetensors"), Damage::Flip);
    let before = contents(world.run());
    let err = world.train_with(&[], &["--resume", "run/checkpoints/step-00000004"]).refusal();
    insta::assert_snapshot!(err, @"
    error: checkpoint `run/checkpoints/step-00000004`: optimizer.safetensors was altered since it was written
    hint: resume from another checkpoint of the run, or from `latest`, which passes over damaged ones
    ");
    assert!(before == contents(world.run()));
}

#[test]
fn with_every_checkpoint_damaged_each_is_named_and_kept_and_the_run_starts_at_its_first_step() {
    let world = four_steps("all-damaged");
    let good = world.path("good");
    copy_folder(&world.run(), &good);
    for step in [2, 4] {
        damage(&checkpoint(&world.run(), step).join("adapter.safetensors"), Damage::Flip);
    }
    let torn = bytes(checkpoint(&world.run(), 4).join("adapter.safetensors"));
    let ran = world.train(&["train.max_train_steps=4"]).good();
    insta::assert_snapshot!(ran.warnings().join("\n"), @"
    warning: passed over checkpoint `run/checkpoints/step-00000004`: adapter.safetensors was altered since it was written
    warning: passed over checkpoint `run/checkpoints/step-00000002`: adapter.safetensors was altered since it was written
    warning: a checkpoint that this run does not go on from is kept as run/checkpoints/passed-over-00000002
    warning: a checkpoint that this run does not go on from is kept as run/checkpoints/passed-over-00000004
    ");
    assert!(ran.lines("resuming").is_empty(), "{}", ran.all());
    assert_eq!(steps_in_metrics(&world.run()), [1, 2, 3, 4]);
    for step in [2, 4] {
        assert_same_folder(checkpoint(&good, step), checkpoint(&world.run(), step));
    }
    assert!(torn == bytes(world.path("run/checkpoints/passed-over-00000004/adapter.safetensors")), "the damaged one is kept");
}

#[test]
fn a_damaged_checkpoint_does_not_count_among_those_to_keep() {
    let world = four_steps("damaged-keep-last");
    for step in [2, 4] {
        damage(&checkpoint(&world.run(), step).join("adapter.safetensors"), Damage::Cut);
    }
    // The new checkpoint's number is below the damaged one's.
    let set = ["train.max_train_steps=3", "output.keep_last=1"];
    world.train(&set).good();
    let ran = world.train(&set).good();
    assert!(ran.out.contains("resuming from run/checkpoints/step-00000003: 3 of 3 steps done"), "{}", ran.all());
}

#[test]
fn a_checkpoint_of_another_run_is_not_taken_for_this_runs() {
    let world = four_steps("swapped");
    // Whole by its manifest, but of another recipe.
    let other = World::new("swapped-other");
    other.train(&["train.max_train_steps=5", "network.factor=4"]).good();
    copy_folder(&checkpoint(&other.run(), 5), &checkpoint(&world.run(), 5));
    let err = world.train(&[]).refusal();
    assert!(err.contains("step-00000005` was made by another recipe:\n  network.factor: 4 -> 2"), "{err}");
}
