//! The base model's weights are used where they lie in the mapped file: the same run as with copies of them, and one that notices when
//! another program writes to the file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};

use crate::distributed::launched;
use crate::support::*;

/// Nothing is saved before the end, unless something happens.
const LONG: &[&str] = &["train.max_train_steps=16", "output.save_every_n_steps=16", "model.base=base.safetensors"];

fn with_own_base(name: &str) -> World {
    let world = World::new(name);
    std::fs::copy(golden("tiny-sdxl.safetensors"), world.path("base.safetensors")).expect("copied");
    world
}

fn assert_same_end(a: &std::path::Path, b: &std::path::Path, step: u64) {
    for file in ["adapter.safetensors", "optimizer.safetensors", "state.json"] {
        assert_same_file(checkpoint(a, step).join(file), checkpoint(b, step).join(file));
    }
}

/// Flips a bit of a number in the middle of the file.
fn flip(file: &File) {
    let mut byte = [0];
    let middle = file.metadata().expect("known").len() / 2;
    file.read_exact_at(&mut byte, middle).expect("read");
    file.write_all_at(&[byte[0] ^ 0x40], middle).expect("written");
}

/// Does this to the base model's file after the second step of a run, and waits for the end.
fn disturbed(world: &World, mut running: Running, disturb: impl FnOnce(&File)) -> Ran {
    assert!(running.wait_until(|| steps_so_far(&world.run()) >= 2), "it ended early");
    disturb(&File::options().read(true).write(true).open(world.path("base.safetensors")).expect("opened"));
    running.end()
}

#[test]
fn mapped_weights_train_as_copied_ones() {
    let (reference, _) = finished();
    let world = World::new("copied-base");
    world.train(&["model.disable_mmap_load_safetensors=true"]).good();
    assert_same_end(&reference.run(), &world.run(), 7);
}

#[test]
fn a_base_model_that_is_written_to_stops_the_run_which_then_goes_on_as_if_it_was_not() {
    let world = with_own_base("written-base");
    let ran = disturbed(&world, world.start(LONG), flip);
    let told = ran.refusal();
    assert!(told.contains("`base.safetensors` was changed while it was trained on"), "{told}");
    assert!(told.contains("put the file back as it was"), "{told}");
    let last = *steps_in_metrics(&world.run()).last().expect("steps");
    assert_eq!(checkpoints(&world.run()), [format!("step-{last:08}")], "all steps that were applied are saved");

    let changed = world.train(LONG).refusal();
    assert!(changed.contains("model.base: another file than the checkpoint's"), "{changed}");
    flip(&File::options().read(true).write(true).open(world.path("base.safetensors")).expect("opened"));
    world.train(LONG).good();
    world.train(&[LONG, &["output.dir=whole"]].concat()).good();
    assert_same_end(&world.run(), &world.path("whole"), 16);
}

/// Rank 0 saves before the launcher ends the others, and the error is the one that says what happened.
#[test]
fn two_processes_end_together_when_it_is_written_to() {
    let world = with_own_base("written-base-of-two");
    let told = disturbed(&world, start(&world.folder, &launched("2", &[], LONG)), flip).ended_with(1).err;
    assert!(told.contains("`base.safetensors` was changed while it was trained on"), "{told}");
    let last = *steps_in_metrics(&world.run()).last().expect("steps");
    assert_eq!(checkpoints(&world.run()), [format!("step-{last:08}")], "all steps that were applied are saved");
}

#[test]
fn a_base_model_that_is_only_touched_is_the_same() {
    let world = with_own_base("touched-base");
    let touch = |file: &File| file.set_modified(SystemTime::now() - Duration::from_secs(60)).expect("touched");
    disturbed(&world, world.start(LONG), touch).good();
    assert_eq!(steps_in_metrics(&world.run()), (1..=16).collect::<Vec<_>>());
}

/// A file that is cut short takes the process with it, as a kill does: by the system, or by the step's look at the file.
#[test]
fn a_base_model_that_is_cut_short_loses_no_checkpoint() {
    let world = with_own_base("cut-base");
    let often = [LONG, &["output.save_every_n_steps=1"]].concat();
    let whole = std::fs::read(world.path("base.safetensors")).expect("read");
    let ran = disturbed(&world, world.start(&often), |file| file.set_len(4096).expect("cut"));
    assert_ne!(ran.status, Some(0), "{}", ran.all());
    std::fs::write(world.path("base.safetensors"), whole).expect("put back");
    let again = world.train(&often).good();
    assert!(again.out.contains("resuming from "), "{}", again.all());
    world.train(&[&often[..], &["output.dir=whole"]].concat()).good();
    assert_same_end(&world.run(), &world.path("whole"), 16);
}
