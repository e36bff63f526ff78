//! Mixed precision as its user sees it: f16 with its loss scale, bf16, and what a checkpoint keeps of it.

use safetensors::tensor::Dtype;

use crate::support::*;

const FP16: &str = "train.mixed_precision=fp16";
/// A start from which every gradient of the first steps overflows.
const HIGH: &str = "train.initial_loss_scale=1099511627776";

fn validation(world: &World) -> f64 {
    let lines = metrics(&world.run());
    lines.iter().filter_map(|l| l["validation_loss"].as_f64()).next_back().expect("a validation at the end")
}

#[test]
fn fp16_and_bf16_reach_the_held_out_loss_of_f32() {
    let set = ["train.max_train_steps=12", "validation.image_dir=held-out", "validation.every_n_steps=12"];
    let run = |precision: &str, said: &str| {
        let world = World::new(&format!("held-out-{precision}"));
        let ran = world.train(&[&set[..], &[&format!("train.mixed_precision={precision}")]].concat()).good();
        assert_eq!(ran.lines(&format!("compute {said} on 1 threads")).len(), 1, "{}", ran.all());
        assert_eq!(metadata(world.run().join("shapes.safetensors"))["ss_mixed_precision"], precision);
        let stored = tensors(checkpoint(&world.run(), 12).join("adapter.safetensors"));
        assert!(stored.values().all(|t| t.dtype == Dtype::F32), "masters are f32");
        let losses = metrics(&world.run());
        let scaled = losses.iter().filter(|l| l.get("loss_scale").is_some()).count();
        assert_eq!(scaled, if precision == "fp16" { 12 } else { 0 }, "the scale stands in the metrics of f16 alone");
        let first = losses.iter().find_map(|l| l["validation_loss"].as_f64()).expect("before the first step");
        (first, validation(&world))
    };
    let (start, full) = run("no", "f32");
    // What the run improves is the measure; the untrained tiny model predicts noise badly, so that training moves the loss.
    let moved = (start - full).abs();
    assert!(moved > 0.01 * start, "{start} to {full}");
    for (precision, said) in [("fp16", "f16"), ("bf16", "bf16")] {
        let (_, half) = run(precision, said);
        // Lion's steps depend on signs alone, which rounding turns where a gradient is near zero.
        assert!((half - full).abs() < 0.1 * moved, "{precision}: {half} against {full}, from {start}");
    }
}

#[test]
fn overflows_are_skipped_counted_and_recovered_from() {
    let world = World::new("recovery");
    let ran = world.train(&[FP16, HIGH, "train.max_train_steps=30", "train.max_withheld_steps=29"]).good();
    let skipped = ran.lines(" is skipped: its gradient overflows at loss scale ");
    let lines = metrics(&world.run());
    let count = lines.iter().filter(|l| l["withheld"] == true).count();
    assert!(count >= 2 && skipped.len() == count, "{}", ran.all());
    assert!(skipped[0].starts_with("step 1 is skipped: its gradient overflows at loss scale 1099511627776; the next takes 549755813888"));
    assert!(ran.warnings().iter().all(|w| !w.contains("withheld")), "an overflow is no warning: {}", ran.all());
    // The rule, replayed: an overflow halves the scale, and what comes through leaves it.
    let (mut scale, mut overflows) = (2f64.powi(40), 0);
    for line in &lines {
        assert_eq!(line["loss_scale"].as_f64(), Some(scale));
        if line["withheld"] == true {
            (scale, overflows) = (scale / 2.0, overflows + 1);
        }
        assert_eq!(line["overflows"].as_u64(), Some(overflows));
    }
    assert_eq!(lines[29]["withheld"], false, "recovered");
    let good = lines.iter().rev().take_while(|l| l["withheld"] == false).count();
    let state = text(checkpoint(&world.run(), 30).join("state.json"));
    let state: serde_json::Value = serde_json::from_str(&state).expect("JSON");
    assert_eq!(state["withheld_steps"].as_u64(), Some(count as u64));
    assert_eq!(state["loss_scaler"]["scale"].as_f64(), Some(scale));
    assert_eq!(state["loss_scaler"]["good_steps"].as_u64(), Some(good as u64));
}

#[test]
fn a_skipped_step_changes_no_weight() {
    let world = World::new("skipped");
    let set = [FP16, HIGH, "train.max_train_steps=2", "output.save_every_n_steps=1"];
    world.train(&set).good();
    let [one, two] = [1, 2].map(|step| checkpoint(&world.run(), step));
    for file in ["adapter.safetensors", "optimizer.safetensors"] {
        assert_same_file(one.join(file), two.join(file));
    }
}

#[test]
fn too_many_overflows_in_a_row_stop_the_run_and_name_the_last_checkpoint() {
    let world = World::new("only-overflows");
    let ran = world.train(&[FP16, HIGH, "train.max_withheld_steps=3"]).ended_with(1);
    let text = masked(&ran.err, &world.folder);
    insta::assert_snapshot!(text, @r#"
    error: the gradient overflows f16 in 3 steps in a row, up to step 3; the loss scale has fallen to 137438953472
    hint: set train.mixed_precision = "bf16" or "no", or lower the learning rate; none of these steps was applied, and the last checkpoint of the run is good: run/checkpoints/step-00000002
    "#);
    assert_eq!(steps_in_metrics(&world.run()), [1, 2]);
}

/// A rate that no training survives makes NaN in the forward pass, which no scale helps: withheld and located as in f32.
#[test]
fn a_nan_is_told_from_an_overflow() {
    let world = World::new("fp16-nan");
    let ran = world.train(&[FP16, "train.unet_lr=1e30", "train.max_withheld_steps=2"]).ended_with(1);
    let withheld = ran.lines("warning: the step is withheld: ");
    assert_eq!(withheld.len(), 1, "{}", ran.all());
    assert!(withheld[0].contains("the output of the UNet's ") && withheld[0].contains(" is not finite at step "), "{}", ran.all());
    let scales: Vec<f64> = metrics(&world.run()).iter().filter_map(|l| l["loss_scale"].as_f64()).collect();
    assert!(scales.iter().all(|s| *s == 65536.0), "the scale does not fall for a NaN: {scales:?}");
}

#[test]
fn an_f16_run_goes_on_from_any_step_with_the_same_bytes() {
    let set = [FP16, "train.initial_loss_scale=4294967296", "train.max_withheld_steps=100"];
    let (whole, stopped) = (World::new("fp16-whole"), World::new("fp16-stopped"));
    whole.train(&set).good();
    for steps in [1, 2, 4, 7] {
        // The recipe may name another start: what was saved counts.
        let length = format!("train.max_train_steps={steps}");
        stopped.train(&[&set[..], &[&length]].concat()).good();
    }
    assert_same_folder(checkpoint(&whole.run(), 7), checkpoint(&stopped.run(), 7));
    let scales = |w: &World| metrics(&w.run()).iter().map(|l| l["loss_scale"].clone()).collect::<Vec<_>>();
    assert_eq!(scales(&whole), scales(&stopped));
}

/// Held-out loss before the first step and after the last.
fn held_out(name: &str, set: &[&str]) -> (f64, f64, Ran) {
    let world = World::new(name);
    let validation = ["train.max_train_steps=12", "validation.image_dir=held-out", "validation.every_n_steps=12"];
    let ran = world.train(&[&validation[..], set].concat()).good();
    let losses: Vec<f64> = metrics(&world.run()).iter().filter_map(|l| l["validation_loss"].as_f64()).collect();
    assert_eq!(losses.len(), 2);
    (losses[0], losses[1], ran)
}

#[test]
fn a_base_in_8_bits_starts_near_the_full_one_and_trains() {
    let (start, end, _) = held_out("fp8-none", &[]);
    for (set, said) in [
        (vec!["train.fp8_base=true"], "compute f32, base weights e4m3 on 1 threads"),
        (vec![FP16, "train.fp8_base=true"], "compute f16, base weights e4m3 on 1 threads"),
        (vec![FP16, "train.fp8_base_unet=true"], "compute f16, weights of the base UNet e4m3 on 1 threads"),
    ] {
        let (from, to, ran) = held_out(&format!("fp8-{}", set.join("-")), &set);
        assert_eq!(ran.lines(said).len(), 1, "{}", ran.all());
        // Weights off by up to 1/16 each, at random: the prediction is another one by some percent, its loss by less.
        assert!((from / start - 1.0).abs() < 0.03, "{set:?}: {from} against {start}");
        assert!(to < from - 0.5 * (start - end), "{set:?}: {from} to {to}, at full precision {start} to {end}");
    }
}
