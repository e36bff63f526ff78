//! `lokr plan`: what a run will take, before it takes it.

use super::support::{World, lokr, repository};

/// Facts 6.6: the published preset on SDXL's shapes, without SDXL.
#[test]
fn the_preset_of_kohaku_xl_delta_is_planned_before_the_model_is_there() {
    let args =
        ["plan", "--config", "configs/kohaku-xl-epsilon.toml", "--device", "rtx3090", "--set", "model.base='no-such-model.safetensors'"];
    let ran = lokr(&repository(), &args).good().all();
    for line in [
        "trainable parameters: 384,645,360",
        "adapter file: 769 MB in f16",
        "`no-such-model.safetensors` is not there: planned with the shapes of SDXL, weights in f16",
        "memory on rtx3090, batch 4 at 1024x1024, gradient checkpointing block",
    ] {
        assert!(ran.contains(line), "{line}: {ran}");
    }
    // Factor 2 for the feed-forwards: two factors of 2x2 and of half the sides, 60 times.
    let widest = ran.lines().find(|l| l.starts_with("unet") && l.contains("10240x1280")).unwrap_or_default();
    let words: Vec<&str> = widest.split_whitespace().collect();
    assert_eq!(words[..7], ["unet", "60", "2", "10240x1280", "2x2", "5120x640", "196,608,240"], "{ran}");
}

/// A recipe whose pictures and model are there: its own steps, its own largest batch, and the adapter that training makes.
#[test]
fn a_plan_tells_what_training_finds() {
    let world = World::new("plan");
    let set = ["train.max_train_steps=1", "output.save_precision=fp16"];
    let mut args = vec!["plan", "--config", "recipe.toml"];
    set.iter().for_each(|s| args.extend(["--set", s]));
    let planned = world.lokr(&[&args[..], &["--tflops", "0.2", "--bandwidth", "20"]].concat()).good().all();
    let trained = world.train(&set).good().all();
    for (planned_line, trained_line) in [
        ("trainable parameters: 516,400", "with 516,400 trained numbers"),
        ("steps: 3 per epoch (5 batches), 1 in all", "5 batches and 3 steps per epoch; 1 steps in all"),
    ] {
        assert!(planned.contains(planned_line), "{planned_line}: {planned}");
        assert!(trained.contains(trained_line), "{trained_line}: {trained}");
    }
    assert!(planned.contains("batch 2 at 64x64"), "{planned}");
    assert!(planned.contains("time: at least "), "{planned}");
    // The file is the planned tensors and a header, which has some hundred bytes for each.
    let file = std::fs::metadata(world.path("run/shapes.safetensors")).expect("written").len() as f64 / 1e6;
    let tensors = 516_400.0 * 2.0 / 1e6;
    assert!(planned.contains("adapter file: 1 MB in f16") && file > tensors && file < tensors + 0.3, "{file} MB: {planned}");
    let listed = world.lokr(&[&args[..], &["--layers"]].concat()).good().all();
    let layers = |part: &str| listed.lines().filter(|l| l.starts_with(part)).count();
    assert!(layers("te1") == 18 && layers("te2") == 24, "{listed}");
    assert!(listed.contains("input_blocks.1.0.in_layers.2"), "{listed}");
    // Forced, every layer takes that path.
    let paths = |forward: &str| {
        let set = format!("network.forward={forward}");
        let listed = world.lokr(&[&args[..], &["--layers", "--set", &set]].concat()).good().all();
        assert!(listed.contains(&format!("network.forward = \"{forward}\"")), "{listed}");
        let of = |path: &str| listed.lines().filter(|l| l.starts_with("unet") && l.split_whitespace().nth(7) == Some(path)).count();
        (of("merged"), of("factored"))
    };
    let (merged, factored) = (paths("merged"), paths("factored"));
    assert!(merged.0 > 100 && merged.1 == 0 && factored == (0, merged.0), "{merged:?} {factored:?}");
}

#[test]
fn a_device_that_nobody_knows_is_refused_by_name() {
    let world = World::new("plan-device");
    let ran = world.lokr(&["plan", "--config", "recipe.toml", "--device", "voodoo2"]).ended_with(1).all();
    assert!(ran.contains("nothing is known of a device `voodoo2`") && ran.contains("rtx3090"), "{ran}");
    let ran = world.lokr(&["plan", "--config", "recipe.toml", "--tflops", "0", "--bandwidth", "1"]).ended_with(1).all();
    assert!(ran.contains("--tflops must be above 0"), "{ran}");
}
