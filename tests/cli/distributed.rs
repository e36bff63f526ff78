//! Several processes train what one process trains.

use crate::support::*;

/// Twenty steps of four batches: 9 pictures make 5 batches, so that every second step has one batch, which leaves three of four
/// processes without work. Two of the five batches are short. Small buckets, so that there are several.
const TWENTY: &[&str] = &[
    "train.max_train_steps=20",
    "train.optimizer=AdamW",
    "train.unet_lr=1e-4",
    "train.text_encoder_lr=1e-4",
    "train.ddp_bucket_cap_mb=0.25",
    "train.ddp_check_every_n_steps=3",
    "output.save_every_n_steps=10",
];

/// The arguments that train on so many processes.
pub fn launched<'a>(processes: &'a str, more: &[&'a str], set: &[&'a str]) -> Vec<&'a str> {
    [&["launch", "--nproc-per-node", processes], more, &["--"], &arguments(set)[..]].concat()
}

fn losses(world: &World) -> Vec<f64> {
    metrics(&world.run()).iter().filter_map(|l| l.get("loss")?.as_f64()).collect()
}

/// Largest difference of an element of the adapter, and the largest element.
fn adapter_difference(a: &World, b: &World, step: u64) -> (f32, f32) {
    let read = |w: &World| tensors(checkpoint(&w.run(), step).join("adapter.safetensors"));
    let (a, b) = (read(a), read(b));
    assert!(a.keys().eq(b.keys()));
    let mut largest = (0.0f32, 0.0f32);
    for (name, tensor) in &a {
        for (x, y) in tensor.floats().iter().zip(b[name].floats()) {
            largest = (largest.0.max((x - y).abs()), largest.1.max(x.abs()));
        }
    }
    largest
}

/// The losses are equal to 1e-5 of their size and the adapters to 1e-5: what is left is that f32 sums of the same numbers were
/// formed in another order.
#[track_caller]
pub fn assert_same_training(a: &World, b: &World, steps: u64) {
    let (x, y) = (losses(a), losses(b));
    assert_eq!((x.len(), y.len()), (steps as usize, steps as usize));
    for (step, (x, y)) in x.iter().zip(&y).enumerate() {
        assert!((x - y).abs() <= 1e-5 * x.abs(), "step {}: {x} and {y}", step + 1);
    }
    let (difference, largest) = adapter_difference(a, b, steps);
    assert!(difference <= 1e-5 && largest > 0.1, "adapters differ by {difference}, of {largest}");
}

/// One process with accumulation 4.
fn alone() -> &'static World {
    static ALONE: std::sync::OnceLock<World> = std::sync::OnceLock::new();
    ALONE.get_or_init(|| {
        let world = World::new("one-process").kept();
        world.train(&[TWENTY, &["train.gradient_accumulation_steps=4"]].concat()).good();
        world
    })
}

#[test]
fn two_and_four_processes_train_what_one_trains() {
    for (processes, accumulation, checkpointing) in [("2", "2", "true"), ("4", "1", "false")] {
        let world = World::new(&format!("{processes}-processes"));
        let accumulation = format!("train.gradient_accumulation_steps={accumulation}");
        let checkpointing = format!("train.gradient_checkpointing={checkpointing}");
        let ran = world.lokr(&launched(processes, &[], &[TWENTY, &[&accumulation, &checkpointing]].concat())).ended_with(0);
        assert_same_training(alone(), &world, 20);
        // Rank 0 alone speaks, and says what the processes cost.
        assert!(ran.out.lines().all(|l| l.starts_with("[rank 0] ")), "{}", ran.all());
        let whole =
            format!("x accumulation {} x processes {processes} = 8 images per step", 4 / processes.parse::<u64>().expect("a number"));
        assert_eq!(ran.lines(&whole).len(), 1, "{}", ran.all());
        let sums = ran.lines("MB of gradients per step in ");
        assert!(sums.len() == 1 && sums[0].contains("(measured)") && !sums[0].contains("in 1 buckets"), "{}", ran.all());
        // A timing of each rank and phase.
        for line in metrics(&world.run()).iter().filter(|l| l.get("loss").is_some()) {
            let phases = line["phases"].as_array().expect("a list");
            assert_eq!(phases.len().to_string(), processes);
            assert!(phases.iter().all(|p| ["data", "compute", "reduce"].iter().all(|name| p[name].is_f64())), "{line}");
        }
    }
}

#[test]
fn a_run_of_four_goes_on_on_two_and_on_one_with_the_same_steps() {
    let world = World::new("elastic");
    let set = [TWENTY, &["train.gradient_accumulation_steps=1", "output.save_every_n_steps=5"]].concat();
    let until = |steps: &'static str| [&set[..], &[steps]].concat();
    // The learning rate is constant, so that the length of a run changes nothing but its end.
    world.lokr(&launched("4", &[], &until("train.max_train_steps=5"))).ended_with(0);
    let ran = world.lokr(&launched("2", &[], &until("train.max_train_steps=9"))).ended_with(0);
    let told = "saved on 4 processes, going on on 2: accumulation 2 in place of the recipe's 1, so that a step has the same 4 batches";
    assert_eq!(ran.lines(told).len(), 1, "{}", ran.all());
    // Once more on two: what was adjusted stays adjusted.
    world.lokr(&launched("2", &[], &until("train.max_train_steps=14"))).ended_with(0);
    let ran = world.lokr(&launched("3", &[], &set)).ended_with(1);
    assert!(ran.err.contains("was saved on 2 processes with 4 batches in each step, which 3 processes cannot share"), "{}", ran.all());
    assert!(ran.err.contains("start 1, 2, 4 processes, or resume with --allow-recipe-change"), "{}", ran.all());
    world.train(&set).good();
    assert_same_training(alone(), &world, 20);
}

#[test]
fn a_stopped_run_of_two_ends_with_the_bytes_of_one_that_never_stopped() {
    let (whole, stopped) = (World::new("two-whole"), World::new("two-stopped"));
    let set = ["train.gradient_accumulation_steps=1", "dataset.cache_latents_to_disk=true", "train.optimizer=Lion8bit"];
    whole.lokr(&launched("2", &[], &set)).ended_with(0);
    for steps in ["train.max_train_steps=3", "train.max_train_steps=7"] {
        stopped.lokr(&launched("2", &[], &[&set[..], &[steps]].concat())).ended_with(0);
    }
    assert_same_folder(checkpoint(&whole.run(), 7), checkpoint(&stopped.run(), 7));
    assert_same_file(whole.run().join("shapes.safetensors"), stopped.run().join("shapes.safetensors"));
}

#[test]
fn a_signal_to_one_rank_stops_all_after_the_same_step() {
    let world = World::new("rank-signal");
    let mut running = start(&world.folder, &launched("2", &[], &["train.max_train_steps=100000"]));
    assert!(running.wait_until(|| steps_so_far(&world.run()) >= 2), "it ended early");
    let is_rank_1 = |process: &std::path::Path| {
        let here = std::fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == world.folder);
        here && std::fs::read(process.join("environ")).is_ok_and(|vars| vars.split(|b| *b == 0).any(|v| v == b"RANK=1"))
    };
    let processes = std::fs::read_dir("/proc").expect("the processes").flatten().map(|entry| entry.path());
    let found: Vec<_> = processes.filter(|process| is_rank_1(process)).collect();
    let [rank] = &found[..] else { panic!("{found:?}") };
    let pid = rank.file_name().expect("a number").to_string_lossy().into_owned();
    assert!(std::process::Command::new("kill").arg(pid).status().expect("kill starts").success());
    let ran = running.end().ended_with(3);
    let last = *steps_in_metrics(&world.run()).last().expect("steps");
    assert!(ran.out.contains(&format!("stopped after step {last} of 100000")), "{}", ran.all());
    assert_eq!(checkpoints(&world.run()).last().map(String::as_str), Some(format!("step-{last:08}").as_str()));
}

#[test]
fn a_signal_to_the_launcher_stops_all_ranks_with_the_state_saved() {
    let world = World::new("launcher-signal");
    let mut running = start(&world.folder, &launched("2", &[], &["train.max_train_steps=100000"]));
    assert!(running.wait_until(|| steps_so_far(&world.run()) >= 2), "it ended early");
    running.signal("TERM");
    let ran = running.end().ended_with(3);
    let last = *steps_in_metrics(&world.run()).last().expect("steps");
    assert!(ran.out.contains(&format!("stopped after step {last} of 100000")), "{}", ran.all());
    assert!(checkpoints(&world.run()).contains(&format!("step-{last:08}")), "{}", ran.all());
}
