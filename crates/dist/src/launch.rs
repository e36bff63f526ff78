//! Starts one process per device, as torchrun does: sets the variables that [`crate::World::from_env`] reads, passes on
//! every line, and stops all when one dies, saying which was first, how it ended and what it said last.
//!
//! What a process writes and where the lines go is the caller's business; so is what a restart adds to the command.

mod end;
mod output;
mod signals;
mod watch;

use std::ffi::OsString;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

pub use end::{Death, End, How, Outcome};
pub use output::{Stream, print_line};

use crate::env::DEFAULT_PORT;
use crate::{Error, Result};

/// Exit code of a process that ended because of another rank ([`Error::is_peer_failure`]): the launcher then looks
/// further for the rank that began. It is `EX_TEMPFAIL` of `sysexits.h`: nothing is wrong with this process.
pub const PEER_FAILED: i32 = 75;
/// Carries the launcher's process number to the ranks.
const LAUNCHER: &str = "LOKR_LAUNCHER_PID";
/// Ports that the launcher chooses from: below the range from which systems take ports for outgoing connections.
const FREE_PORTS: std::ops::Range<u16> = 20_000..29_000;

/// What to start and how long to be patient.
#[derive(Clone, Debug)]
pub struct LaunchOptions {
    /// The program of every rank.
    pub program: OsString,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Variables that every rank gets on top of the launcher's own and of those that number it.
    pub vars: Vec<(OsString, OsString)>,
    /// Processes on this machine.
    pub nproc_per_node: usize,
    /// Machines; each runs its own launcher.
    pub nnodes: usize,
    /// This machine's number, from 0. Rank 0 is on machine 0.
    pub node_rank: usize,
    /// `host:port` or `host` of machine 0. Needed for several machines; a single one takes a free port without it.
    pub rdzv_endpoint: Option<String>,
    /// How often all are started again after one died.
    pub max_restarts: u32,
    /// Time between SIGTERM and SIGKILL for the ranks that are left when one dies.
    pub grace: Duration,
    /// With how many of its last lines on each of stdout and stderr a dead rank is quoted.
    pub last_lines: usize,
    /// The local rank whose stderr stays the launcher's own, so that its progress bar sees a terminal. Its stderr is
    /// then neither prefixed nor quoted.
    pub terminal_rank: Option<usize>,
}

impl LaunchOptions {
    /// One process on one machine, no restarts, 10 s of grace, 20 last lines.
    pub fn new(program: impl Into<OsString>, args: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        Self {
            program: program.into(),
            args: args.into_iter().map(Into::into).collect(),
            vars: Vec::new(),
            nproc_per_node: 1,
            nnodes: 1,
            node_rank: 0,
            rdzv_endpoint: None,
            max_restarts: 0,
            grace: Duration::from_secs(10),
            last_lines: 20,
            terminal_rank: None,
        }
    }

    fn check(&self) -> Result<()> {
        let bad = |what: String, way_out: &str| Err(Error::Option { what, way_out: way_out.into() });
        if self.nproc_per_node == 0 || self.nnodes == 0 {
            let what = format!("{} machines with {} processes each are no processes", self.nnodes, self.nproc_per_node);
            return bad(what, "give --nnodes and --nproc-per-node at least 1");
        }
        if self.node_rank >= self.nnodes {
            let what = format!("--node-rank {} does not exist with --nnodes {}", self.node_rank, self.nnodes);
            return bad(what, "machines count from 0");
        }
        if self.nnodes > 1 && self.rdzv_endpoint.is_none() {
            let what = format!("with --nnodes {} the machines need a place to meet", self.nnodes);
            return bad(what, "give --rdzv-endpoint HOST:PORT on all machines, HOST being machine 0");
        }
        Ok(())
    }

    /// Host and port at which the ranks meet. Without a port: torchrun's default where other machines must know it, else
    /// one that is free.
    fn endpoint(&self) -> Result<(String, u16)> {
        let Some(text) = &self.rdzv_endpoint else { return Ok(("127.0.0.1".into(), free_port()?)) };
        let unreadable = || Error::Option {
            what: format!("--rdzv-endpoint `{text}` is not HOST:PORT"),
            way_out: "write it as `node0:29500`, `10.0.0.1:29500` or `[fd00::1]:29500`".into(),
        };
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => match rest.split_once(']').ok_or_else(unreadable)? {
                (host, "") => (host, None),
                (host, port) => (host, Some(port.strip_prefix(':').ok_or_else(unreadable)?)),
            },
            None => match text.split_once(':') {
                Some((_, port)) if port.contains(':') => (text.as_str(), None),
                Some((host, port)) => (host, Some(port)),
                None => (text.as_str(), None),
            },
        };
        if host.is_empty() {
            return Err(unreadable());
        }
        let port = match port {
            Some(port) => port.parse().map_err(|_| unreadable())?,
            None if self.nnodes > 1 => DEFAULT_PORT,
            None => 0,
        };
        let port = match port {
            0 if self.nnodes > 1 => return Err(unreadable()),
            0 => free_port()?,
            port => port,
        };
        Ok((host.into(), port))
    }

    fn command(&self, local_rank: usize, endpoint: &(String, u16), attempt: u32, extra: &[OsString]) -> Command {
        let rank = self.node_rank * self.nproc_per_node + local_rank;
        let numbers = [
            ("RANK", rank),
            ("LOCAL_RANK", local_rank),
            ("WORLD_SIZE", self.nnodes * self.nproc_per_node),
            ("LOCAL_WORLD_SIZE", self.nproc_per_node),
            ("GROUP_RANK", self.node_rank),
            ("GROUP_WORLD_SIZE", self.nnodes),
            ("MASTER_PORT", endpoint.1.into()),
            ("TORCHELASTIC_RESTART_COUNT", attempt as usize),
            ("TORCHELASTIC_MAX_RESTARTS", self.max_restarts as usize),
            (LAUNCHER, std::process::id() as usize),
        ];
        let mut command = Command::new(&self.program);
        command.args(&self.args).args(extra);
        command.envs(numbers.map(|(name, value)| (name, value.to_string()))).env("MASTER_ADDR", &endpoint.0);
        // Left over where this launcher itself runs under torchrun: nobody keeps a store for our ranks.
        command.env_remove("TORCHELASTIC_USE_AGENT_STORE").env_remove("TORCHELASTIC_RUN_ID");
        if self.nproc_per_node > 1 && std::env::var_os("RAYON_NUM_THREADS").is_none() {
            // Ranks that each take all cores slow each other down.
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            command.env("RAYON_NUM_THREADS", (cores / self.nproc_per_node).max(1).to_string());
        }
        command.envs(self.vars.iter().map(|(name, value)| (name, value)));
        let stderr = if self.terminal_rank == Some(local_rank) { Stdio::inherit() } else { Stdio::piped() };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        command
    }
}

/// Starts all processes of this machine and returns when all have ended.
///
/// `on_line` gets every line with its rank and stream. If a rank dies, the others get SIGTERM and, after
/// `options.grace`, SIGKILL, each with whatever it started itself; then, up to `options.max_restarts` times,
/// `on_restart` is told who died and the number of the restart, returns what to append to the arguments
/// (`--resume latest`), and all start again. SIGINT, SIGTERM and SIGHUP are passed on to the ranks; the second one
/// starts the grace, the third one kills. From the first call on, these signals no longer end the launcher's process by
/// themselves.
///
/// # Errors
/// [`Error::Option`], [`Error::Start`] (ranks that were started are killed), [`Error::System`]. A rank that dies is not an error of
/// this function: see [`Outcome::death`].
pub fn launch(
    options: &LaunchOptions,
    mut on_line: impl FnMut(usize, Stream, &str),
    mut on_restart: impl FnMut(&Death, u32) -> Vec<OsString>,
) -> Result<Outcome> {
    options.check()?;
    let mut signals = signals::Signals::catch()?;
    let mut extra = Vec::new();
    let mut attempt = 0;
    loop {
        let endpoint = options.endpoint()?;
        let mut outcome = watch::Ranks::start(options, &endpoint, attempt, &extra)?.watch(&mut signals, &mut on_line);
        outcome.restarts = attempt;
        match &outcome.death {
            Some(death) if attempt < options.max_restarts && outcome.interrupted.is_none() => {
                attempt += 1;
                extra = on_restart(death, attempt);
            }
            _ => return Ok(outcome),
        }
    }
}

/// A port of this machine on which nothing listens now.
///
/// # Errors
/// [`Error::Option`] if none is found.
pub fn free_port() -> Result<u16> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    // Any start will do, as long as launchers of one moment seldom share it.
    let start = now.subsec_micros().wrapping_mul(2_654_435_761).wrapping_add(std::process::id().wrapping_mul(40_503));
    let span = u32::from(FREE_PORTS.end - FREE_PORTS.start);
    let candidates = (0..span).map(|step| FREE_PORTS.start + (start.wrapping_add(step) % span) as u16);
    let free = |port: &u16| TcpListener::bind(("0.0.0.0", *port)).is_ok() && TcpListener::bind(("127.0.0.1", *port)).is_ok();
    candidates.take(1000).find(free).ok_or_else(|| Error::Option {
        what: "no free port was found".into(),
        way_out: "choose one with --rdzv-endpoint 127.0.0.1:PORT".into(),
    })
}

/// For a started process to call first: has the system send it SIGTERM when its launcher dies, even by SIGKILL, so that
/// no rank is left behind with a device and a port. Does nothing without a launcher, where another process stands
/// between, and on systems other than Linux.
///
/// # Errors
/// [`Error::Option`] if the launcher is gone already; [`Error::System`].
pub fn end_with_launcher() -> Result<()> {
    #[cfg(target_os = "linux")]
    if let Some(launcher) = std::env::var(LAUNCHER).ok().and_then(|text| text.parse::<i32>().ok()) {
        use rustix::process::{Signal, getppid, set_parent_process_death_signal};
        let parent = || getppid().map(|pid| pid.as_raw_nonzero().get());
        let asked = parent() == Some(launcher);
        if asked {
            let refused = |errno: rustix::io::Errno| Error::System { doing: "ask to be ended with the launcher", source: errno.into() };
            set_parent_process_death_signal(Some(Signal::TERM)).map_err(refused)?;
        }
        // Orphans are given to process 1; the second look is for a launcher that died in between.
        let orphaned = if asked { parent() != Some(launcher) } else { parent() == Some(1) };
        if orphaned {
            let what = format!("the launcher (process {launcher}) is gone");
            return Err(Error::Option { what, way_out: "start the run again".into() });
        }
    }
    Ok(())
}
