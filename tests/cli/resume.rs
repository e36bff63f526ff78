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

#[test]
fn what_is_skipped_is_not_read() {
    let indexed = |name: &str| {
        let world = World::new(name);
        world.lokr(&["dataset", "index", "--out", "pictures.sqlite", "pictures"]).good();
        world
    };
    // Over an index no picture is opened before its step. One epoch, so that each picture belongs to one step.
    let set = [
        "train.max_train_steps=3",
        "dataset.subsets[0].index=pictures.sqlite",
        "dataset.cache_latents=false",
        "dataset.on_broken_image=fail",
        "output.save_every_n_steps=1",
        "output.keep_last=9",
    ];
    let whole = indexed("skipped-whole");
    whole.train(&set).good();
    let of_step = |step: &str| {
        let set: Vec<&str> = set.iter().flat_map(|s| ["--set", s]).collect();
        let told = whole.lokr(&[&["dataset", "caption", "--config", "recipe.toml", "--step", step], &set[..]].concat()).good();
        let start = format!("step {step}, epoch 0, ");
        told.out.lines().filter_map(|l| l.strip_prefix(&start)).map(str::to_string).collect::<Vec<_>>()
    };
    let steps = ["0", "1", "2"].map(of_step);
    assert_eq!(steps.iter().map(Vec::len).sum::<usize>(), 9, "each picture once: {steps:?}");
    for done in 1..=2 {
        let world = indexed(&format!("skipped-{done}"));
        copy_folder(&checkpoint(&whole.run(), done as u64), &checkpoint(&world.run(), done as u64));
        // What the steps before have seen is gone; only what is still to be seen is there.
        steps[..done].iter().flatten().for_each(|path| std::fs::remove_file(world.path(path)).expect("removed"));
        let ran = world.train(&set).good();
        assert!(ran.lines("resuming from")[0].ends_with(&format!("sample {}", steps[done][0])), "{}", ran.all());
        assert_same_folder(checkpoint(&whole.run(), 3), checkpoint(&world.run(), 3));
        // And the test can fail: without a picture that is still to be seen, the run ends with its name.
        _ = std::fs::remove_dir_all(checkpoint(&world.run(), 3));
        std::fs::remove_file(world.path(&steps[2][0])).expect("removed");
        assert!(world.train(&set).refusal_with(&steps[2][0]), "it went on without {}", steps[2][0]);
    }
}

#[test]
fn lost_lines_of_the_metrics_come_back_from_the_checkpoint() {
    let (whole, lossy) = (World::new("metrics-whole"), World::new("metrics-lost"));
    whole.train(&[]).good();
    lossy.train(&["train.max_train_steps=4"]).good();
    // Lines are not synced: a power loss may take the last ones, or the file.
    let lines = text(lossy.run().join("metrics.jsonl"));
    std::fs::write(lossy.run().join("metrics.jsonl"), lines.split_inclusive('\n').take(1).collect::<String>()).expect("written");
    lossy.train(&[]).good();
    assert_eq!(steps_in_metrics(&lossy.run()), [1, 2, 3, 4, 5, 6, 7]);
    let numbers = |w: &World| metrics(&w.run()).iter().map(|l| (l["loss"].clone(), l["grad_norm"].clone())).collect::<Vec<_>>();
    assert_eq!(numbers(&whole), numbers(&lossy));
    let timed: Vec<bool> = metrics(&lossy.run()).iter().map(|l| l.get("seconds").is_some()).collect();
    assert_eq!(timed, [true, false, false, false, true, true, true], "nothing is invented where nothing is known");
    assert_same_folder(checkpoint(&whole.run(), 7), checkpoint(&lossy.run(), 7));
}
