//! Checkpoints as a disk, a copy or a kill may leave them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use lokr::ParameterGroup;
use ops::Parameter;
use optim::{Hyper, Optimizer, OptimizerKind};
use tempfile::TempDir;

use super::{FILES, MANIFEST, RunState, Snapshot, clean, delete_old, find_newest_whole, folder, name, open};
use crate::step::Trained;

fn state(step: u64) -> RunState {
    RunState {
        format: RunState::FORMAT,
        lokr: "test".into(),
        step,
        samples_seen: 4 * step,
        replaced: 1,
        epoch: 0,
        next_sample: Some(3),
        // A double that a reader of less than all digits gets wrong in the last bit.
        loss_average: 0.123_456_789_012_345_68 + 1e-16 * step as f64,
        withheld_steps: 0,
        consecutive_withheld: 0,
        world_size: 1,
        batches_per_step: 2,
        loss_scaler: None,
        plan_fingerprint: "plan".into(),
        dataset_fingerprint: "dataset".into(),
        base_hash: "base".into(),
    }
}

/// Writes a small checkpoint.
fn write(run: &Path, step: u64) -> PathBuf {
    let value = |v: f32| Tensor::from_vec(vec![v, -v, step as f32], 3, &Device::Cpu).expect("a tensor");
    let trained = ["a.lokr_w1", "a.lokr_w2"].map(|n| Trained { group: ParameterGroup::Unet, parameter: Parameter::new(n, value(0.5)) });
    let mut optimizer = Optimizer::new(OptimizerKind::AdamW, Hyper::defaults(OptimizerKind::AdamW), &[3, 3]);
    optimizer.step(0, &mut [0.0; 3], &[1.0, 2.0, 3.0], 1e-3);
    let snapshot = Snapshot::take(&trained, &optimizer, state(step), "[train]\n".into(), "{\"step\":1}\n".into()).expect("on the CPU");
    snapshot.write(run).expect("written")
}

/// A run with checkpoints after these steps.
fn run(steps: &[u64]) -> TempDir {
    let run = tempfile::tempdir().expect("a folder");
    steps.iter().for_each(|&step| _ = write(run.path(), step));
    run
}

fn names(run: &Path) -> Vec<String> {
    let list = storage::list_dir(&folder(run)).expect("listed");
    list.iter().map(|p| p.file_name().expect("a name").to_string_lossy().into_owned()).collect()
}

fn content(checkpoint: &Path) -> BTreeMap<&'static str, Vec<u8>> {
    FILES.into_iter().chain([MANIFEST]).map(|f| (f, storage::read(&checkpoint.join(f)).expect("read"))).collect()
}

#[test]
fn the_state_comes_back_to_the_last_bit() {
    for step in 0..20 {
        let run = run(&[step]);
        assert_eq!(open(&folder(run.path()).join(name(step))).expect("whole").state, state(step));
    }
}

#[test]
fn every_byte_of_every_file_is_watched() {
    let run = run(&[2, 4]);
    let newest = folder(run.path()).join(name(4));
    for (file, good) in content(&newest) {
        // All bits of the manifest; of the files that it has hashes of, one of each byte.
        for bit in (0..8 * good.len()).filter(|bit| file == MANIFEST || bit % 8 == bit / 8 % 8) {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            std_write(&newest.join(file), &bad);
            assert!(open(&newest).is_err(), "bit {bit} of {file}");
        }
        let (found, passed) = find_newest_whole(run.path()).expect("listed");
        assert_eq!(found.expect("the one before").state.step, 2, "{file}");
        assert!(passed.len() == 1 && passed[0].contains("step-00000004"), "{passed:?}");
        std_write(&newest.join(file), &good);
        open(&newest).expect("whole again");
    }
}

#[test]
fn every_length_of_every_file_is_watched() {
    let run = run(&[4]);
    let newest = folder(run.path()).join(name(4));
    for (file, good) in content(&newest) {
        for length in 0..good.len() {
            std_write(&newest.join(file), &good[..length]);
            // The line end behind the manifest's JSON says nothing; every other file has its length in the manifest.
            assert_eq!(open(&newest).is_ok(), file == MANIFEST && length + 1 == good.len(), "{length} bytes of {file}");
        }
        std_write(&newest.join(file), &[&good[..], b" "].concat());
        assert_eq!(open(&newest).is_ok(), file == MANIFEST, "{file} with a byte more");
        storage::remove_file(&newest.join(file)).expect("removed");
        assert!(open(&newest).is_err(), "without {file}");
        std_write(&newest.join(file), &good);
    }
}

#[test]
fn a_renamed_checkpoint_is_not_taken_for_another_step() {
    let run = run(&[2]);
    let renamed = folder(run.path()).join(name(9));
    storage::rename(&folder(run.path()).join(name(2)), &renamed).expect("renamed");
    let error = open(&renamed).err().expect("refused").to_string();
    assert!(error.ends_with("it holds step 2, its name says 9"), "{error}");
}

#[test]
fn old_ones_go_and_what_is_to_stay_stays() {
    let run = run(&[1, 2, 3, 4, 5, 6]);
    delete_old(run.path(), 2, Some(3)).expect("listed");
    assert_eq!(names(run.path()), ["step-00000003", "step-00000005", "step-00000006"]);
    delete_old(run.path(), 0, None).expect("listed");
    assert_eq!(names(run.path()), ["step-00000006"], "the newest always stays");
}

#[test]
fn what_a_kill_in_the_middle_of_a_deletion_leaves_bears_no_checkpoints_name_and_is_removed() {
    let run = run(&[2, 4]);
    let doomed = folder(run.path()).join(".step-00000002.old.tmp");
    storage::rename(&folder(run.path()).join(name(2)), &doomed).expect("renamed");
    storage::remove_file(&doomed.join(MANIFEST)).expect("removed");
    let (found, passed) = find_newest_whole(run.path()).expect("listed");
    assert!(found.is_some() && passed.is_empty());
    // The next deletion of the same step is not kept from its work.
    write(run.path(), 2);
    delete_old(run.path(), 1, None).expect("listed");
    assert_eq!(names(run.path()), ["step-00000004"]);
    storage::create_dir_all(&doomed).expect("a folder");
    clean(run.path(), "shapes").expect("cleaned");
    assert_eq!(names(run.path()), ["step-00000004"]);
}

#[test]
fn temporary_files_of_a_killed_run_are_removed_and_no_others() {
    let run = run(&[2]);
    storage::create_dir_all(&run.path().join("previews")).expect("a folder");
    for name in [
        ".shapes.safetensors.tmp-7",
        ".shapes-step00000002.safetensors.tmp-7",
        ".recipe.toml.tmp-7",
        "previews/.step-00000002_00.png.tmp-7",
    ] {
        std_write(&run.path().join(name), b"half");
    }
    for name in [".merged.safetensors.tmp-7", ".shapes.notes", "shapes.safetensors"] {
        std_write(&run.path().join(name), b"another's");
    }
    clean(run.path(), "shapes").expect("cleaned");
    let left: Vec<_> = storage::list_dir(run.path())
        .expect("listed")
        .iter()
        .map(|p| p.strip_prefix(run.path()).expect("below").display().to_string())
        .collect();
    assert_eq!(left, [".merged.safetensors.tmp-7", ".shapes.notes", "checkpoints", "previews", "shapes.safetensors"]);
    assert_eq!(storage::list_dir(&run.path().join("previews")).expect("listed").len(), 0);
}

#[test]
fn a_write_that_fails_leaves_the_last_good_one() {
    let run = run(&[2]);
    let before = content(&folder(run.path()).join(name(2)));
    // A file where the new checkpoint's folder would be filled.
    std_write(&folder(run.path()).join(".step-00000004.tmp"), b"");
    let trained = [Trained {
        group: ParameterGroup::Unet,
        parameter: Parameter::new("a", Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu).expect("a tensor")),
    }];
    let optimizer = Optimizer::new(OptimizerKind::Lion, Hyper::defaults(OptimizerKind::Lion), &[1]);
    let snapshot = Snapshot::take(&trained, &optimizer, state(4), String::new(), String::new()).expect("on the CPU");
    assert!(snapshot.write(run.path()).is_err());
    let (found, passed) = find_newest_whole(run.path()).expect("listed");
    assert!(found.is_some_and(|f| f.state.step == 2) && passed.is_empty());
    assert_eq!(content(&folder(run.path()).join(name(2))), before);
}

/// As a careless program writes: in place.
#[allow(clippy::disallowed_methods)]
fn std_write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("written");
}
