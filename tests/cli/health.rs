//! Numbers that are none, and `lokr verify`.

use insta::assert_snapshot;

use crate::support::*;

/// A rate that no training survives.
const OVERFLOW: &str = "train.unet_lr=1e30";

#[test]
fn steps_without_a_finite_loss_are_withheld_named_and_counted_until_there_are_too_many() {
    let world = World::new("overflow");
    let ran = world.train(&[OVERFLOW, "train.max_withheld_steps=3"]).ended_with(1);
    let withheld: Vec<&str> = ran.lines("warning: the step is withheld: ");
    assert_eq!(withheld.len(), 2, "{}", ran.all());
    for (line, step) in withheld.iter().zip([2, 3]) {
        assert!(line.contains("the output of the UNet's "), "where: {line}");
        assert!(line.contains(&format!(" is not finite at step {step}; samples of the step: pictures/0")), "when and on what: {line}");
    }
    assert!(ran.err.starts_with("error: the output of the UNet's ") && ran.err.contains(" is not finite at step 4; "), "{}", ran.all());
    assert!(ran.err.contains("\nhint: lower the learning rate"), "{}", ran.all());
    assert_eq!(ran.lines("the last good checkpoint: "), ["the last good checkpoint: run/checkpoints/step-00000002"]);
    let lines = metrics(&world.run());
    assert_eq!(lines.iter().map(|l| l["withheld"] == true).collect::<Vec<_>>(), [false, true, true]);
}

#[test]
fn a_withheld_step_changes_no_weight() {
    let world = World::new("withheld");
    world.train(&[OVERFLOW, "train.max_train_steps=1"]).ended_with(0);
    world.train(&[OVERFLOW, "train.max_train_steps=2"]).ended_with(0);
    let [one, two] = [1, 2].map(|step| checkpoint(&world.run(), step));
    for file in ["adapter.safetensors", "optimizer.safetensors"] {
        assert_same_file(one.join(file), two.join(file));
    }
    assert!(text(two.join("state.json")).contains("\"withheld_steps\": 1"));
}

#[test]
fn the_first_step_without_a_finite_loss_ends_the_run_if_asked() {
    let world = World::new("overflow-stop");
    let ran = world.train(&[OVERFLOW, "train.on_non_finite=stop"]).ended_with(1);
    assert!(ran.err.contains(" is not finite at step 2; "), "{}", ran.all());
    assert_eq!(ran.lines("the last good checkpoint: "), ["the last good checkpoint: none was written yet"]);
    assert_eq!(steps_in_metrics(&world.run()), [1]);
}

#[test]
fn a_whole_run_is_verified() {
    let (run, _) = finished();
    assert_snapshot!(run.lokr(&["verify", "run"]).good().out, @"
    good  checkpoints/step-00000006: whole, step 6, 1188 tensors, all finite, shapes fit
    good  checkpoints/step-00000007: whole, step 7, 1188 tensors, all finite, shapes fit
    good  metrics.jsonl: 11 lines
    good  previews/step-00000000_00.png: 64 x 64 pixels
    good  previews/step-00000000_01.png: 64 x 64 pixels
    good  previews/step-00000003_00.png: 64 x 64 pixels
    good  previews/step-00000003_01.png: 64 x 64 pixels
    good  previews/step-00000006_00.png: 64 x 64 pixels
    good  previews/step-00000006_01.png: 64 x 64 pixels
    good  previews/step-00000007_00.png: 64 x 64 pixels
    good  previews/step-00000007_01.png: 64 x 64 pixels
    good  previews.png: 140 x 276 pixels
    good  recipe.toml: a recipe
    good  shapes-step00000002.safetensors: 900 tensors, all finite; no checkpoint of its step to compare with
    good  shapes-step00000004.safetensors: 900 tensors, all finite; no checkpoint of its step to compare with
    good  shapes-step00000006.safetensors: 600 tensors equal the checkpoint's
    good  shapes.safetensors: 600 tensors equal the checkpoint's
    17 good, 0 bad
    ");
}

#[test]
fn each_damaged_file_of_a_run_is_found() {
    let (run, _) = finished();
    let world = World::new("verify-damaged");
    let newest = "checkpoints/step-00000007";
    for (file, how, named) in [
        (format!("{newest}/adapter.safetensors"), Damage::Flip, newest),
        (format!("{newest}/optimizer.safetensors"), Damage::Cut, newest),
        (format!("{newest}/state.json"), Damage::Flip, newest),
        (format!("{newest}/recipe.toml"), Damage::Gone, newest),
        (format!("{newest}/manifest.json"), Damage::Cut, newest),
        ("shapes.safetensors".into(), Damage::Flip, "shapes.safetensors"),
        ("shapes-step00000006.safetensors".into(), Damage::Cut, "shapes-step00000006.safetensors"),
        ("metrics.jsonl".into(), Damage::Cut, "metrics.jsonl"),
        (format!("{newest}/metrics.jsonl"), Damage::Cut, newest),
        ("previews.png".into(), Damage::Cut, "previews.png"),
        ("previews/step-00000003_00.png".into(), Damage::Cut, "previews/step-00000003_00.png"),
    ] {
        _ = std::fs::remove_dir_all(world.run());
        copy_folder(&run.run(), &world.run());
        damage(&world.run().join(&file), how);
        let ran = world.lokr(&["verify", "run"]).ended_with(1);
        let bad = ran.lines("BAD   ");
        assert!(bad.iter().any(|l| l.starts_with(&format!("BAD   {named}: "))), "{file} {how:?}: {}", ran.all());
    }
}

#[test]
fn exported_tensors_are_the_masters_in_every_type_with_scalars_and_with_scales_that_alpha_cannot_tell() {
    let folded = ["network.full_matrix=false", "network.dim=4", "network.alpha=80000", "train.unet_lr=1e-9", "train.text_encoder_lr=1e-9"];
    for (name, set) in [
        ("f32", &["output.save_precision=float"][..]),
        ("bf16-scalar", &["output.save_precision=bf16", "network.use_scalar=true"]),
        ("f16-folded", &[&["output.save_precision=fp16"], &folded[..]].concat()),
    ] {
        let world = World::new(&format!("verify-{name}"));
        world.train(&[set, &["train.max_train_steps=2"]].concat()).good();
        let file = world.run().join("shapes.safetensors");
        let verified = |world: &World| world.lokr(&["verify", "run"]).ended_with(0).lines("tensors equal the checkpoint's").len();
        assert_eq!(verified(&world), 1, "{name}");
        assert_eq!(metadata(&file).contains_key("lokr_scale"), name == "f16-folded");
        // One number of one tensor is another, but a number; then a tensor is missing; then one has another shape.
        let good = bytes(&file);
        let data = 8 + u64::from_le_bytes(good[..8].try_into().expect("eight bytes")) as usize;
        let text = String::from_utf8_lossy(&good[8..data]).into_owned();
        let one = tensors(&file).into_iter().find(|(n, t)| n.contains(".lokr_w") && t.shape.len() == 2 && t.shape[0] != t.shape[1]);
        let (one, (a, b)) = one.map(|(n, t)| (n, (t.shape[0], t.shape[1]))).expect("a matrix that is not square");
        for (how, said) in [("number", " is "), ("name", " is missing"), ("shape", ", the checkpoint has [")] {
            let mut content = good.clone();
            match how {
                "number" => content[good.len() - 1] ^= 4,
                "name" => content[8..data].copy_from_slice(text.replacen(".lokr_w2", ".lokr_q2", 1).as_bytes()),
                _ => {
                    let entry = text.find(&one).expect("it is listed");
                    let changed = text[entry..].replacen(&format!("[{a},{b}]"), &format!("[{b},{a}]"), 1);
                    content[8 + entry..data].copy_from_slice(changed.as_bytes());
                }
            }
            assert!(content != good, "{name} {how}");
            std::fs::write(&file, &content).expect("written");
            let ran = world.lokr(&["verify", "run"]).ended_with(1);
            assert!(ran.lines("BAD   shapes.safetensors: ").iter().any(|l| l.contains(said)), "{name} {how}: {}", ran.all());
        }
    }
}

#[test]
fn the_adapter_of_a_shorter_run_is_compared_with_its_own_step() {
    // A run that ended, went on, and was stopped: its adapter is that of the first end.
    let world = World::new("verify-longer");
    world.train(&["train.max_train_steps=2"]).good();
    let longer = ["train.max_train_steps=30", "output.save_every_n_steps=30"];
    let mut running = world.start(&longer);
    assert!(running.wait_until(|| steps_so_far(&world.run()) >= 4));
    running.signal("TERM");
    running.end().ended_with(3);
    world.lokr(&["verify", "run"]).good();
}

#[test]
fn a_folder_without_a_run_is_refused() {
    let world = World::new("verify-nothing");
    assert_snapshot!(world.lokr(&["verify", "pictures"]).refusal(), @"
    error: `pictures` is no run: it has no checkpoints
    hint: name a run's output.dir
    ");
}
