//! A wall clock that jumps: no result depends on it.

use crate::support::*;

#[test]
fn a_clock_that_jumps_by_years_changes_no_byte() {
    let (whole, _) = finished();
    let world = World::new("clock");
    // The times of files jump as well; caches are keyed by them.
    for (picture, time) in [("00.png", "1965-01-01"), ("01.png", "2100-01-01"), ("02.png", "1970-01-01T00:00:00Z")] {
        let touched = std::process::Command::new("touch").args(["-d", time]).arg(world.path("pictures").join(picture)).status();
        assert!(touched.is_ok_and(|s| s.success()));
    }
    let run = || lokr_with_shim(&world.folder, &[("LOKR_SHIM_CLOCK", "1")], &arguments(PREVIEWS));
    for resumed in [false, true] {
        if resumed {
            std::fs::remove_dir_all(checkpoint(&world.run(), 7)).expect("removed");
        }
        let Some(ran) = run() else { return };
        assert_eq!(ran.good().lines("resuming from").len(), usize::from(resumed));
        assert_same_folder(checkpoint(&whole.run(), 7), checkpoint(&world.run(), 7));
        assert_same_folder(whole.run().join("previews"), world.run().join("previews"));
        assert_same_file(whole.run().join("shapes.safetensors"), world.run().join("shapes.safetensors"));
    }
    world.lokr(&["verify", "run"]).good();
}

#[test]
fn the_clock_of_the_test_does_jump() {
    let world = World::new("clock-seen");
    let set = ["train.max_train_steps=1", "output.timestamps=true"];
    let Some(ran) = lokr_with_shim(&world.folder, &[("LOKR_SHIM_CLOCK", "1")], &arguments(&set)) else { return };
    ran.good();
    let metadata = metadata(world.run().join("shapes.safetensors"));
    let time = |key: &str| metadata[key].parse::<f64>().expect("a number");
    let apart = (time("ss_training_started_at") - time("ss_training_finished_at")).abs();
    assert!(apart > 1e8, "{apart} seconds");
}
