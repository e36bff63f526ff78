//! A run that stops and goes on is the run that never stopped, byte for byte.

use crate::support::*;

/// Trains to the end without a stop, then in a second folder with a stop after each step; compares all that the runs leave.
fn stop_after_each_step(name: &str, set: &[&str], eight_bit: bool) {
    let (whole, stopped) = (World::new(&format!("{name}-whole")), World::new(&format!("{name}-stopped")));
    whole.train(set).good();
    for steps in 1..=7 {
        let length = format!("train.max_train_steps={steps}");
        let ran = stopped.train(&[set, &[&length]].concat()).good();
        let resumed = ran.lines("resuming from");
        if steps == 1 {
            assert!(resumed.is_empty(), "{}", ran.all());
        } else {
            let what =
                format!("resuming from run/checkpoints/step-{:08}: {} of {steps} steps done, 1 remain; next: epoch ", steps - 1, steps - 1);
            assert!(resumed.len() == 1 && resumed[0].starts_with(&what), "{}", ran.all());
        }
    }
    assert_same_folder(checkpoint(&whole.run(), 7), checkpoint(&stopped.run(), 7));
    for file in ["shapes.safetensors", "recipe.toml"] {
        assert_same_file(whole.run().join(file), stopped.run().join(file));
    }
    assert_eq!(steps_in_metrics(&stopped.run()), [1, 2, 3, 4, 5, 6, 7], "each step once");
    let losses = |w: &World| metrics(&w.run()).iter().map(|l| (l["loss"].clone(), l["loss_average"].clone())).collect::<Vec<_>>();
    assert_eq!(losses(&whole), losses(&stopped));
    let state = tensors(checkpoint(&whole.run(), 7).join("optimizer.safetensors"));
    assert_eq!(state.keys().any(|k| k.contains("absmax")), eight_bit, "whether the state holds 8-bit tensors");
}

#[test]
fn with_lion_from_any_step() {
    stop_after_each_step("lion", &[], false);
}

#[test]
fn with_lion_8bit_from_any_step() {
    stop_after_each_step("lion8bit", &["train.optimizer=Lion8bit"], true);
}

#[test]
fn with_adamw_and_uncached_pictures_from_any_step() {
    let set = ["train.optimizer=AdamW", "dataset.cache_latents=false", "dataset.subsets[0].random_crop=true"];
    stop_after_each_step("adamw", &set, false);
}

#[test]
fn a_finished_run_is_left_as_it_is() {
    let (finished, _) = finished();
    let world = World::new("finished-again");
    copy_folder(&finished.run(), &world.run());
    let before = contents(world.run());
    let ran = world.train(PREVIEWS).good();
    assert_eq!(ran.lines("resuming from"), ["resuming from run/checkpoints/step-00000007: 7 of 7 steps done"]);
    assert!(before == contents(world.run()), "{}", ran.all());
}

#[test]
fn what_a_kill_kept_from_being_written_after_the_last_checkpoint_is_made_by_the_next_run() {
    let (finished, _) = finished();
    let world = World::new("outputs-missing");
    copy_folder(&finished.run(), &world.run());
    let before = contents(world.run());
    for file in ["shapes.safetensors", "previews/step-00000007_01.png", "previews.png"] {
        std::fs::remove_file(world.run().join(file)).expect("removed");
    }
    let lines = text(world.run().join("metrics.jsonl"));
    let (kept, last) = lines.trim_end().rsplit_once('\n').expect("several lines");
    assert!(last.contains("validation_loss"));
    std::fs::write(world.run().join("metrics.jsonl"), format!("{kept}\n{}", &last[..10])).expect("written");
    let ran = world.train(PREVIEWS).good();
    let after = contents(world.run());
    let differing: Vec<_> = before.iter().filter(|(name, content)| after.get(*name) != Some(content)).map(|(name, _)| name).collect();
    assert!(differing.is_empty(), "{differing:?} differ: {}", ran.all());
}

#[test]
fn a_named_checkpoint_is_taken_and_the_newer_ones_are_left_aside() {
    let world = World::new("named-checkpoint");
    world.train(&["train.max_train_steps=5"]).good();
    // A line that goes on from step 5 at another rate, and is then left for step 5 as it was.
    world.train_with(&["train.unet_lr=1e-4", "train.max_train_steps=6"], &["--allow-recipe-change"]).good();
    assert_eq!(checkpoints(&world.run()), ["step-00000005", "step-00000006"]);
    let ran = world.train_with(&[], &["--resume", "run/checkpoints/step-00000005"]).good();
    assert_eq!(ran.warnings(), ["warning: a checkpoint that this run does not go on from is kept as run/checkpoints/passed-over-00000006"]);
    let whole = World::new("named-checkpoint-whole");
    whole.train(&[]).good();
    for step in [6, 7] {
        let (a, b) = (checkpoint(&whole.run(), step), checkpoint(&world.run(), step));
        ["adapter.safetensors", "optimizer.safetensors", "state.json"].iter().for_each(|f| assert_same_file(a.join(f), b.join(f)));
    }
    // And what is newest is what a further run goes on from.
    let ran = world.train_with(&["train.max_train_steps=8"], &["--resume", "latest"]).good();
    assert!(ran.out.contains("resuming from run/checkpoints/step-00000007"), "{}", ran.all());
}

#[test]
fn a_named_checkpoint_that_is_not_there_is_an_error() {
    let (finished, _) = finished();
    let before = contents(finished.run());
    let err = finished.train_with(PREVIEWS, &["--resume", "run/checkpoints/step-00000005"]).refusal();
    insta::assert_snapshot!(err, @"
    error: checkpoint `run/checkpoints/step-00000005`: no manifest (cannot read `run/checkpoints/step-00000005/manifest.json`)
    hint: resume from another checkpoint of the run, or from `latest`, which passes over damaged ones
    ");
    assert!(before == contents(finished.run()));
}
