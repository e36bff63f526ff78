//! How a launch ended.

use std::process::ExitStatus;

use super::PEER_FAILED;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// With this exit code.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
}

impl How {
    pub(super) fn of(status: ExitStatus) -> Self {
        #[cfg(unix)]
        if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
            return How::Signal(signal);
        }
        // Every status without a signal has a code.
        How::Code(status.code().unwrap_or(1))
    }

    /// Whether it is anything but exit code 0.
    pub fn is_failure(self) -> bool {
        self != How::Code(0)
    }
}

impl std::fmt::Display for How {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            How::Code(code) => write!(f, "ended with exit code {code}"),
            How::Signal(number) => match signal_hook::low_level::signal_name(*number) {
                Some(name @ "SIGBUS") => {
                    write!(
                        f,
                        "was killed by signal {number} ({name}): a mapped file, such as the base model, was cut short or cannot be read"
                    )
                }
                Some(name) => write!(f, "was killed by signal {number} ({name})"),
                None => write!(f, "was killed by signal {number}"),
            },
        }
    }
}

/// The end of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Its rank in the world.
    pub rank: usize,
    /// Its rank on this machine.
    pub local_rank: usize,
    /// How.
    pub how: How,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} (local rank {}) {}", self.rank, self.local_rank, self.how)
    }
}

/// The rank that brought the others down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// Which and how.
    pub end: End,
    /// What it wrote last: to stdout, oldest first, then to stderr.
    pub last_lines: Vec<String>,
}

impl Death {
    /// Whether this rank itself ended because of another one, which then is on another machine, or hangs.
    pub fn is_peer_failure(&self) -> bool {
        self.end.how == How::Code(PEER_FAILED)
    }

    /// The way out, where one is known.
    pub fn hint(&self) -> Option<String> {
        // Numbers of POSIX; their names are in the message.
        match self.end.how {
            How::Signal(9) => Some("SIGKILL often comes from the kernel when memory runs out: see `dmesg`".into()),
            How::Signal(4 | 6 | 8 | 11) => Some("this is a bug, in the program or in a driver that it uses".into()),
            How::Signal(7) => {
                Some("put the base model's file back as it was and run the same command again; its last checkpoint is good".into())
            }
            How::Code(PEER_FAILED) => Some("the cause lies with the rank that its last lines name".into()),
            _ => None,
        }
    }
}

impl std::fmt::Display for Death {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let End { rank, local_rank, .. } = self.end;
        if self.is_peer_failure() {
            write!(f, "rank {rank} (local rank {local_rank}) ended because of another rank")
        } else {
            write!(f, "{}", self.end)
        }
    }
}

/// What came of a launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Who brought the last attempt down; `None` if all ended with exit code 0.
    pub death: Option<Death>,
    /// How each rank of the last attempt ended, in the order in which they ended.
    pub ends: Vec<End>,
    /// How often all were started again.
    pub restarts: u32,
    /// The first signal that the launcher was sent.
    pub interrupted: Option<i32>,
}

impl Outcome {
    /// The launcher's own exit code: that of the rank that died, 128 + signal as shells have it, 0 if all went well.
    pub fn exit_code(&self) -> i32 {
        match self.death.as_ref().map(|death| death.end.how) {
            None => 0,
            Some(How::Code(code)) => code,
            Some(How::Signal(number)) => 128 + number,
        }
    }
}
