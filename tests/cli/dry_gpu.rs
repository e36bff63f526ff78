//! The program with its CUDA features, on stand-ins for NVIDIA's libraries (tools/dry-gpu): what it computes, what it asks of the
//! GPU, and what it says when the driver fails. `scripts/check-cuda.sh test` builds these tests with the features and sets `LOKR_DRY_GPU`;
//! without it they have nothing to run, and say so. There a process has no GPU unless it is given one (`DRY_GPU_COUNT`), so that the same
//! program is also what the GPU is compared with.

use std::collections::BTreeMap;
use std::process::Command;

use crate::support::*;

/// Whether the tests were built for GPUs and the stand-ins are there.
pub fn dry() -> bool {
    let there = std::env::var_os("LOKR_DRY_GPU").is_some();
    if !there {
        eprintln!("skipped: the CUDA program and the stand-ins are not built (scripts/check-cuda.sh test)");
    }
    there
}

/// What a run asked of its GPU: calls and bytes by name. Kernels are named "kernel NAME".
pub struct Asked(BTreeMap<String, (u64, u64)>);

impl Asked {
    pub fn calls(&self, name: &str) -> u64 {
        self.0.get(name).map_or(0, |c| c.0)
    }

    pub fn bytes(&self, name: &str) -> u64 {
        self.0.get(name).map_or(0, |c| c.1)
    }

    /// Calls of all names that begin so.
    pub fn all(&self, prefix: &str) -> u64 {
        self.0.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, c)| c.0).sum()
    }
}

/// Trains the world's recipe on the stand-ins.
fn train(world: &World, set: &[&str], variables: &[(&str, &str)]) -> Option<(Ran, Asked)> {
    run(world, &arguments(set), variables)
}

/// Runs the program on the stand-ins. Of several processes, what rank 0 asked of its GPU.
pub fn run(world: &World, arguments: &[&str], variables: &[(&str, &str)]) -> Option<(Ran, Asked)> {
    let mut command = command(world, arguments, variables)?;
    let ran = finished_with(command.output().expect("the program starts"));
    let asked = std::fs::read_to_string(world.path(REPORT)).unwrap_or_default();
    let line = |line: &str| {
        let mut parts = line.split('\t');
        let (name, calls) = (parts.next()?, parts.next()?.parse().ok()?);
        Some((name.to_string(), (calls, parts.next().and_then(|b| b.parse().ok()).unwrap_or(0))))
    };
    Some((ran, Asked(asked.lines().filter_map(line).collect())))
}

const REPORT: &str = "gpu-report.txt";

/// The program on the stand-ins, by default with one GPU; `None` where they are not there.
pub fn command(world: &World, arguments: &[&str], variables: &[(&str, &str)]) -> Option<Command> {
    if !dry() {
        return None;
    }
    let mut command = lokr_command(&world.folder, arguments);
    command.env("DRY_GPU_REPORT", world.path(REPORT)).env("DRY_GPU_COUNT", "1").envs(variables.iter().copied());
    Some(command)
}

/// What a process said, which did not panic.
pub fn finished_with(output: std::process::Output) -> Ran {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let ran = Ran { status: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) };
    assert!(!ran.err.contains("panicked"), "{}", ran.all());
    ran
}

/// Losses of a finished run.
pub fn losses(world: &World) -> Vec<f64> {
    metrics(&world.run()).iter().filter_map(|m| m["loss"].as_f64()).collect()
}

#[test]
fn the_losses_are_those_of_the_cpu() {
    let (gpu, cpu) = (World::new("dry-gpu"), World::new("dry-cpu"));
    let set = ["train.optimizer=\"Lion8bit\"", "train.max_train_steps=3"];
    let Some((ran, asked)) = train(&gpu, &set, &[]) else { return };
    let ran = ran.good();
    assert!(ran.out.contains("compute f32 on Dry GPU with 24.0 GiB (GPU 0, cuDNN)"), "{}", ran.out);
    assert!(asked.all("kernel ") > 1000 && asked.calls("gemm f32") > 100 && asked.calls("conv f32") > 100);
    cpu.train(&set).good();
    let (gpu, cpu) = (losses(&gpu), losses(&cpu));
    assert_eq!((gpu.len(), cpu.len()), (3, 3));
    for (step, (a, b)) in gpu.iter().zip(&cpu).enumerate() {
        // Sums of some thousand f32 in another order; where an update cancels, its sign may fall the other way.
        assert!((a / b - 1.0).abs() < 1e-4, "step {}: {a} on the GPU, {b} on the CPU", step + 1);
    }
}

#[test]
fn checkpoints_go_from_the_gpu_to_the_gpu_and_a_stopped_run_ends_with_the_same_bytes() {
    let (whole, parts) = (World::new("dry-whole"), World::new("dry-parts"));
    let set = ["train.optimizer=\"Lion8bit\"", "train.max_train_steps=4"];
    if train(&whole, &set, &[]).is_none() {
        return;
    }
    // Stopped by a failing GPU: the checkpoint of step 2 is what is left.
    let launches = train(&parts, &["train.optimizer=\"Lion8bit\"", "train.max_train_steps=3", "output.dir=\"probe\""], &[]);
    let (_, asked) = launches.expect("it ran before");
    let fail = format!("launch:{}", asked.calls("launches") - 100);
    let (ran, _) = train(&parts, &set, &[("DRY_GPU_FAIL", &fail)]).expect("it ran before");
    assert_eq!(ran.status, Some(1), "{}", ran.all());
    assert!(
        ran.err.contains("the GPU failed (CUDA_ERROR_LAUNCH_FAILED)") && ran.err.contains("hint: the last checkpoint is good"),
        "{}",
        ran.err
    );
    assert_eq!(checkpoints(&parts.run()), ["step-00000002"]);
    let (ran, _) = train(&parts, &set, &[]).expect("it ran before");
    assert!(ran.good().out.contains("2 of 4 steps done"));
    for file in ["adapter.safetensors", "optimizer.safetensors"] {
        assert_same_file(checkpoint(&whole.run(), 4).join(file), checkpoint(&parts.run(), 4).join(file));
    }
}

#[test]
fn a_step_asks_the_gpu_for_what_it_asked_before() {
    let world = World::new("dry-counts");
    let run = |steps: u32, accumulation: u32| {
        let (steps, dir) = (format!("train.max_train_steps={steps}"), format!("output.dir=\"run-{steps}-{accumulation}\""));
        let accumulation = format!("train.gradient_accumulation_steps={accumulation}");
        // One bucket, so that all batches are alike.
        let set = [
            "train.optimizer=\"Lion8bit\"",
            "dataset.enable_bucket=false",
            "train.batch_size=1",
            "dataset.cache_latents=true",
            "output.save_every_n_steps=100",
            &*steps,
            &*dir,
            &*accumulation,
        ];
        // Nothing counts as done before the host has waited for it: no buffer may be taken again that a slow GPU could still read.
        train(&world, &set, &[("DRY_GPU_DEPTH", "walk"), ("DRY_GPU_LATE", "1")]).map(|(ran, asked)| {
            ran.good();
            asked
        })
    };
    let (Some(two), Some(three), Some(long)) = (run(2, 1), run(3, 1), run(2, 2)) else { return };
    let of_step = |name: &str| three.calls(name) - two.calls(name);
    let of_batch = |name: &str| (long.calls(name) - two.calls(name)) / 2;
    let bytes_of_batch = |name: &str| (long.bytes(name) - two.bytes(name)) / 2;
    println!(
        "a step of one batch: {} launches, {} copies to the GPU ({} bytes), {} to the host ({} bytes), {} synchronisations, {} allocations; peak {} bytes",
        of_step("launches"),
        of_step("copy to device"),
        three.bytes("copy to device") - two.bytes("copy to device"),
        of_step("copy to host"),
        three.bytes("copy to host") - two.bytes("copy to host"),
        three.all("synchronise") - two.all("synchronise"),
        of_step("allocations"),
        two.calls("memory peak"),
    );
    let locked = "page-locked copy to device";
    println!(
        "a further batch: {} launches, {} copies to the host, {} to the GPU ({} bytes), of them from page-locked memory {} ({} bytes)",
        of_batch("launches"),
        of_batch("copy to host"),
        of_batch("copy to device"),
        bytes_of_batch("copy to device"),
        of_batch(locked),
        bytes_of_batch(locked),
    );
    // Inside the accumulation window the host waits for nothing: losses are read once, at its end.
    assert_eq!(of_batch("copy to host"), 0, "a batch of the accumulation window makes the host wait");
    assert_eq!(long.all("synchronise"), two.all("synchronise"));
    // Latents, noise and size conditions of a picture come from page-locked memory; the rest (token ids, timestep, and the shapes that
    // candle's kernels read) are some bytes each, which the driver sends along with its commands.
    assert_eq!((of_batch(locked), bytes_of_batch(locked)), (3, 4 * (2 * 4 * 8 * 8 + 6)));
    // The next step takes the same memory again.
    assert_eq!(three.0.get("page-locked memory"), two.0.get("page-locked memory"));
    // Nothing is left behind from step to step.
    assert_eq!(three.calls("memory peak"), two.calls("memory peak"));
}

#[test]
fn where_no_memory_can_be_locked_batches_come_as_other_tensors_do() {
    let (locked, plain) = (World::new("dry-locked"), World::new("dry-unlocked"));
    let set = ["train.optimizer=\"Lion8bit\"", "train.max_train_steps=2"];
    let Some((ran, asked)) = train(&locked, &set, &[("DRY_GPU_LATE", "1")]) else { return };
    ran.good();
    assert!(asked.calls("page-locked copy to device") > 0);
    let (ran, asked) = train(&plain, &set, &[("DRY_GPU_FAIL", "host:1")]).expect("it ran before");
    let warnings = ran.ended_with(0).warnings();
    let what = "no page-locked memory for batches, so that each is waited for on its way to the GPU";
    assert!(warnings.len() == 1 && warnings[0].contains(what), "{warnings:?}");
    assert_eq!(asked.calls("page-locked copy to device"), 0);
    assert_eq!(losses(&locked), losses(&plain));
}

#[test]
fn what_the_driver_refuses_becomes_a_message_with_a_way_out() {
    let world = World::new("dry-errors");
    let Some((ran, _)) = train(&world, &["train.device=\"cuda\""], &[("DRY_GPU_COUNT", "0")]) else { return };
    let text = ran.refusal();
    assert!(text.contains("there is no GPU number 0: this process sees 0") && text.contains("train.device = \"cpu\""), "{text}");
    let (ran, _) = train(&world, &[], &[("LOCAL_RANK", "1")]).expect("it ran before");
    let text = ran.refusal();
    assert!(text.contains("there is no GPU number 1: this process sees 1") && text.contains("CUDA_VISIBLE_DEVICES"), "{text}");
    let (ran, _) = train(&world, &[], &[("LOCAL_RANK", "first")]).expect("it ran before");
    assert!(ran.refusal().contains("LOCAL_RANK is \"first\""));

    // Memory ends while weights are loaded, and in the middle of the rehearsal.
    for variable in [("DRY_GPU_MEMORY", "2000000"), ("DRY_GPU_FAIL", "alloc:20000")] {
        let (ran, _) = train(&world, &[], &[variable]).expect("it ran before");
        let text = ran.refusal();
        assert!(text.contains("the GPU has not enough free memory") && text.contains("train.batch_size"), "{text}");
    }
    // Without a GPU, "auto" is the CPU.
    let (ran, _) = train(&world, &["train.max_train_steps=1"], &[("DRY_GPU_COUNT", "0")]).expect("it ran before");
    assert!(ran.good().out.contains("compute f32 on 1 threads"));
}

#[test]
fn memory_ends_before_the_first_step_or_never() {
    let world = World::new("dry-memory");
    let run = |name: &str, memory: &str, more: &[&str]| {
        let dir = format!("output.dir=\"{name}\"");
        let set = [&["train.optimizer=\"Lion8bit\"", "train.max_train_steps=4", "dataset.cache_latents=true", &*dir][..], more].concat();
        train(&world, &set, &[("DRY_GPU_DEPTH", "walk"), ("DRY_GPU_MEMORY", memory)])
    };
    let Some((ran, asked)) = run("all", "24000000000", &[]) else { return };
    assert_eq!(ran.good().lines("the largest batch, 2 pictures of 64x64, fits into the GPU's memory (tried)").len(), 1);
    // What the whole run took at its most is enough; a little less is not, and that is found before any step. The step's own numbers (the
    // norm's sums, the losses) come on top of what is tried: some KiB.
    let peak = asked.calls("memory peak");
    run("enough", &peak.to_string(), &[]).expect("it ran before").0.good();
    let (ran, _) = run("short", &(peak - (64 << 10)).to_string(), &[]).expect("it ran before");
    let text = ran.refusal();
    let what = "the GPU has not enough free memory for a batch of 2 pictures of 64x64, the largest of this run (CUDA_ERROR_OUT_OF_MEMORY)";
    assert!(text.contains(what) && text.contains("hint: set train.gradient_checkpointing = true"), "{text}");
    assert!(text.contains("lower train.batch_size below 2"), "{text}");
    assert!(!world.path("short/metrics.jsonl").exists() || steps_in_metrics(&world.path("short")).is_empty());
}
