//! One attempt: the running ranks, from their start to the end of the last one.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::Read;
use std::process::Child;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::output::{Stream, lines};
use super::signals::{Signals, Tell, isolate, tell};
use super::{Death, End, How, LaunchOptions, Outcome, PEER_FAILED};
use crate::{Error, Result};

/// How often the launcher looks whether a rank ended or a signal came.
const POLL: Duration = Duration::from_millis(10);
/// A rank that ends because of another one may be faster at it than that other one; this long the other may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// For lines that are still in the pipes when all have ended, where a process that left its group holds a pipe open.
const DRAIN: Duration = Duration::from_millis(500);

/// The ranks of this machine.
pub(super) struct Ranks<'a> {
    options: &'a LaunchOptions,
    ranks: Vec<Rank>,
    output: Receiver<Output>,
    /// Ends in the order in which they were seen, and whether the launcher had begun to stop the others.
    ends: Vec<(End, bool)>,
}

struct Rank {
    rank: usize,
    child: Child,
    running: bool,
    /// Of stdout and of stderr. The two pipes are read on their own, so that lines of one cannot be put between lines
    /// of the other; and a flood on one should not wash the error from the other.
    last_lines: [VecDeque<String>; 2],
}

/// From a reader thread: local rank, stream, line.
type Output = (usize, Stream, String);

impl<'a> Ranks<'a> {
    /// Starts all processes of this machine.
    pub(super) fn start(options: &'a LaunchOptions, endpoint: &(String, u16), attempt: u32, extra: &[OsString]) -> Result<Self> {
        let (sender, output) = channel();
        let mut all = Self { options, ranks: Vec::new(), output, ends: Vec::new() };
        for local_rank in 0..options.nproc_per_node {
            let rank = options.node_rank * options.nproc_per_node + local_rank;
            let mut command = options.command(local_rank, endpoint, attempt, extra);
            isolate(&mut command);
            let started =
                command.spawn().map_err(|source| Error::Start { program: options.program.to_string_lossy().into_owned(), rank, source });
            let started = started.and_then(|mut child| {
                let pipes = (child.stdout.take(), child.stderr.take());
                all.ranks.push(Rank { rank, child, running: true, last_lines: Default::default() });
                pipes.0.map_or(Ok(()), |pipe| read(pipe, local_rank, Stream::Stdout, &sender))?;
                pipes.1.map_or(Ok(()), |pipe| read(pipe, local_rank, Stream::Stderr, &sender))
            });
            if let Err(error) = started {
                all.tell(Tell::Kill);
                all.ranks.iter_mut().for_each(|rank| drop(rank.child.wait()));
                return Err(error);
            }
        }
        Ok(all)
    }

    /// Returns when all have ended.
    pub(super) fn watch(mut self, signals: &mut Signals, on_line: &mut dyn FnMut(usize, Stream, &str)) -> Outcome {
        let mut received = Vec::new();
        let mut failed_at = None;
        let mut kill_at: Option<Instant> = None;
        while self.ranks.iter().any(|rank| rank.running) {
            match self.output.recv_timeout(POLL) {
                Ok(first) => {
                    self.pass_on(first, on_line);
                    // Not all there is: a rank that never stops talking must not keep us from looking at the others.
                    for line in self.output.try_iter().take(1000).collect::<Vec<_>>() {
                        self.pass_on(line, on_line);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                // All have closed their output and go on.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(POLL),
            }
            self.collect(kill_at.is_some());
            for signal in signals.pending() {
                received.push(signal);
                match received.len() {
                    1 => self.tell(Tell::Forward(signal)),
                    2 => {
                        self.tell(Tell::Forward(signal));
                        kill_at.get_or_insert_with(|| Instant::now() + self.options.grace);
                    }
                    _ => kill_at = Some(Instant::now()),
                }
            }
            if self.ends.iter().any(|(end, _)| end.how.is_failure()) && kill_at.is_none() {
                let since = *failed_at.get_or_insert_with(Instant::now);
                if self.death().is_some_and(|end| end.how != How::Code(PEER_FAILED)) || since.elapsed() >= PATIENCE {
                    // Ranks that were sent a signal know already that they are to end, and may be saving.
                    if received.is_empty() {
                        self.tell(Tell::Terminate);
                    }
                    kill_at = Some(Instant::now() + self.options.grace);
                }
            }
            if kill_at.is_some_and(|at| at <= Instant::now()) {
                self.tell(Tell::Kill);
            }
        }
        let death = self.death();
        if death.is_some() {
            // What the ranks started and left behind; after a good end it may be meant to stay.
            self.ranks.iter_mut().for_each(|rank| tell(&mut rank.child, Tell::Kill));
        }
        let until = Instant::now() + DRAIN;
        // Ends when all readers have: the last sender is gone then.
        while let Ok(line) = self.output.recv_timeout(until.saturating_duration_since(Instant::now())) {
            self.pass_on(line, on_line);
        }
        let quoted = |end: End| Death { end, last_lines: self.ranks[end.local_rank].last_lines.iter().flatten().cloned().collect() };
        Outcome {
            death: death.map(quoted),
            ends: self.ends.iter().map(|&(end, _)| end).collect(),
            restarts: 0,
            interrupted: received.first().copied(),
        }
    }

    fn pass_on(&mut self, (local_rank, stream, line): Output, on_line: &mut dyn FnMut(usize, Stream, &str)) {
        let rank = &mut self.ranks[local_rank];
        on_line(rank.rank, stream, &line);
        let last_lines = &mut rank.last_lines[usize::from(stream == Stream::Stderr)];
        last_lines.push_back(line);
        if last_lines.len() > self.options.last_lines {
            last_lines.pop_front();
        }
    }

    /// Notes the ranks that have ended. Among those that a single look finds, one that was killed comes first: the
    /// others can only have ended because of it.
    fn collect(&mut self, stopping: bool) {
        let mut ended = Vec::new();
        for (local_rank, rank) in self.ranks.iter_mut().enumerate().filter(|(_, rank)| rank.running) {
            let how = match rank.child.try_wait() {
                Ok(None) => continue,
                Ok(Some(status)) => How::of(status),
                // Somebody else has waited for our child; how it ended is not known.
                Err(_) => How::Code(1),
            };
            rank.running = false;
            ended.push(End { rank: rank.rank, local_rank, how });
        }
        ended.sort_by_key(|end| (!matches!(end.how, How::Signal(_)), end.rank));
        self.ends.extend(ended.into_iter().map(|end| (end, stopping)));
    }

    /// The first failure that has a cause of its own, else the first that blames another rank. A rank that failed while
    /// it was being stopped is neither, if there is any other.
    fn death(&self) -> Option<End> {
        let failed = || self.ends.iter().filter(|(end, _)| end.how.is_failure());
        let own = failed().find(|(end, stopping)| !stopping && end.how != How::Code(PEER_FAILED));
        own.or_else(|| failed().find(|(_, stopping)| !stopping)).or_else(|| failed().next()).map(|&(end, _)| end)
    }

    fn tell(&mut self, what: Tell) {
        self.ranks.iter_mut().filter(|rank| rank.running).for_each(|rank| tell(&mut rank.child, what));
    }
}

fn read(pipe: impl Read + Send + 'static, local_rank: usize, stream: Stream, to: &Sender<Output>) -> Result<()> {
    let to = to.clone();
    let work = move || lines(pipe, |line| drop(to.send((local_rank, stream, line))));
    std::thread::Builder::new()
        .name("launch-read".into())
        .spawn(work)
        .map(drop)
        .map_err(Error::system("start a thread for a rank's output"))
}
