//! Who this process is among the others, from the variables of whatever started it. Nothing is guessed: a value that
//! cannot be read, or two that contradict, are errors that name the variable, its value and the way out.

use crate::slurm;
use crate::{Error, Result};

/// Port that is used where the starter names none; torchrun's default too.
pub(crate) const DEFAULT_PORT: u16 = 29500;
/// How many ports rank 0 may try where the user did not choose one.
const SPAN: u16 = 16;
const TRUTH: [&str; 3] = ["1", "true", "True"];

/// What started this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Nothing that announces itself: a world of one.
    None,
    /// torchrun, `lokr launch`, or anything else that sets RANK and WORLD_SIZE.
    Torchrun,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// Slurm's `srun`.
    Slurm,
    /// A launcher with MPICH's interface (Hydra, Intel MPI).
    Pmi,
}

impl std::fmt::Display for Launcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Launcher::None => "no launcher",
            Launcher::Torchrun => "torchrun's variables",
            Launcher::OpenMpi => "Open MPI",
            Launcher::Slurm => "Slurm",
            Launcher::Pmi => "PMI",
        })
    }
}

/// This process's place among all processes of the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// Number of this process, from 0.
    pub rank: usize,
    /// Its number on its machine, from 0: the device that it takes.
    pub local_rank: usize,
    /// How many processes there are.
    pub world_size: usize,
    /// How many of them run on this machine. Where LOCAL_WORLD_SIZE is absent beside RANK: all if MASTER_ADDR is this
    /// machine's loopback, else as many as must be there for `local_rank` to exist.
    pub local_world_size: usize,
    /// Number of this machine, from 0. With MPI: `rank / local_world_size`, which holds when ranks fill machine by machine.
    pub node_rank: usize,
    /// Name or address of the machine of rank 0.
    pub master_addr: String,
    /// Port on which rank 0 listens.
    pub master_port: u16,
    /// How many ports from `master_port` on rank 0 may try: 1 where the user chose the port.
    pub port_span: u16,
    /// Tells this run from others that listen nearby; may be empty.
    pub run_id: String,
    /// Where all of this comes from.
    pub launcher: Launcher,
}

impl World {
    /// A world of one process.
    pub fn single() -> Self {
        Self::on_this_machine(0, 1, DEFAULT_PORT, Launcher::None)
    }

    /// Process `rank` of `world_size` processes that all run on this machine, with rank 0 listening on `port`.
    pub fn on_this_machine(rank: usize, world_size: usize, port: u16, launcher: Launcher) -> Self {
        Self {
            rank,
            local_rank: rank,
            world_size,
            local_world_size: world_size,
            node_rank: 0,
            master_addr: "127.0.0.1".into(),
            master_port: port,
            port_span: 1,
            run_id: String::new(),
            launcher,
        }
    }

    /// Reads the environment of this process.
    ///
    /// The first of these that is present counts: `RANK` and `WORLD_SIZE` (torchrun, `lokr launch`), Open MPI's
    /// variables, PMI's with Hydra's local ranks, Slurm's, PMI's alone. MPI stands before Slurm because `mpirun` inside
    /// a Slurm job starts its ranks through `srun`, whose variables then number the machines and not the ranks.
    ///
    /// # Errors
    /// [`Error::Variable`].
    pub fn from_env() -> Result<Self> {
        Self::from_vars(&|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    /// [`World::from_env`] with the variables that `get` returns.
    ///
    /// # Errors
    /// [`Error::Variable`].
    pub fn from_vars(get: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let vars = Vars { get };
        let world = if vars.is_set("RANK") || vars.is_set("WORLD_SIZE") {
            torchrun(&vars)?
        } else if vars.is_set("OMPI_COMM_WORLD_SIZE") || vars.is_set("OMPI_COMM_WORLD_RANK") {
            open_mpi(&vars)?
        } else if vars.is_set("PMI_RANK") && vars.is_set("MPI_LOCALRANKID") {
            pmi(&vars)?
        } else if vars.is_set("SLURM_PROCID") {
            slurm::world(&vars)?
        } else if vars.is_set("PMI_RANK") {
            pmi(&vars)?
        } else {
            Self::single()
        };
        Ok(world)
    }
}

/// The variables, with errors that name them.
pub(crate) struct Vars<'a> {
    pub(crate) get: &'a dyn Fn(&str) -> Option<String>,
}

/// A number together with the variable it came from, for errors about two of them.
#[derive(Clone, Copy)]
pub(crate) struct Number {
    pub(crate) name: &'static str,
    pub(crate) value: usize,
}

impl Vars<'_> {
    /// The text of a variable; one that is set to nothing counts as absent.
    pub(crate) fn text(&self, name: &str) -> Option<String> {
        (self.get)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.text(name).is_some()
    }

    pub(crate) fn number(&self, name: &'static str) -> Result<Option<Number>> {
        let Some(value) = self.text(name) else { return Ok(None) };
        match value.parse() {
            Ok(value) => Ok(Some(Number { name, value })),
            Err(_) => Err(Error::Variable {
                name,
                value: Some(value),
                what: "a whole number from 0 is needed".into(),
                way_out: format!("set {name} to a number, or unset all variables of the launcher to run as one process"),
            }),
        }
    }

    pub(crate) fn required(&self, name: &'static str, beside: &str) -> Result<Number> {
        self.number(name)?.ok_or_else(|| Error::Variable {
            name,
            value: None,
            what: format!("{beside} is set, so this process is one of several"),
            way_out: format!("set {name}, or unset {beside} to run as one process"),
        })
    }

    /// The first of `names` that is set.
    pub(crate) fn first_number(&self, names: &[&'static str]) -> Result<Option<Number>> {
        for name in names {
            if let Some(number) = self.number(name)? {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    fn port(&self) -> Result<Option<u16>> {
        let Some(Number { name, value }) = self.number("MASTER_PORT")? else { return Ok(None) };
        match u16::try_from(value) {
            Ok(port) if port > 0 => Ok(Some(port)),
            _ => Err(contradiction(name, value, "a port lies between 1 and 65535".into(), "choose a free port such as 29500")),
        }
    }

    /// Where rank 0 listens: MASTER_PORT, or else a few ports that depend on the run's id, so that runs on one machine
    /// seldom meet.
    pub(crate) fn master_port(&self, run_id: &str) -> Result<(u16, u16)> {
        if let Some(port) = self.port()? {
            return Ok((port, 1));
        }
        // FNV-1a: any fixed spread over 100 stretches of 16 ports will do, all below the range of outgoing connections.
        let hash = run_id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        let stretch = if run_id.is_empty() { 0 } else { (hash % 100) as u16 };
        Ok((DEFAULT_PORT + stretch * SPAN, SPAN))
    }
}

pub(crate) fn contradiction(name: &'static str, value: usize, what: String, way_out: &str) -> Error {
    Error::Variable { name, value: Some(value.to_string()), what, way_out: way_out.into() }
}

/// Fails if `part` does not count from 0 below `whole`.
pub(crate) fn below(part: Number, whole: Number) -> Result<()> {
    if part.value < whole.value {
        return Ok(());
    }
    let what = format!("it must be less than {}, which is {}", whole.name, whole.value);
    Err(contradiction(part.name, part.value, what, "ranks count from 0: check how the processes were started"))
}

/// Fails if more processes are said to be on this machine than there are.
pub(crate) fn at_most(part: Number, whole: Number) -> Result<()> {
    if part.value >= 1 && part.value <= whole.value {
        return Ok(());
    }
    let what = format!("it must lie between 1 and {}, which is {}", whole.name, whole.value);
    Err(contradiction(part.name, part.value, what, "check how the processes were started"))
}

fn torchrun(vars: &Vars) -> Result<World> {
    let rank = vars.required("RANK", "WORLD_SIZE")?;
    let size = vars.required("WORLD_SIZE", "RANK")?;
    below(rank, size)?;
    let local = match (vars.number("LOCAL_RANK")?, size.value) {
        (Some(local), _) => local,
        (None, 1) => Number { name: "LOCAL_RANK", value: 0 },
        (None, _) => {
            return Err(Error::Variable {
                name: "LOCAL_RANK",
                value: None,
                what: format!("the world has {} processes, and which device of its machine this one takes is not known", size.value),
                way_out: "set LOCAL_RANK to the process's number on its machine; to 0 where each machine runs one".into(),
            });
        }
    };
    let local_size = match vars.number("LOCAL_WORLD_SIZE")? {
        Some(local_size) => {
            at_most(local_size, size)?;
            below(local, local_size)?;
            local_size.value
        }
        None if vars.text("MASTER_ADDR").is_none_or(|address| is_loopback(&address)) => size.value,
        None => local.value + 1,
    };
    below(local, size)?;
    let node_rank = match vars.first_number(&["GROUP_RANK", "NODE_RANK"])? {
        Some(node) => node.value,
        None => rank.value.saturating_sub(local.value) / local_size,
    };
    let run_id = vars.text("TORCHELASTIC_RUN_ID").filter(|id| id != "none").unwrap_or_default();
    let (mut port, mut span) = match (vars.port()?, size.value) {
        (Some(port), _) => (port, 1),
        (None, 1) => (DEFAULT_PORT, 1),
        (None, _) => {
            return Err(Error::Variable {
                name: "MASTER_PORT",
                value: None,
                what: format!("the world has {} processes, which meet there", size.value),
                way_out: "set MASTER_PORT to the same free port on all ranks, such as 29500".into(),
            });
        }
    };
    // torchrun's agent then listens on MASTER_PORT itself and means its store, which only PyTorch speaks.
    if vars.text("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| TRUTH.contains(&value.as_str())) {
        span = SPAN;
        port = if port <= u16::MAX - SPAN { port + 1 } else { port - SPAN };
    }
    Ok(World {
        rank: rank.value,
        local_rank: local.value,
        world_size: size.value,
        local_world_size: local_size,
        node_rank,
        master_addr: master_addr(vars, size, None, "set MASTER_ADDR to the name of rank 0's machine on all ranks")?,
        master_port: port,
        port_span: span,
        run_id,
        launcher: Launcher::Torchrun,
    })
}

fn is_loopback(address: &str) -> bool {
    address == "localhost" || address.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// MASTER_ADDR; else `known`; else, for one process, this machine; else an error.
pub(crate) fn master_addr(vars: &Vars, size: Number, known: Option<String>, way_out: &str) -> Result<String> {
    match vars.text("MASTER_ADDR").or(known) {
        Some(address) => Ok(address),
        None if size.value == 1 => Ok("127.0.0.1".into()),
        None => Err(Error::Variable {
            name: "MASTER_ADDR",
            value: None,
            what: format!("{} is {}, and the machine of rank 0 is not known", size.name, size.value),
            way_out: way_out.into(),
        }),
    }
}

fn open_mpi(vars: &Vars) -> Result<World> {
    let size = vars.required("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")?;
    let rank = vars.required("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")?;
    let local = vars.required("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")?;
    let local_size = vars.required("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE")?;
    let run_id = vars.text("PMIX_NAMESPACE").or_else(|| vars.text("OMPI_MCA_ess_base_jobid")).unwrap_or_default();
    mpi(vars, [size, rank, local, local_size], run_id, "start with `mpirun -x MASTER_ADDR=HOST`, HOST being the machine of rank 0")
        .map(|world| World { launcher: Launcher::OpenMpi, ..world })
}

fn pmi(vars: &Vars) -> Result<World> {
    let size = vars.required("PMI_SIZE", "PMI_RANK")?;
    let rank = vars.required("PMI_RANK", "PMI_SIZE")?;
    let local = vars.first_number(&["MPI_LOCALRANKID", "LOCAL_RANK"])?;
    let local_size = vars.first_number(&["MPI_LOCALNRANKS", "LOCAL_WORLD_SIZE"])?;
    let (local, local_size) = match (local, local_size, size.value) {
        (Some(local), Some(local_size), _) => (local, local_size),
        (_, _, 1) => (Number { name: "PMI_RANK", value: 0 }, size),
        _ => {
            return Err(Error::Variable {
                name: "MPI_LOCALRANKID",
                value: None,
                what: "PMI_RANK is set, but not the process's number on its machine".into(),
                way_out: "set LOCAL_RANK and LOCAL_WORLD_SIZE, or start the processes with `lokr launch`".into(),
            });
        }
    };
    let run_id = vars.text("PMI_JOBID").or_else(|| vars.text("HYDI_CONTROL_FD")).unwrap_or_default();
    mpi(vars, [size, rank, local, local_size], run_id, "start with `mpiexec -genv MASTER_ADDR HOST`, HOST being the machine of rank 0")
        .map(|world| World { launcher: Launcher::Pmi, ..world })
}

fn mpi(vars: &Vars, [size, rank, local, local_size]: [Number; 4], run_id: String, way_out: &str) -> Result<World> {
    below(rank, size)?;
    at_most(local_size, size)?;
    below(local, local_size)?;
    let one_machine = (local_size.value == size.value).then(|| "127.0.0.1".to_owned());
    let (master_port, port_span) = vars.master_port(&run_id)?;
    Ok(World {
        rank: rank.value,
        local_rank: local.value,
        world_size: size.value,
        local_world_size: local_size.value,
        node_rank: rank.value / local_size.value,
        master_addr: master_addr(vars, size, one_machine, way_out)?,
        master_port,
        port_span,
        run_id,
        launcher: Launcher::Pmi,
    })
}
