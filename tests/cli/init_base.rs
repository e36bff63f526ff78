//! Base models of random weights, and the type in which a run keeps its base model.

use super::support::{World, assert_same_file, checkpoint, finished};

#[test]
fn a_random_base_is_a_function_of_its_seed_and_can_be_trained() {
    let world = World::new("init-base");
    let make = |seed: &str, out: &str| world.lokr(&["init-base", "--config", "tiny", "--seed", seed, "--out", out]).good();
    let ran = make("0", "base.safetensors");
    assert!(ran.all().contains("wrote base.safetensors: 4928827 random parameters"), "{}", ran.all());
    make("0", "again.safetensors");
    make("1", "other.safetensors");
    let ran = world.lokr(&["init-base", "--config", "tiny", "--seed", "0"]).good();
    assert!(ran.all().contains("wrote random-tiny.safetensors"), "{}", ran.all());
    assert_same_file(world.path("base.safetensors"), world.path("random-tiny.safetensors"));
    assert_same_file(world.path("base.safetensors"), world.path("again.safetensors"));
    let read = |name: &str| std::fs::read(world.path(name)).expect("written");
    assert_ne!(read("base.safetensors"), read("other.safetensors"));

    let shown = world.lokr(&["inspect", "base.safetensors"]).good().all();
    assert!(shown.contains("unet channels [16, 32, 64], transformer depth [0, 1, 2] + 2, heads of 8, 8 groups"), "{shown}");
    assert!(shown.contains("F16"), "{shown}");

    let folder = world.lokr(&["init-base", "--config", "tiny", "--out", "folder", "--format", "diffusers"]).good();
    assert!(folder.all().contains("4928827"), "{}", folder.all());
    for base in ["base.safetensors", "folder"] {
        let base = format!("model.base={base}");
        let ran = world.train(&[&base, "train.max_train_steps=2", "output.resume=never", &format!("output.dir={}", &base[11..15])]).good();
        assert!(!ran.all().contains("not finite"), "{}", ran.all());
    }
    // Both layouts hold the same weights, so both runs are one.
    let adapter = |run: &str| checkpoint(&world.path(run), 2).join("adapter.safetensors");
    assert_same_file(adapter("base"), adapter("fold"));
}

#[test]
fn shapes_that_do_not_exist_are_refused_by_name() {
    let world = World::new("init-base-wrong");
    let ran = world.lokr(&["init-base", "--config", "sd15", "--out", "base.safetensors"]).ended_with(1);
    assert!(ran.all().contains("there are no shapes named `sd15`") && ran.all().contains("sdxl, mid, tiny"), "{}", ran.all());
    assert!(!world.path("base.safetensors").exists());
}

/// The file is f16: kept as it is or asked for as f16, the run is the same to the last byte; wider or narrower, it is another run.
#[test]
fn weights_are_kept_as_asked() {
    let (reference, _) = finished();
    let world = World::new("weight-dtype");
    for dtype in ["fp16", "float", "bf16"] {
        world.train(&[&format!("model.weight_dtype={dtype}"), &format!("output.dir={dtype}")]).good();
    }
    let adapter = |run: std::path::PathBuf| checkpoint(&run, 7).join("adapter.safetensors");
    assert_same_file(adapter(reference.run()), adapter(world.path("fp16")));
    let read = |dtype: &str| std::fs::read(adapter(world.path(dtype))).expect("written");
    assert_ne!(read("fp16"), read("bf16"));
}
