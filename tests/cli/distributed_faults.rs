//! What happens to a run of several processes when one of them, a machine or a link fails.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::distributed::launched;
use crate::support::*;

const SHORT: &[&str] = &["train.max_train_steps=6", "train.gradient_accumulation_steps=1", "output.save_every_n_steps=2"];

/// Runs two processes of which one fails as `fault` says.
fn with_fault(world: &World, fault: &str, more: &[&str], set: &[&str]) -> Ran {
    ran(lokr_command(&world.folder, &launched("2", more, &[SHORT, set].concat())).env("LOKR_FAULT", fault))
}

/// A run of two processes in which nothing failed.
fn unbroken() -> &'static World {
    static UNBROKEN: std::sync::OnceLock<World> = std::sync::OnceLock::new();
    UNBROKEN.get_or_init(|| {
        let world = World::new("two-unbroken").kept();
        world.lokr(&launched("2", &[], SHORT)).ended_with(0);
        world
    })
}

#[track_caller]
fn assert_ended_alike(world: &World) {
    assert_same_folder(checkpoint(&unbroken().run(), 6), checkpoint(&world.run(), 6));
    assert_same_file(unbroken().run().join("shapes.safetensors"), world.run().join("shapes.safetensors"));
    assert_eq!(steps_in_metrics(&world.run()), (1..=6).collect::<Vec<_>>(), "each step once");
}

/// No process works in the folder any more.
#[track_caller]
fn assert_nobody_is_left(folder: &Path) {
    let here = |entry: &std::fs::DirEntry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == folder);
    let left = std::fs::read_dir("/proc").expect("the processes").flatten().filter(here).count();
    assert_eq!(left, 0, "processes are left");
}

#[test]
fn a_rank_that_is_killed_is_named_and_the_next_start_goes_on() {
    // At step 2 rank 1 has no batch; step 3, counted from 0, is the first of the second epoch.
    for (fault, rank) in [("1:rendezvous:0:kill", 1), ("1:forward:3:kill", 1), ("1:all-reduce:3:kill", 1), ("0:checkpoint:4:kill", 0)] {
        let world = World::new(&format!("killed-{}", fault.replace(':', "-")));
        let broken = with_fault(&world, fault, &[], &[]).ended_with(137);
        let told = format!("error: rank {rank} (local rank {rank}) was killed by signal 9 (SIGKILL)");
        assert!(broken.err.lines().any(|l| l == told), "{fault}: {}", broken.all());
        assert_nobody_is_left(&world.folder);
        world.lokr(&launched("2", &[], SHORT)).ended_with(0);
        assert_ended_alike(&world);
    }
}

#[test]
fn with_restarts_the_run_ends_by_itself_as_if_nothing_had_happened() {
    let world = World::new("restarted");
    let ran = with_fault(&world, "1:all-reduce:3:kill", &["--max-restarts", "2"], &[]).ended_with(0);
    assert!(ran.err.contains("starting again from the newest whole checkpoint (restart 1 of 2)"), "{}", ran.all());
    assert!(ran.out.contains("resuming from run/checkpoints/step-00000002: 2 of 6 steps done"), "{}", ran.all());
    assert_ended_alike(&world);
}

#[test]
fn a_rank_that_hangs_is_named_by_the_others() {
    let world = World::new("hanging");
    // A quarter of a minute, in which a busy machine makes a step of this model.
    let ran = with_fault(&world, "1:forward:3:hang", &[], &["train.ddp_timeout=0.25"]).ended_with(75);
    let told = "error: rank 1 (";
    let line = ran.err.lines().find_map(|l| l.strip_prefix("[rank 0] ").filter(|l| l.starts_with(told)));
    assert!(line.is_some_and(|l| l.contains("did not come to all-reduce \"gradient bucket 0\"")), "{}", ran.all());
    assert!(ran.err.contains("error: rank 0 (local rank 0) ended because of another rank"), "{}", ran.all());
    // Before it is an error, it is told.
    assert!(ran.err.contains("waiting for rank 1 ("), "{}", ran.all());
    assert_nobody_is_left(&world.folder);
}

#[test]
fn weights_that_differ_are_found_before_they_are_saved() {
    let world = World::new("weights-differ");
    let ran = with_fault(&world, "1:weights:4:weights", &[], &[]).ended_with(1);
    assert!(ran.err.contains("error: after step 4 the weights are not the same on all ranks:"), "{}", ran.all());
    assert!(ran.err.lines().any(|l| l.contains("  rank 1: ") && l.ends_with("is not what rank 0 holds")), "{}", ran.all());
    assert_eq!(checkpoints(&world.run()), ["step-00000002"]);
    let world = World::new("weights-differ-on-request");
    let ran = with_fault(&world, "1:weights:3:weights", &[], &["train.ddp_check_every_n_steps=1"]).ended_with(1);
    assert!(ran.err.contains("error: after step 3 the weights are not the same on all ranks:"), "{}", ran.all());
}

#[test]
fn a_gradient_that_is_infinite_on_one_rank_is_withheld_by_all() {
    let world = World::new("gradient-of-one");
    let ran = with_fault(&world, "1:gradient:3:gradient", &[], &["train.ddp_check_every_n_steps=1"]).ended_with(0);
    let told = ran.lines("warning: the step is withheld: the gradient of ");
    // The samples of both ranks.
    assert!(told.len() == 1 && told[0].contains(" is not finite at step 4; samples of the step: pictures/"), "{}", ran.all());
    assert_eq!(told[0].matches("pictures/").count(), 4, "{}", told[0]);
    let withheld: Vec<bool> = metrics(&world.run()).iter().map(|l| l["withheld"] == true).collect();
    assert_eq!(withheld, [false, false, false, true, false, false]);
}

#[test]
fn in_fp16_an_overflow_on_one_rank_lowers_the_scale_of_all() {
    let world = World::new("overflow-of-one");
    let set = ["train.mixed_precision=fp16", "train.ddp_check_every_n_steps=1"];
    let ran = with_fault(&world, "1:gradient:3:gradient", &[], &set).ended_with(0);
    let skipped = ran.lines("step 4 is skipped: its gradient overflows at loss scale 65536; the next takes 32768");
    assert_eq!(skipped.len(), 1, "{}", ran.all());
    let scales: Vec<f64> = metrics(&world.run()).iter().filter_map(|l| l["loss_scale"].as_f64()).collect();
    assert_eq!(scales, [65536.0, 65536.0, 65536.0, 65536.0, 32768.0, 32768.0]);
}

#[test]
fn a_port_in_use_is_an_error_with_its_way_out() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = taken.local_addr().expect("an address").to_string();
    let world = World::new("port-in-use");
    let ran = world.lokr(&launched("2", &["--rdzv-endpoint", &endpoint], SHORT)).ended_with(1);
    assert!(ran.err.contains(&format!("error: rank 0 cannot listen on {endpoint}: the port is in use")), "{}", ran.all());
    assert!(ran.err.contains("or choose another port with MASTER_PORT or `--rdzv-endpoint host:port`"), "{}", ran.all());
}

/// Two processes started by hand, as a launcher would: each with its variables and its keys. Gives what both said.
fn by_hand(world: &World, sizes: [&str; 2], sets: [&[&str]; 2]) -> [Ran; 2] {
    // Free a moment ago, and not of the range that launchers of other tests choose from.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    let children = [0, 1].map(|rank: usize| {
        let folder = if rank == 0 { world.folder.clone() } else { world.path("other") };
        let mut command = lokr_command(&folder, &arguments(&[SHORT, sets[rank]].concat()));
        command.envs([("RANK", rank.to_string()), ("LOCAL_RANK", rank.to_string()), ("WORLD_SIZE", sizes[rank].into())]);
        command.envs([("MASTER_ADDR", "127.0.0.1".to_string()), ("MASTER_PORT", port.to_string())]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts")
    });
    children.map(|child| {
        let output = child.wait_with_output().expect("it ends");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        Ran { status: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    })
}

#[test]
fn ranks_that_were_started_for_different_runs_are_refused_with_what_differs() {
    let world = World::new("different");
    let copy = || {
        copy_folder(&world.path("pictures"), &world.path("other/pictures"));
        std::fs::copy(world.path("recipe.toml"), world.path("other/recipe.toml")).expect("copied");
    };
    copy();
    let refused = |sizes, sets: [&[&str]; 2], what: &[&str]| {
        for ran in by_hand(&world, sizes, sets) {
            let ran = ran.ended_with(1);
            assert!(what.iter().all(|w| ran.err.contains(w)), "{}", ran.all());
        }
    };
    refused(["2", "3"], [&[], &[]], &["rank 1", "was started for a world of 3, rank 0 for a world of 2"]);
    refused(
        ["2", "2"],
        [&[], &["train.unet_lr=3e-4", "dataset.resolution=96"]],
        &[
            "the ranks were not started for the same run",
            "`train.unet_lr` is `0.0002` on rank 0",
            "`0.0003` on rank 1",
            "`dataset.resolution`",
        ],
    );
    std::fs::write(world.path("other/pictures/00.txt"), "another caption\n").expect("written");
    refused(["2", "2"], [&[], &[]], &["`the pictures and captions (fingerprint)` is"]);
    // Another base model: one number of one tensor is another.
    copy();
    let mut base = bytes(golden("tiny-sdxl.safetensors"));
    let last = base.len() - 1;
    base[last] ^= 1;
    std::fs::write(world.path("other/base.safetensors"), base).expect("written");
    refused(
        ["2", "2"],
        [&[], &["model.base='base.safetensors'"]],
        &["the ranks were not started for the same run: `the base model (SHA-256)` is `", "` on rank 0", "` on rank 1"],
    );
    // Folders with the same content are the same run.
    for ran in by_hand(&world, ["2", "2"], [&[], &[]]) {
        ran.ended_with(0);
    }
    assert_ended_alike(&world);
    assert!(!world.path("other/run/checkpoints").exists(), "rank 0 alone writes");
}

/// Two machines: network namespaces with a link between them, host names of their own, and folders of their own. With CUT the link
/// is cut when machine 0 has made three steps.
const TWO_MACHINES: &str = r#"
set -e
mount -t tmpfs tmpfs /run
ip netns add a; ip netns add b
ip link add va netns a type veth peer name vb netns b
for n in a b; do ip -n $n link set lo up; done
ip -n a addr add 10.77.0.1/24 dev va; ip -n a link set va up
ip -n b addr add 10.77.0.2/24 dev vb; ip -n b link set vb up
[ "$1" = probe ] && exit 0
program=$1; shift
node() {
  cd $2
  exec nsenter --net=/run/netns/$1 unshare --uts sh -c 'hostname machine-'$1'; exec "$@"' sh \
    "$program" launch $OPTIONS --nproc-per-node 2 --nnodes 2 --node-rank $3 --rdzv-endpoint 10.77.0.1:29500 -- $ARGUMENTS
}
(node a "$FOLDER" 0) >"$FOLDER/a.log" 2>&1 & a=$!
(node b "$FOLDER/other" 1) >"$FOLDER/b.log" 2>&1 & b=$!
[ "$CUT" = yes ] && until [ "$(grep -c grad_norm "$FOLDER/run/metrics.jsonl" 2>/dev/null || true)" -ge 3 ] 2>/dev/null; do
  kill -0 $a; sleep 0.05
done
[ "$CUT" = yes ] && ip -n a link set va down
set +e
wait $a; echo "machine 0: $?"
wait $b; echo "machine 1: $?"
"#;

fn two_machines(world: &World, cut: bool, options: &str, fault: &str, set: &[&str]) -> Option<String> {
    let shell = |args: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--net", "--mount", "sh", "-c", TWO_MACHINES, "sh"]).args(args);
        command.env("FOLDER", &world.folder).env("ARGUMENTS", arguments(set).join(" ")).env("CUT", if cut { "yes" } else { "no" });
        command.env("OPTIONS", options);
        if !fault.is_empty() {
            command.env("LOKR_FAULT", fault);
        }
        command.output()
    };
    if !shell(&["probe"]).is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: this system lets no test make network namespaces, so two machines cannot be played");
        return None;
    }
    let program = program_path();
    let output = shell(&[program.to_str().expect("UTF-8")]).expect("it has just worked");
    let log = |name: &str| text(world.path(name));
    Some(format!(
        "{}{}--- a\n{}--- b\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        log("a.log"),
        log("b.log")
    ))
}

fn with_second_machine(name: &str) -> World {
    let world = World::new(name);
    copy_folder(&world.path("pictures"), &world.path("other/pictures"));
    std::fs::copy(world.path("recipe.toml"), world.path("other/recipe.toml")).expect("copied");
    world
}

#[test]
fn two_machines_train_together_and_a_cut_link_is_named() {
    let world = with_second_machine("two-machines");
    let Some(all) = two_machines(&world, false, "", "", SHORT) else { return };
    assert!(all.contains("machine 0: 0\n") && all.contains("machine 1: 0\n"), "{all}");
    assert_eq!(steps_in_metrics(&world.run()), (1..=6).collect::<Vec<_>>());
    let world = with_second_machine("cut-link");
    let endless = ["train.max_train_steps=100000", "train.gradient_accumulation_steps=1"];
    let all = two_machines(&world, true, "", "", &endless).expect("it has worked");
    assert!(all.contains("machine 0: 75\n") && all.contains("machine 1: 75\n"), "{all}");
    // Machine 0 hears nothing of both processes of the other, and the other nothing of rank 0.
    let (a, b) = all.split_once("--- b\n").expect("both logs");
    assert!(a.contains("ranks 2 (machine-b), 3 (machine-b) were lost: nothing was heard for "), "{all}");
    assert!(b.contains("rank 0 (machine-a) was lost: nothing was heard for "), "{all}");
    // A process of the second machine dies: both launchers start again, from the checkpoint that lies on the first.
    let world = with_second_machine("machine-restart");
    let set = [
        "train.max_train_steps=6",
        "train.gradient_accumulation_steps=1",
        "output.save_every_n_steps=1",
        "dataset.subsets[0].num_repeats=4",
    ];
    let all = two_machines(&world, false, "--max-restarts 1", "3:all-reduce:3:kill", &set).expect("it has worked");
    assert!(all.contains("machine 0: 0\n") && all.contains("machine 1: 0\n"), "{all}");
    assert!(all.contains("error: rank 3 (local rank 1) was killed by signal 9 (SIGKILL)"), "{all}");
    assert!(all.contains("resuming from run/checkpoints/step-00000003: 3 of 6 steps done"), "{all}");
    assert_eq!(steps_in_metrics(&world.run()), (1..=6).collect::<Vec<_>>(), "each step once");
}
