//! Several processes with a stand-in for a GPU each (see `dry_gpu`): training over NCCL, and what becomes of it when one fails.

use crate::distributed::launched;
use crate::dry_gpu::{command, dry, finished_with, losses, run};
use crate::support::*;

const TWO_GPUS: (&str, &str) = ("DRY_GPU_COUNT", "2");
/// Small buckets, so that there are several; at an epoch's end one rank has no batch.
const STEPS: &[&str] =
    &["train.max_train_steps=4", "train.gradient_accumulation_steps=1", "train.ddp_bucket_cap_mb=0.25", "train.ddp_check_every_n_steps=1"];

#[test]
fn two_processes_train_over_nccl_what_two_train_on_the_cpu() {
    for (name, optimizer, accumulation) in [("adamw", "AdamW", "1"), ("lion8bit", "Lion8bit", "2")] {
        let (gpu, cpu) = (World::new(&format!("dry-two-{name}")), World::new(&format!("cpu-two-{name}")));
        let more = [format!("train.optimizer={optimizer}"), format!("train.gradient_accumulation_steps={accumulation}")];
        let set = [STEPS, &[&*more[0], &*more[1], "train.unet_lr=1e-4", "train.text_encoder_lr=1e-4"]].concat();
        let Some((ran, asked)) = run(&gpu, &launched("2", &[], &set), &[TWO_GPUS]) else { return };
        let ran = ran.ended_with(0);
        let sums = ran.lines("2 processes over NCCL: ");
        assert!(sums.len() == 1 && sums[0].contains(" MB of gradients per step in ") && sums[0].contains("(measured)"), "{}", ran.all());
        let buckets: u64 = sums[0].split(" in ").nth(1).and_then(|s| s.split(' ').next()?.parse().ok()).expect("a number of buckets");
        // Six times to measure it, then once for each step; nothing else goes over NCCL.
        assert_eq!(asked.calls("all-reduce"), buckets * (6 + 4));
        cpu.lokr(&launched("2", &[], &set)).ended_with(0);
        let (a, b) = (losses(&gpu), losses(&cpu));
        assert_eq!((a.len(), b.len()), (4, 4));
        for (step, (a, b)) in a.iter().zip(&b).enumerate() {
            // As for one process: sums in another order, and signs that fall the other way where an update cancels.
            assert!((a / b - 1.0).abs() < 1e-4, "{name}, step {}: {a} on GPUs, {b} on CPUs", step + 1);
        }
    }
}

#[test]
fn sums_cost_no_synchronisation_however_many_there_are() {
    let world = World::new("dry-two-counts");
    let asked = |name: &str, steps: &str, more: &[&str]| {
        let dir = format!("output.dir=\"{name}\"");
        let steps = format!("train.max_train_steps={steps}");
        let set =
            [STEPS, &["train.optimizer=Lion8bit", "train.ddp_check_every_n_steps=100", "output.save_every_n_steps=100", &*dir, &*steps]];
        let (ran, asked) = run(&world, &launched("2", &[], &[&set.concat()[..], more].concat()), &[TWO_GPUS, ("DRY_GPU_DEPTH", "walk")])?;
        ran.ended_with(0);
        Some(asked)
    };
    let one = &["train.ddp_bucket_cap_mb=100"];
    let Some(few) = asked("few-2", "2", one) else { return };
    let of_step = |name: &str, more: &[&str]| {
        let [two, three] = ["2", "3"].map(|steps| asked(&format!("{name}-{steps}"), steps, more).expect("it ran before"));
        let of = |what: &str| three.all(what) - two.all(what);
        (of("all-reduce"), of("synchronise"), of("copy to host"), three.calls("memory peak"))
    };
    let (whole, cut) = (of_step("whole", one), of_step("cut", &[]));
    println!("a step in one bucket: (sums, synchronisations, copies to the host, peak) {whole:?}; in several: {cut:?}");
    assert_eq!(whole.0, 1);
    assert!(cut.0 > 5, "several buckets");
    assert_eq!((whole.1, whole.2), (cut.1, cut.2), "a bucket makes the host wait");
    assert_eq!(few.calls("memory left"), 0);
}

/// Two processes started by hand, each with its variables.
fn by_hand(world: &World, variables: [&[(&str, &str)]; 2], set: &[&str]) -> Option<[Ran; 2]> {
    if !dry() {
        return None;
    }
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port().to_string();
    let children = [0, 1].map(|rank: usize| {
        let rank_text = rank.to_string();
        let own =
            [("RANK", &*rank_text), ("LOCAL_RANK", &rank_text), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port)];
        let mut command = command(world, &arguments(&[STEPS, set].concat()), &[&own, variables[rank]].concat()).expect("built");
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().expect("the program starts")
    });
    Some(children.map(|child| finished_with(child.wait_with_output().expect("it ends"))))
}

#[test]
fn two_processes_on_one_gpu_are_refused_before_nccl_refuses() {
    let world = World::new("dry-shared");
    let shared = [("LOCAL_RANK", "0")];
    let Some(both) = by_hand(&world, [&shared, &shared], &[]) else { return };
    for ran in both {
        let text = ran.ended_with(1).err;
        assert!(text.contains("error: ranks 0 (") && text.contains(") use the same GPU (GPU-00"), "{text}");
        assert!(text.contains("hint: start at most as many processes on a machine as it has GPUs"), "{text}");
    }
}

#[test]
fn a_cpu_and_a_gpu_are_not_one_run() {
    let world = World::new("dry-mixed");
    let Some(both) = by_hand(&world, [&[], &[("DRY_GPU_COUNT", "0")]], &[]) else { return };
    for ran in both {
        let text = ran.ended_with(1).err;
        let what = "`where gradients are summed` is `GPUs, over NCCL` on rank 0";
        assert!(text.contains(what) && text.contains("`CPUs, over TCP` on rank 1"), "{text}");
    }
}

#[test]
fn a_rank_that_dies_in_a_collective_is_named_by_the_other() {
    let world = World::new("dry-death");
    // Beyond the measured sums, in the second step.
    let variables = [TWO_GPUS, ("DRY_GPU_NCCL_SECONDS", "3")];
    let Some((_, asked)) = run(&world, &launched("2", &[], STEPS), &[TWO_GPUS]) else { return };
    let buckets = asked.calls("all-reduce") / (6 + 4);
    let death = format!("1:{}", buckets * 7 + 2);
    std::fs::remove_dir_all(world.run()).expect("the run of the count");
    let dies = [variables[0], variables[1], ("DRY_GPU_NCCL_DEATH", &death)];
    let [first, second] = by_hand(&world, [&dies, &dies], &[]).expect("it ran before");
    assert_eq!(second.status, None, "killed: {}", second.all());
    // The exit status by which a launcher knows that the cause is another rank.
    let text = first.ended_with(75).err;
    assert!(text.contains("error: in all-") && text.contains("rank 1 (") && text.contains("was lost"), "{text}");
    let (ran, _) = run(&world, &launched("2", &[], STEPS), &dies).expect("it ran before");
    assert!(ran.ended_with(137).err.contains("error: rank 1 (local rank 1) was killed by signal 9 (SIGKILL)"));
}
