//! Who a process is, from the variables that the launchers set.

use dist::{Error, Launcher, World};

fn read(vars: &[(&str, &str)]) -> Result<World, Error> {
    World::from_vars(&|name| vars.iter().find(|(entry, _)| *entry == name).map(|(_, value)| value.to_string()))
}

fn with<'a>(base: &[(&'a str, &'a str)], more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let kept = base.iter().filter(|(name, _)| !more.iter().any(|(other, _)| other == name));
    kept.chain(more.iter().filter(|(_, value)| *value != "UNSET")).copied().collect()
}

/// The error's variable and whole message.
fn error(vars: &[(&str, &str)]) -> (&'static str, String) {
    let error = read(vars).expect_err("these variables were accepted");
    let text = error.to_string();
    assert!(error.hint().is_some(), "no way out: {text}");
    match error {
        Error::Variable { name, .. } => (name, text),
        other => panic!("{other}"),
    }
}

const TORCHRUN: &[(&str, &str)] = &[
    ("RANK", "5"),
    ("LOCAL_RANK", "1"),
    ("WORLD_SIZE", "8"),
    ("LOCAL_WORLD_SIZE", "4"),
    ("GROUP_RANK", "1"),
    ("MASTER_ADDR", "node0"),
    ("MASTER_PORT", "29511"),
    ("TORCHELASTIC_RUN_ID", "job7"),
];

const SLURM: &[(&str, &str)] = &[
    ("SLURM_JOB_ID", "4711"),
    ("SLURM_STEP_ID", "0"),
    ("SLURM_PROCID", "3"),
    ("SLURM_LOCALID", "1"),
    ("SLURM_NODEID", "1"),
    ("SLURM_NTASKS", "5"),
    ("SLURM_STEP_NUM_TASKS", "5"),
    ("SLURM_STEP_NUM_NODES", "3"),
    ("SLURM_STEP_TASKS_PER_NODE", "2(x2),1"),
    ("SLURM_STEP_NODELIST", "gpu[07-08,11]"),
    ("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.99"),
];

const OPEN_MPI: &[(&str, &str)] = &[
    ("OMPI_COMM_WORLD_RANK", "3"),
    ("OMPI_COMM_WORLD_SIZE", "4"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
    ("MASTER_ADDR", "node0"),
    ("MASTER_PORT", "4000"),
];

#[test]
fn nothing_set_is_a_world_of_one() {
    let world = read(&[("PATH", "/bin"), ("RANK", ""), ("LOCAL_RANK", "3")]).unwrap();
    assert_eq!(world, World::single());
    assert_eq!((world.rank, world.local_rank, world.world_size, world.local_world_size), (0, 0, 1, 1));
}

#[test]
fn torchrun() {
    let world = read(TORCHRUN).unwrap();
    let expected = World {
        rank: 5,
        local_rank: 1,
        world_size: 8,
        local_world_size: 4,
        node_rank: 1,
        master_addr: "node0".into(),
        master_port: 29511,
        port_span: 1,
        run_id: "job7".into(),
        launcher: Launcher::Torchrun,
    };
    assert_eq!(world, expected);
}

#[test]
fn torchruns_own_store_is_left_alone() {
    let world = read(&with(TORCHRUN, &[("TORCHELASTIC_USE_AGENT_STORE", "True")])).unwrap();
    assert_eq!(world.master_port, 29512);
    assert!(world.port_span > 1);
    assert_eq!(read(&with(TORCHRUN, &[("TORCHELASTIC_USE_AGENT_STORE", "False")])).unwrap().master_port, 29511);
    let high = read(&with(TORCHRUN, &[("TORCHELASTIC_USE_AGENT_STORE", "True"), ("MASTER_PORT", "65535")])).unwrap();
    assert!(high.master_port.checked_add(high.port_span).is_some(), "{high:?}");
}

#[test]
fn the_five_variables_are_enough() {
    let five = with(TORCHRUN, &[("LOCAL_WORLD_SIZE", "UNSET"), ("GROUP_RANK", "UNSET"), ("TORCHELASTIC_RUN_ID", "UNSET")]);
    let world = read(&five).unwrap();
    assert_eq!((world.rank, world.local_rank, world.world_size, world.local_world_size), (5, 1, 8, 2));
    let here = with(&five, &[("MASTER_ADDR", "127.0.0.1"), ("LOCAL_RANK", "5")]);
    assert_eq!(read(&here).unwrap().local_world_size, 8);
    let one = read(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap();
    assert_eq!((one.world_size, one.local_rank, one.master_addr.as_str()), (1, 0, "127.0.0.1"));
}

#[test]
fn values_that_cannot_be_are_named() {
    for (change, name, part) in [
        (("RANK", "five"), "RANK", "the variable RANK is `five`: a whole number"),
        (("RANK", "-1"), "RANK", "`-1`"),
        (("RANK", "8"), "RANK", "the variable RANK is `8`: it must be less than WORLD_SIZE, which is 8"),
        (("RANK", "UNSET"), "RANK", "the variable RANK is not set: WORLD_SIZE is set"),
        (("WORLD_SIZE", "UNSET"), "WORLD_SIZE", "not set"),
        (("WORLD_SIZE", "0"), "RANK", "must be less than WORLD_SIZE, which is 0"),
        (("LOCAL_RANK", "UNSET"), "LOCAL_RANK", "the world has 8 processes"),
        (("LOCAL_RANK", "4"), "LOCAL_RANK", "must be less than LOCAL_WORLD_SIZE, which is 4"),
        (("LOCAL_WORLD_SIZE", "9"), "LOCAL_WORLD_SIZE", "it must lie between 1 and WORLD_SIZE, which is 8"),
        (("LOCAL_WORLD_SIZE", "0"), "LOCAL_WORLD_SIZE", "between 1 and"),
        (("MASTER_ADDR", "UNSET"), "MASTER_ADDR", "not set"),
        (("MASTER_PORT", "UNSET"), "MASTER_PORT", "not set"),
        (("MASTER_PORT", "70000"), "MASTER_PORT", "`70000`: a port lies between"),
        (("MASTER_PORT", "0"), "MASTER_PORT", "`0`"),
        (("MASTER_PORT", "http"), "MASTER_PORT", "`http`"),
    ] {
        let (seen, text) = error(&with(TORCHRUN, &[change]));
        assert_eq!(seen, name, "{change:?}");
        assert!(text.contains(part), "{change:?}: {text}");
    }
}

#[test]
fn slurm() {
    let world = read(SLURM).unwrap();
    assert_eq!((world.rank, world.local_rank, world.world_size, world.local_world_size, world.node_rank), (3, 1, 5, 2, 1));
    assert_eq!((world.master_addr.as_str(), world.launcher), ("gpu07", Launcher::Slurm));
    assert_eq!(world.run_id, "4711.0");
    assert!(world.port_span > 1, "the port was not chosen by the user");
    // All ranks of one job meet on the same port, others (nearly always) on another one.
    let port = |vars: &[(&str, &str)]| read(vars).unwrap().master_port;
    assert_eq!(world.master_port, port(&with(SLURM, &[("SLURM_PROCID", "2"), ("SLURM_LOCALID", "0")])));
    assert_ne!(world.master_port, port(&with(SLURM, &[("SLURM_JOB_ID", "4712")])));
    let chosen = read(&with(SLURM, &[("MASTER_PORT", "3333"), ("MASTER_ADDR", "ib0")])).unwrap();
    assert_eq!((chosen.master_port, chosen.port_span, chosen.master_addr.as_str()), (3333, 1, "ib0"));
}

#[test]
fn slurm_on_one_machine_and_with_few_variables() {
    let world = read(&with(SLURM, &[("SLURM_STEP_NUM_NODES", "1"), ("SLURM_NODEID", "0"), ("SLURM_LOCALID", "3")])).unwrap();
    assert_eq!((world.local_world_size, world.master_addr.as_str()), (5, "127.0.0.1"));
    let bare = read(&[("SLURM_PROCID", "1"), ("SLURM_LOCALID", "1"), ("SLURM_NTASKS", "2")]).unwrap();
    assert_eq!((bare.rank, bare.world_size, bare.local_world_size, bare.master_addr.as_str()), (1, 2, 2, "127.0.0.1"));
    let two = [
        ("SLURM_PROCID", "1"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_NTASKS", "2"),
        ("SLURM_NNODES", "2"),
        ("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.1"),
    ];
    let two = read(&two).unwrap();
    assert_eq!((two.local_world_size, two.node_rank, two.master_addr.as_str()), (1, 1, "10.0.0.1"));
}

#[test]
fn a_batch_script_is_not_a_task() {
    let script = [("SLURM_JOB_ID", "1"), ("SLURM_PROCID", "0"), ("SLURM_LOCALID", "0"), ("SLURM_NTASKS", "4"), ("SLURM_NODEID", "0")];
    let (name, text) = error(&script);
    assert_eq!(name, "SLURM_NTASKS");
    assert!(text.contains("not started by srun"), "{text}");
    let single = read(&with(&script, &[("SLURM_NTASKS", "UNSET")])).unwrap();
    assert_eq!(single.world_size, 1);
}

#[test]
fn slurms_contradictions_are_named() {
    for (change, name) in [
        (("SLURM_PROCID", "5"), "SLURM_PROCID"),
        (("SLURM_PROCID", "x"), "SLURM_PROCID"),
        (("SLURM_LOCALID", "2"), "SLURM_LOCALID"),
        (("SLURM_LOCALID", "UNSET"), "SLURM_LOCALID"),
        (("SLURM_NODEID", "3"), "SLURM_NODEID"),
        (("SLURM_STEP_TASKS_PER_NODE", "2"), "SLURM_STEP_TASKS_PER_NODE"),
        (("SLURM_STEP_TASKS_PER_NODE", "two"), "SLURM_STEP_TASKS_PER_NODE"),
        (("SLURM_STEP_NODELIST", "gpu[07"), "SLURM_STEP_NODELIST"),
    ] {
        assert_eq!(error(&with(SLURM, &[change])).0, name, "{change:?}");
    }
}

#[test]
fn open_mpi() {
    let world = read(OPEN_MPI).unwrap();
    assert_eq!((world.rank, world.local_rank, world.world_size, world.local_world_size, world.node_rank), (3, 1, 4, 2, 1));
    assert_eq!((world.master_port, world.port_span, world.launcher), (4000, 1, Launcher::OpenMpi));
    // Started by srun inside a job: Slurm's numbers are those of mpirun's daemons.
    assert_eq!(read(&[OPEN_MPI, SLURM].concat()).unwrap().world_size, 4);
    let (name, text) = error(&with(OPEN_MPI, &[("MASTER_ADDR", "UNSET")]));
    assert_eq!(name, "MASTER_ADDR");
    assert!(text.contains("OMPI_COMM_WORLD_SIZE is 4"), "{text}");
    let here = [("MASTER_ADDR", "UNSET"), ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"), ("OMPI_COMM_WORLD_LOCAL_RANK", "3")];
    assert_eq!(read(&with(OPEN_MPI, &here)).unwrap().master_addr, "127.0.0.1");
    assert_eq!(error(&with(OPEN_MPI, &[("OMPI_COMM_WORLD_LOCAL_RANK", "2")])).0, "OMPI_COMM_WORLD_LOCAL_RANK");
}

#[test]
fn pmi() {
    let hydra = [("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "1"), ("MPI_LOCALNRANKS", "2")];
    let world = read(&hydra).unwrap();
    assert_eq!((world.rank, world.local_rank, world.world_size, world.launcher), (1, 1, 2, Launcher::Pmi));
    assert_eq!(read(&[&hydra, SLURM].concat()).unwrap().launcher, Launcher::Pmi);
    // `srun --mpi=pmi2` sets these two beside its own.
    assert_eq!(read(&[&hydra[..2], SLURM].concat()).unwrap().launcher, Launcher::Slurm);
    assert_eq!(error(&hydra[..2]).0, "MPI_LOCALRANKID");
    assert_eq!(read(&[("PMI_RANK", "0"), ("PMI_SIZE", "1")]).unwrap().world_size, 1);
}
