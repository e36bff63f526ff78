//! The program under other programs' launchers: PyTorch's torchrun, Open MPI's mpirun, Slurm's variables.

use std::process::{Command, Stdio};

use crate::support::*;

const SHORT: &[&str] = &["train.max_train_steps=4", "train.gradient_accumulation_steps=1"];

/// Runs the program under `launcher`; `None` with a message where that cannot even start `true`.
fn under(launcher: &str, options: &[&str], world: &World) -> Option<Ran> {
    let command = |program: &std::path::Path| {
        let mut command = Command::new(launcher);
        command.args(options).arg(program).current_dir(&world.folder).env_remove("RUST_LOG");
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1").env("OMP_NUM_THREADS", "1");
        command
    };
    let works = command("true".as_ref()).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success());
    if !works {
        eprintln!("skipped: {launcher} is not installed, or starts nothing here");
        return None;
    }
    Some(ran(command(&program_path()).args(arguments(SHORT))))
}

/// Two processes were one run: its start block says so, and each step is in the metrics once, with two timings.
#[track_caller]
fn assert_two_trained(ran: Ran, world: &World) {
    let ran = ran.ended_with(0);
    assert!(ran.out.contains("batch 2 x accumulation 1 x processes 2 = 4 images per step"), "{}", ran.all());
    assert_eq!(steps_in_metrics(&world.run()), [1, 2, 3, 4], "{}", ran.all());
    assert!(metrics(&world.run()).iter().all(|l| l["phases"].as_array().is_some_and(|p| p.len() == 2)));
}

/// torchrun of PyTorch, from the environment that `LOKR_TORCH_VENV` names or from the PATH (`pip install torch numpy`).
#[test]
fn under_torchrun() {
    let world = World::new("torchrun");
    let torchrun = std::env::var("LOKR_TORCH_VENV").map_or_else(|_| "torchrun".into(), |venv| format!("{venv}/bin/torchrun"));
    // Older versions know the first option in this spelling alone, newer ones both.
    let options = ["--no_python", "--standalone", "--nproc_per_node", "2"];
    if let Some(ran) = under(&torchrun, &options, &world) {
        assert_two_trained(ran, &world);
    }
}

#[test]
fn under_mpirun() {
    let world = World::new("mpirun");
    if let Some(ran) = under("mpirun", &["-n", "2", "--oversubscribe"], &world) {
        assert_two_trained(ran, &world);
    }
}

#[test]
fn with_the_variables_of_srun() {
    let world = World::new("srun");
    // A job of its own number meets on ports of its own.
    let job = (std::process::id() % 100_000).to_string();
    let children = [0, 1].map(|rank: usize| {
        let mut command = lokr_command(&world.folder, &arguments(SHORT));
        let rank = rank.to_string();
        let vars = [
            ("SLURM_PROCID", rank.as_str()),
            ("SLURM_LOCALID", &rank),
            ("SLURM_NTASKS", "2"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_NNODES", "1"),
            ("SLURM_STEP_NUM_NODES", "1"),
            ("SLURM_NODEID", "0"),
            ("SLURM_TASKS_PER_NODE", "2"),
            ("SLURM_STEP_TASKS_PER_NODE", "2"),
            ("SLURM_JOB_ID", &job),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_JOB_NODELIST", "localhost"),
            ("SLURM_STEP_NODELIST", "localhost"),
        ];
        command.envs(vars).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts")
    });
    let mut out = String::new();
    for child in children {
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        out += &String::from_utf8_lossy(&output.stdout);
    }
    assert_two_trained(Ran { status: Some(0), out, err: String::new() }, &world);
}
