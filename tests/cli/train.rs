//! What a run leaves behind and what it prints; and that equal runs are equal.

use std::collections::BTreeMap;

use insta::assert_snapshot;

use crate::support::*;

/// What a run printed, without the lines whose place depends on how fast a checkpoint is written.
fn in_order(ran: &Ran, folder: &std::path::Path) -> String {
    masked(&ran.out, folder).lines().filter(|l| !l.starts_with("wrote checkpoint")).map(|l| format!("{l}\n")).collect()
}

#[test]
fn a_run_tells_what_it_derived_before_its_first_step_and_then_what_it_writes() {
    let (world, ran) = finished();
    assert_snapshot!(in_order(ran, &world.folder), @"
    images: 9 found, 9 used, 9 visits per epoch
    captions: 9 from files
    buckets: 2
        32x96         4 images        4 visits  crop loss 15.8 %
        64x64         5 images        5 visits  crop loss  0.0 %
    part    modules  norms    parameters        lr  precision
    te1          18      0         2,376      1e-4  f32
    te2          24      0        12,384      1e-4  f32
    unet        258      0       501,640      2e-4  f32
    total       300      0       516,400
    latents: 18 encoded
    compute f32 on 1 threads; batch 2 x accumulation 2 = 4 images per step
    5 batches and 3 steps per epoch; 7 steps in all (2.33 epochs)
    Lion with 516,400 trained numbers; gradient checkpointing none
    wrote preview run/previews/step-00000000_00.png
    wrote preview run/previews/step-00000000_01.png
    step 0: loss on 2 held-out pictures [loss]
    step 1 loss [loss] lr 2.00e-4 [speed] images/s
    step 2 loss [loss] lr 2.00e-4 [speed] images/s
    wrote LoKr run/shapes-step00000002.safetensors
    wrote preview run/previews/step-00000003_00.png
    wrote preview run/previews/step-00000003_01.png
    step 3: loss on 2 held-out pictures [loss]
    step 4 loss [loss] lr 2.00e-4 [speed] images/s
    wrote LoKr run/shapes-step00000004.safetensors
    wrote LoKr run/shapes-step00000006.safetensors
    wrote preview run/previews/step-00000006_00.png
    wrote preview run/previews/step-00000006_01.png
    step 6: loss on 2 held-out pictures [loss]
    wrote LoKr run/shapes.safetensors
    wrote preview run/previews/step-00000007_00.png
    wrote preview run/previews/step-00000007_01.png
    step 7: loss on 2 held-out pictures [loss]
    wrote all previews run/previews.png
    ");
    let written = ran.lines("wrote checkpoint").join("\n");
    assert_snapshot!(written, @"
    wrote checkpoint run/checkpoints/step-00000002
    wrote checkpoint run/checkpoints/step-00000004
    wrote checkpoint run/checkpoints/step-00000006
    wrote checkpoint run/checkpoints/step-00000007
    ");
}

#[test]
fn a_run_leaves_adapter_metrics_previews_checkpoints_and_recipe() {
    let (world, _) = finished();
    assert_snapshot!(listing(world.run()).join("\n"), @"
    checkpoints/step-00000006/adapter.safetensors
    checkpoints/step-00000006/manifest.json
    checkpoints/step-00000006/metrics.jsonl
    checkpoints/step-00000006/optimizer.safetensors
    checkpoints/step-00000006/recipe.toml
    checkpoints/step-00000006/state.json
    checkpoints/step-00000007/adapter.safetensors
    checkpoints/step-00000007/manifest.json
    checkpoints/step-00000007/metrics.jsonl
    checkpoints/step-00000007/optimizer.safetensors
    checkpoints/step-00000007/recipe.toml
    checkpoints/step-00000007/state.json
    metrics.jsonl
    previews.png
    previews/step-00000000_00.png
    previews/step-00000000_01.png
    previews/step-00000003_00.png
    previews/step-00000003_01.png
    previews/step-00000006_00.png
    previews/step-00000006_01.png
    previews/step-00000007_00.png
    previews/step-00000007_01.png
    recipe.toml
    run.lock
    shapes-step00000002.safetensors
    shapes-step00000004.safetensors
    shapes-step00000006.safetensors
    shapes.safetensors
    ");
}

#[test]
fn the_metrics_have_one_line_for_each_step_and_each_validation() {
    let (world, _) = finished();
    assert_eq!(steps_in_metrics(&world.run()), [1, 2, 3, 4, 5, 6, 7]);
    let lines = metrics(&world.run());
    let validated: Vec<_> = lines.iter().filter(|l| l.get("validation_loss").is_some()).map(|l| l["step"].as_u64()).collect();
    assert_eq!(validated, [Some(0), Some(3), Some(6), Some(7)]);
    for line in lines.iter().filter(|l| l.get("loss").is_some()) {
        let number = |key: &str| line[key].as_f64().unwrap_or_else(|| panic!("{key} in {line}"));
        for key in ["loss", "loss_average", "grad_norm", "seconds", "images_per_second"] {
            assert!(number(key) > 0.0, "{key} in {line}");
        }
        assert_eq!((number("lr_unet"), &line["lr_te"]), (2e-4, &serde_json::json!([1e-4, 1e-4])), "{line}");
        // Three steps an epoch: two of two batches, one of the batch that is left.
        let step = line["step"].as_u64().expect("a number") - 1;
        assert_eq!(line["epoch"], step / 3, "{line}");
        assert!((1..=4).contains(&line["samples"].as_u64().expect("a number")), "{line}");
        assert_eq!(line["withheld"], false);
    }
    let samples: u64 = lines.iter().filter(|l| l["epoch"] == 0).filter_map(|l| l["samples"].as_u64()).sum();
    assert_eq!(samples, 9, "an epoch shows each picture once");
}

#[test]
fn a_checkpoint_has_a_manifest_with_the_length_and_hash_of_each_file() {
    let (world, _) = finished();
    let folder = checkpoint(&world.run(), 7);
    let manifest: serde_json::Value = serde_json::from_str(&text(folder.join("manifest.json"))).expect("JSON");
    let files = manifest["files"].as_object().expect("a table");
    let named: Vec<&str> = files.keys().map(String::as_str).chain(["manifest.json"]).collect();
    let mut on_disk = listing(&folder);
    on_disk.sort_by_key(|n| n == "manifest.json");
    assert_eq!(on_disk, named);
    for (name, sum) in files {
        let content = bytes(folder.join(name));
        assert_eq!(sum["bytes"], content.len(), "{name}");
        assert_eq!(sum["blake3"], blake3::hash(&content).to_hex().as_str(), "{name}");
    }
}

#[test]
fn the_adapter_holds_the_masters_of_the_last_checkpoint_and_tells_of_the_run() {
    let (world, _) = finished();
    let (adapter, masters) =
        (tensors(world.path("run/shapes.safetensors")), tensors(checkpoint(&world.run(), 7).join("adapter.safetensors")));
    for (name, master) in &masters {
        assert_eq!(adapter.get(name), Some(master), "{name}");
    }
    let others: BTreeMap<&str, usize> = adapter.keys().filter(|n| !masters.contains_key(*n)).fold(BTreeMap::new(), |mut counts, name| {
        *counts.entry(name.rsplit('.').next().unwrap_or_default()).or_default() += 1;
        counts
    });
    assert_eq!(others, BTreeMap::from([("alpha", masters.len() / 2)]), "two factors a module, and their alpha");
    let moved = masters.values().flat_map(Stored::floats).filter(|v| *v != 0.0).count();
    assert!(moved > 0, "nothing was trained");

    let told = metadata(world.path("run/shapes.safetensors"));
    let get = |key: &str| told.get(key).map(String::as_str);
    assert_eq!(get("ss_network_module"), Some("lycoris.kohya"));
    assert_eq!((get("ss_steps"), get("ss_num_train_images"), get("ss_unet_lr")), (Some("7"), Some("9"), Some("0.0002")));
    assert!(get("ss_tag_frequency").is_some_and(|t| t.contains("\"disk\": 9")), "{told:?}");
    assert!(!told.contains_key("ss_training_started_at"), "timestamps are off");
}

#[test]
fn previews_have_the_size_asked_for_change_with_training_and_stand_on_one_sheet() {
    let (world, _) = finished();
    let at = |step: u32, prompt: u32| picture(world.path(&format!("run/previews/step-{step:08}_{prompt:02}.png")));
    for step in [0, 3, 6, 7] {
        assert_eq!(at(step, 0).dimensions(), (64, 64));
        assert!(difference(&at(step, 0), &at(step, 1)) > 0, "two prompts, two pictures");
    }
    assert!(difference(&at(0, 0), &at(7, 0)) > 0, "training changes the picture");
    let sheet = picture(world.path("run/previews.png"));
    // Two prompts wide, four rounds high, with gaps of four pixels.
    assert_eq!(sheet.dimensions(), (4 + 2 * 68, 4 + 4 * 68));
    let placed = image::imageops::crop_imm(&sheet, 4 + 68, 4 + 3 * 68, 64, 64).to_image();
    assert_eq!(difference(&placed, &at(7, 1)), 0, "the last round is the last row");
}

#[test]
fn the_same_recipe_gives_the_same_bytes() {
    let (first, _) = finished();
    let second = World::new("again");
    second.train(PREVIEWS).good();
    let without_times = |world: &World| {
        let mut files = contents(world.run());
        files.remove("metrics.jsonl");
        files
    };
    let (a, b) = (without_times(first), without_times(&second));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    let differing: Vec<_> = a.iter().filter(|(name, content)| b[*name] != **content).map(|(name, _)| name).collect();
    assert!(differing.is_empty(), "{differing:?} differ");
    let losses = |world: &World| metrics(&world.run()).iter().map(|l| l["loss"].clone()).collect::<Vec<_>>();
    assert_eq!(losses(first), losses(&second));
}

#[test]
fn the_recipe_beside_a_run_is_complete_and_gives_the_same_run() {
    let (first, _) = finished();
    let again = World::new("from-written-recipe");
    std::fs::copy(first.path("run/recipe.toml"), again.path("recipe.toml")).expect("copied");
    again.train(&[]).good();
    assert_same_file(first.path("run/recipe.toml"), again.path("run/recipe.toml"));
    assert_same_file(first.path("run/shapes.safetensors"), again.path("run/shapes.safetensors"));
    // Every key of the reference page stands in it, with its value or as one that is not set.
    let (written, reference) = (text(first.path("run/recipe.toml")), text(repository().join("docs/recipe-reference.md")));
    let page = reference.split("\n## Options of sd-scripts").next().unwrap_or_default();
    let mut section = "";
    let mut keys = 0;
    for line in page.lines() {
        section = line.strip_prefix("## ").unwrap_or(section);
        let Some(key) = line.strip_prefix("| `").and_then(|l| l.split('`').next()) else { continue };
        // Prompts here are texts; what only an index of posts has stands in recipes with an index.
        if section.starts_with("Tables in") || ["index", "selection", "caption_rules"].contains(&key) {
            continue;
        }
        keys += 1;
        let stands = |form: &str| written.lines().any(|l| l.starts_with(form));
        assert!(stands(&format!("{key} = ")) || stands(&format!("# {key} is not set")), "{section}: {key}");
    }
    assert!(keys > 90, "the reference page was not understood: {keys} keys");
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let (reference, _) = finished();
    let world = World::new("threads");
    for threads in ["2", "3"] {
        world.train(&[&format!("train.threads={threads}"), &format!("output.dir=run{threads}")]).good();
        for file in ["adapter.safetensors", "optimizer.safetensors", "state.json"] {
            assert_same_file(checkpoint(&reference.run(), 7).join(file), checkpoint(&world.path(&format!("run{threads}")), 7).join(file));
        }
    }
}

#[test]
fn gradient_checkpointing_changes_no_byte() {
    let (reference, _) = finished();
    let world = World::new("gradient-checkpointing");
    for (granularity, threads) in [("true", 1), ("layer", 1), ("true", 3), ("layer", 3)] {
        let (key, run) = (format!("train.gradient_checkpointing={granularity}"), format!("{granularity}-{threads}"));
        world.train(&[&key, &format!("train.threads={threads}"), &format!("output.dir={run}")]).good();
        for file in ["adapter.safetensors", "optimizer.safetensors", "state.json"] {
            assert_same_file(checkpoint(&reference.run(), 7).join(file), checkpoint(&world.path(&run), 7).join(file));
        }
    }
}

#[test]
fn the_quickstart_trains_its_model() {
    let out = World::new("quickstart");
    let dir = format!("output.dir={}", out.run().display());
    let short = ["train.max_train_steps=2", "train.lr_warmup_steps=1", "sample.steps=2", "sample.sample_at_first=false", &dir];
    let mut args = vec!["train", "--config", "configs/quickstart.toml"];
    short.iter().for_each(|s| args.extend(["--set", s]));
    let ran = lokr(&repository(), &args).ended_with(0);
    assert_eq!(steps_in_metrics(&out.run()), [1, 2], "{}", ran.all());
    assert!(listing(out.run()).contains(&"kohaku.safetensors".to_string()), "{}", ran.all());
}

/// Whether latents are encoded before the first step, while it trains, by an earlier run, or by one that was killed on the way:
/// the adapter is the same.
#[test]
fn latents_made_while_training_are_those_made_before() {
    // The metadata names the run by a hash of its recipe, which differs.
    let [kept, bare] = ["dataset.cache_latents_to_disk=true", "output.no_metadata=true"];
    let ahead = World::new("latents-ahead");
    let ran = ahead.train(&[kept, bare]).good();
    assert_eq!(ran.lines("latents:"), ["latents: 18 encoded"]);
    let want = contents(ahead.run()).remove("shapes.safetensors").expect("the adapter");
    let lazily = World::new("latents-lazily");
    let set = [kept, bare, "dataset.cache_latents_lazily=true", "dataset.cache_latents_dir=latents"];
    for _ in 0..2 {
        let ran = lazily.train(&set).good();
        assert!(ran.lines("latents:").is_empty(), "{}", ran.all());
        assert!(contents(lazily.run())["shapes.safetensors"] == want, "another adapter");
        std::fs::remove_dir_all(lazily.run()).expect("removed");
    }
    assert!(lazily.path("latents/latents.sqlite").is_file() && !lazily.path("pictures/.lokr-latents").exists());
    // Part of them is lost: the rest is taken, and the run is the same again.
    for file in std::fs::read_dir(lazily.path("latents")).expect("listed").flatten() {
        std::fs::remove_file(file.path()).expect("removed");
    }
    lazily.train(&[&set[..], &["train.max_train_steps=2"]].concat()).good();
    std::fs::remove_dir_all(lazily.run()).expect("removed");
    lazily.train(&set).good();
    assert!(contents(lazily.run())["shapes.safetensors"] == want, "another adapter");
}

/// Fewer instructions than the CPU has give the same run but for the last digits; what it has not is refused.
#[test]
fn a_run_can_do_with_fewer_instructions() {
    let (reference, _) = finished();
    let losses = |run: &std::path::Path| metrics(run).iter().filter_map(|m| m["loss"].as_f64()).collect::<Vec<_>>();
    let world = World::new("instructions");
    for capability in ["avx2", "default"] {
        let run = format!("output.dir={capability}");
        let mut command = lokr_command(&world.folder, &arguments(&[&run]));
        let ended = ran(command.env("LOKR_CPU_CAPABILITY", capability));
        if capability == "avx2" && ended.err.contains("this CPU has default at most") {
            continue;
        }
        ended.good();
        let (these, those) = (losses(&world.path(capability)), losses(&reference.run()));
        assert!(these.len() == 7 && those.len() == 7, "{these:?} {those:?}");
        for (a, b) in these.iter().zip(&those) {
            // f32 sums in another order.
            assert!((a - b).abs() <= 1e-5 * b, "{capability}: {a} {b}");
        }
    }
    let refused = ran(lokr_command(&world.folder, &arguments(&[])).env("LOKR_CPU_CAPABILITY", "sse9")).refusal();
    assert!(refused.contains("LOKR_CPU_CAPABILITY=sse9") && refused.contains("default, avx2 or avx512"), "{refused}");
}
