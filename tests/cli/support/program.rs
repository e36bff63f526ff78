//! Running the program, to its end or to a signal.

use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Longer than any step of any test takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// How a command of the program ended.
pub struct Ran {
    /// Exit status; `None` after a signal.
    pub status: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ran {
    fn new(status: ExitStatus, out: &[u8], err: &[u8]) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("the program writes UTF-8");
        let ran = Self { status: status.code(), out: text(out.to_vec()), err: text(err.to_vec()) };
        assert!(!ran.err.contains("panicked"), "{}", ran.all());
        assert!(!ran.err.contains('\u{1b}') && !ran.out.contains('\u{1b}'), "escape codes without a terminal:\n{}", ran.all());
        ran
    }

    /// Both outputs and the status, for messages of tests.
    pub fn all(&self) -> String {
        format!("status {:?}\n--- out\n{}--- err\n{}", self.status, self.out, self.err)
    }

    /// The command did what was asked, and found nothing to complain of.
    #[track_caller]
    pub fn good(self) -> Self {
        assert_eq!(self.status, Some(0), "{}", self.all());
        assert_eq!(self.err, "", "{}", self.all());
        self
    }

    /// The command ended with this status.
    #[track_caller]
    pub fn ended_with(self, status: i32) -> Self {
        assert_eq!(self.status, Some(status), "{}", self.all());
        self
    }

    /// The command refused: status 1, and what it said on standard error.
    #[track_caller]
    pub fn refusal(self) -> String {
        assert_eq!(self.status, Some(1), "{}", self.all());
        assert!(self.err.starts_with("error: "), "{}", self.all());
        self.err
    }

    /// Whether the command ended with status 1 and an error about `what`.
    pub fn refusal_with(&self, what: &str) -> bool {
        self.status == Some(1) && self.err.contains("error: ") && self.err.contains(what)
    }

    /// The lines of standard output that contain `part`.
    pub fn lines(&self, part: &str) -> Vec<&str> {
        self.out.lines().filter(|l| l.contains(part)).collect()
    }

    /// The lines of both outputs that warn.
    pub fn warnings(&self) -> Vec<String> {
        let all = self.out.lines().chain(self.err.lines());
        all.filter(|l| l.starts_with("warning:") || l.contains("WARN")).map(str::to_string).collect()
    }
}

/// The program: the one built with the tests, or, to test another, the one that `LOKR_BINARY` names.
fn program() -> PathBuf {
    std::env::var_os("LOKR_BINARY").map_or_else(|| env!("CARGO_BIN_EXE_lokr-under-test").into(), PathBuf::from)
}

fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.arg0("lokr").args(args).current_dir(folder).stdin(Stdio::null());
    command.env_remove("RUST_LOG").env_remove("RUST_BACKTRACE");
    command
}

/// The command that runs `lokr` in a folder, for starts that are not the plain one.
pub fn lokr_command(folder: &Path, args: &[&str]) -> Command {
    command(folder, args)
}

/// Runs a command to its end.
pub fn ran(command: &mut Command) -> Ran {
    let ran = command.output().expect("the program starts");
    Ran::new(ran.status, &ran.stdout, &ran.stderr)
}

/// The program's path.
pub fn program_path() -> PathBuf {
    program()
}

/// Runs `lokr` in a folder to its end.
pub fn lokr(folder: &Path, args: &[&str]) -> Ran {
    let ran = command(folder, args).output().expect("the program starts");
    Ran::new(ran.status, &ran.stdout, &ran.stderr)
}

/// Runs `lokr` in a folder with `shim.c` between it and the system's library, told by these variables what to do. `None`, with a line
/// that says so, where it cannot be compiled or loaded.
pub fn lokr_with_shim(folder: &Path, variables: &[(&str, &str)], args: &[&str]) -> Option<Ran> {
    let built = super::shim()?;
    let ran = command(folder, args).env("LD_PRELOAD", built).envs(variables.iter().copied()).output().expect("the program starts");
    Some(Ran::new(ran.status, &ran.stdout, &ran.stderr))
}

/// Runs `lokr` in a folder, in a mount namespace in which the commands of `before` were run first and those of `after` are run at
/// the end. `None`, with a line that says so, where the system does not allow that.
pub fn lokr_in_namespace(folder: &Path, before: &str, args: &[&str], after: &str) -> Option<Ran> {
    let unshare = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--mount", "sh", "-c", script, "sh"]).arg(program()).args(args);
        command.current_dir(folder).env_remove("RUST_LOG").output()
    };
    if !unshare(before).is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: this system lets no test mount anything, so the disk cannot be made small or read-only");
        return None;
    }
    let ran = unshare(&format!("{before}; \"$@\"; status=$?; {after}; exit $status")).expect("it has just worked");
    Some(Ran::new(ran.status, &ran.stdout, &ran.stderr))
}

/// A running `lokr`; killed when dropped.
pub struct Running {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

/// Starts `lokr` in a folder.
pub fn start(folder: &Path, args: &[&str]) -> Running {
    let (out, err) = (folder.join("out.log"), folder.join("err.log"));
    let file = |path: &Path| File::create(path).expect("a log file");
    let child = command(folder, args).stdout(file(&out)).stderr(file(&err)).spawn().expect("the program starts");
    Running { child, out, err }
}

impl Running {
    /// The process's number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `happened`; false if the process ended without it.
    pub fn wait_until(&mut self, happened: impl Fn() -> bool) -> bool {
        let started = Instant::now();
        while !happened() {
            if self.child.try_wait().expect("the process can be asked").is_some() {
                return happened();
            }
            assert!(started.elapsed() < PATIENCE, "waited for nothing");
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Sends a signal, by its name without SIG.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()).status().expect("kill starts");
        assert!(sent.success(), "the process took no {name}");
    }

    /// Kills the process as a power cut would.
    pub fn kill(mut self) {
        self.child.kill().expect("the process can be killed");
        let status = self.child.wait().expect("the process ends");
        assert!(status.signal() == Some(9) || status.success(), "{status:?}");
    }

    /// As [`Running::wait_until`], for moments that pass within a millisecond; gives up where the process ended.
    pub fn spin_until(&mut self, happened: impl Fn() -> bool) {
        let started = Instant::now();
        while !happened() && self.child.try_wait().expect("the process can be asked").is_none() {
            assert!(started.elapsed() < PATIENCE, "waited for nothing");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Kills the process as a power cut would; if it had ended before, how.
    pub fn killed(mut self) -> Option<Ran> {
        self.child.kill().expect("the process can be killed");
        let status = self.child.wait().expect("the process ends");
        let read = |path| std::fs::read(path).expect("a log file");
        (status.signal() != Some(9)).then(|| Ran::new(status, &read(&self.out), &read(&self.err)))
    }

    /// Waits for the end.
    pub fn end(mut self) -> Ran {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the process can be asked") {
                let read = |path| std::fs::read(path).expect("a log file");
                return Ran::new(status, &read(&self.out), &read(&self.err));
            }
            assert!(started.elapsed() < PATIENCE, "the process does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Of a process that has ended, nothing is left to kill or to wait for.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}
