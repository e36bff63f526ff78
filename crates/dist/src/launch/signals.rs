//! Signals, in and out. Elsewhere than on Unix the console itself tells all its processes of Ctrl-C, and a process can
//! only be ended, not asked to end.

use std::process::Child;

use crate::Result;

/// What to tell the processes of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tell {
    /// Please end.
    Terminate,
    /// End now.
    Kill,
    /// Pass on what the launcher received.
    Forward(i32),
}

#[cfg(unix)]
mod system {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

    use super::{Child, Result, Tell};
    use crate::Error;

    /// The launcher's own signals, caught.
    pub(in super::super) struct Signals(signal_hook::iterator::Signals);

    impl Signals {
        pub(in super::super) fn catch() -> Result<Self> {
            signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]).map(Self).map_err(Error::system("catch signals"))
        }

        /// What came since the last call.
        pub(in super::super) fn pending(&mut self) -> Vec<i32> {
            self.0.pending().collect()
        }
    }

    /// Gives a rank a process group of its own, so that what it starts can be ended with it.
    pub(in super::super) fn isolate(command: &mut std::process::Command) {
        std::os::unix::process::CommandExt::process_group(command, 0);
    }

    /// Tells a rank and all that it started. That they are gone already is no error.
    pub(in super::super) fn tell(child: &mut Child, what: Tell) {
        use rustix::process::{Pid, Signal, kill_process_group};
        let signal = match what {
            Tell::Terminate => Some(Signal::TERM),
            Tell::Kill => Some(Signal::KILL),
            Tell::Forward(number) => Signal::from_named_raw(number),
        };
        if let Some(signal) = signal {
            let _ = kill_process_group(Pid::from_child(child), signal);
        }
    }
}

#[cfg(not(unix))]
mod system {
    use super::{Child, Result, Tell};

    /// Nothing is caught: the console tells the ranks itself.
    pub(in super::super) struct Signals;

    impl Signals {
        pub(in super::super) fn catch() -> Result<Self> {
            Ok(Self)
        }

        pub(in super::super) fn pending(&mut self) -> Vec<i32> {
            Vec::new()
        }
    }

    pub(in super::super) fn isolate(_: &mut std::process::Command) {}

    pub(in super::super) fn tell(child: &mut Child, what: Tell) {
        if !matches!(what, Tell::Forward(_)) {
            let _ = child.kill();
        }
    }
}

pub(super) use system::{Signals, isolate, tell};
