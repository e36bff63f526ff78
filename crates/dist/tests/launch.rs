//! The launcher, with small shell commands as ranks.
#![cfg(unix)]

use std::ffi::OsString;
use std::time::{Duration, Instant};

use dist::launch::{Death, How, LaunchOptions, Outcome, PEER_FAILED, Stream, launch};
use dist::{Error, Launcher, World};

const SOON: Duration = Duration::from_secs(8);

fn sh(nproc: usize, script: &str) -> LaunchOptions {
    LaunchOptions { nproc_per_node: nproc, ..LaunchOptions::new("sh", ["-c", script, "sh"]) }
}

/// Outcome and all lines, as `[rank r] line` sorted by rank.
fn run(options: &LaunchOptions) -> (Outcome, Vec<String>) {
    let (outcome, lines, _) = run_with(options, |_, _| Vec::new());
    (outcome, lines)
}

fn run_with(options: &LaunchOptions, mut restart: impl FnMut(&Death, u32) -> Vec<OsString>) -> (Outcome, Vec<String>, Vec<Stream>) {
    let mut lines = Vec::new();
    let outcome =
        launch(options, |rank, stream, line| lines.push((rank, stream, format!("[rank {rank}] {line}"))), |death, n| restart(death, n));
    lines.sort_by_key(|line| line.0);
    let streams = lines.iter().map(|line| line.1).collect();
    (outcome.unwrap(), lines.into_iter().map(|line| line.2).collect(), streams)
}

#[test]
fn every_rank_gets_its_variables_and_every_line_its_rank() {
    let script = "echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $EXTRA $1; echo to stderr >&2";
    let mut options = sh(3, script);
    options.args.push("argument".into());
    options.vars.push(("EXTRA".into(), "extra".into()));
    let (outcome, lines, streams) = run_with(&options, |_, _| Vec::new());
    assert_eq!((outcome.death.as_ref(), outcome.exit_code(), outcome.restarts, outcome.interrupted), (None, 0, 0, None));
    assert_eq!(outcome.ends.len(), 3);
    for rank in 0..3 {
        let line = format!("[rank {rank}] {rank} {rank} 3 3 127.0.0.1 extra argument");
        assert!(lines.contains(&line), "{lines:?}");
        let place = lines.iter().position(|line| *line == format!("[rank {rank}] to stderr")).expect("stderr was lost");
        assert_eq!(streams[place], Stream::Stderr);
    }
}

#[test]
fn ranks_read_back_who_they_are() {
    let mut options = sh(2, "env");
    (options.nnodes, options.node_rank, options.rdzv_endpoint) = (2, 1, Some("node0:1234".into()));
    let (_, lines) = run(&options);
    for rank in [2, 3] {
        let prefix = format!("[rank {rank}] ");
        let vars: Vec<_> = lines.iter().filter_map(|line| line.strip_prefix(&prefix)?.split_once('=')).collect();
        let world = World::from_vars(&|name| vars.iter().find(|(entry, _)| *entry == name).map(|(_, value)| value.to_string())).unwrap();
        let expected = World {
            rank,
            local_rank: rank - 2,
            world_size: 4,
            local_world_size: 2,
            node_rank: 1,
            master_addr: "node0".into(),
            master_port: 1234,
            port_span: 1,
            run_id: String::new(),
            launcher: Launcher::Torchrun,
        };
        assert_eq!(world, expected);
    }
}

#[test]
fn endpoints() {
    let port_of = |endpoint: Option<&str>| {
        let mut options = sh(1, "echo $MASTER_ADDR $MASTER_PORT");
        options.rdzv_endpoint = endpoint.map(Into::into);
        run(&options).1.concat()
    };
    assert_eq!(port_of(Some("10.0.0.1:4000")), "[rank 0] 10.0.0.1 4000");
    assert_eq!(port_of(Some("[fd00::1]:4000")), "[rank 0] fd00::1 4000");
    let (first, second) = (port_of(None), port_of(Some("localhost")));
    assert!(first.starts_with("[rank 0] 127.0.0.1 2") && second.starts_with("[rank 0] localhost 2"), "{first} {second}");
    let mut several = sh(1, "echo $MASTER_ADDR $MASTER_PORT");
    (several.nnodes, several.rdzv_endpoint) = (2, Some("node0".into()));
    assert_eq!(run(&several).1.concat(), "[rank 0] node0 29500");
}

#[test]
fn options_that_cannot_work() {
    let refuse = |change: &dyn Fn(&mut LaunchOptions), part: &str| {
        let mut options = sh(2, "true");
        change(&mut options);
        let error = launch(&options, |_, _, _| {}, |_, _| Vec::new()).unwrap_err();
        assert!(error.to_string().contains(part) && error.hint().is_some(), "{error}");
    };
    refuse(&|options| options.nproc_per_node = 0, "no processes");
    refuse(&|options| options.node_rank = 1, "--node-rank 1 does not exist with --nnodes 1");
    refuse(&|options| options.nnodes = 2, "need a place to meet");
    for endpoint in ["node0:http", ":29500", "[fd00::1", "[fd00::1]29500", "node0:99999"] {
        refuse(&|options| options.rdzv_endpoint = Some(endpoint.into()), endpoint);
    }
    refuse(&|options| (options.nnodes, options.rdzv_endpoint) = (2, Some("node0:0".into())), "node0:0");
}

#[test]
fn a_program_that_is_not_there() {
    let options = LaunchOptions::new("no-such-program-anywhere", ["train"]);
    let error = launch(&options, |_, _, _| {}, |_, _| Vec::new()).unwrap_err();
    assert!(matches!(&error, Error::Start { rank: 0, .. }), "{error}");
    assert_eq!(error.to_string(), "cannot start `no-such-program-anywhere` as rank 0");
    assert!(error.hint().unwrap().contains("PATH"));
}

#[test]
fn when_one_dies_the_others_are_stopped_and_it_is_quoted() {
    let start = Instant::now();
    let script = "if [ $RANK = 1 ]; then for i in 1 2 3 4; do echo line $i; done; echo 'disk full' >&2; exit 3; fi; exec sleep 60";
    let (outcome, _) = run(&LaunchOptions { last_lines: 3, ..sh(3, script) });
    let death = outcome.death.as_ref().unwrap();
    assert_eq!(death.to_string(), "rank 1 (local rank 1) ended with exit code 3");
    assert_eq!(death.last_lines, ["line 2", "line 3", "line 4", "disk full"]);
    assert_eq!(outcome.exit_code(), 3);
    assert_eq!(outcome.ends[0].rank, 1);
    assert!(outcome.ends[1..].iter().all(|end| end.how == How::Signal(15)), "{:?}", outcome.ends);
    assert!(start.elapsed() < SOON);
}

#[test]
fn a_rank_that_ignores_sigterm_is_killed_after_the_grace() {
    let start = Instant::now();
    let script = "if [ $RANK = 0 ]; then sleep 0.2; exit 1; fi; trap '' TERM; sleep 60";
    let (outcome, _) = run(&LaunchOptions { grace: Duration::from_millis(400), ..sh(2, script) });
    assert_eq!(outcome.ends[1].how, How::Signal(9));
    assert!(start.elapsed() > Duration::from_millis(600) && start.elapsed() < SOON, "{:?}", start.elapsed());
}

#[test]
fn what_a_rank_started_ends_with_it() {
    let script = "if [ $RANK = 1 ]; then sleep 0.3; exit 1; fi; sleep 60 & echo $!; sleep 60 & wait";
    let start = Instant::now();
    let (outcome, lines) = run(&LaunchOptions { grace: Duration::from_millis(500), ..sh(2, script) });
    assert_eq!(outcome.death.unwrap().end.rank, 1);
    let pid = lines[0].strip_prefix("[rank 0] ").unwrap().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    // An orphan that has ended may stay listed until process 1 collects it.
    let running = || rustix::process::test_kill_process(pid).is_ok() && !zombie(pid.as_raw_nonzero().get());
    while running() {
        assert!(start.elapsed() < SOON, "a process that a rank started outlived it");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[allow(clippy::disallowed_methods)] // /proc is no file of ours
fn zombie(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

#[test]
fn a_killed_rank_is_named_with_its_signal() {
    let (outcome, _) = run(&sh(2, "if [ $RANK = 0 ]; then kill -9 $$; fi; exec sleep 60"));
    let death = outcome.death.as_ref().unwrap();
    assert_eq!(death.to_string(), "rank 0 (local rank 0) was killed by signal 9 (SIGKILL)");
    assert!(death.hint().unwrap().contains("memory"));
    assert_eq!(outcome.exit_code(), 137);
}

#[test]
fn a_rank_that_only_suffers_is_not_blamed() {
    let script = format!("if [ $RANK = 2 ]; then sleep 0.5; exit 7; fi; exit {PEER_FAILED}");
    let (outcome, _) = run(&sh(3, &script));
    let death = outcome.death.unwrap();
    assert_eq!((death.end.rank, death.end.how), (2, How::Code(7)));
    let (outcome, _) = run(&sh(2, &format!("echo rank 5 was lost; exit {PEER_FAILED}")));
    let death = outcome.death.unwrap();
    assert!(death.is_peer_failure() && death.to_string().ends_with("ended because of another rank"), "{death}");
    assert_eq!(death.last_lines, ["rank 5 was lost"]);
}

#[test]
fn restarts_with_more_arguments_until_it_works() {
    let script = "echo attempt $TORCHELASTIC_RESTART_COUNT: $*; [ $TORCHELASTIC_RESTART_COUNT = 2 ]";
    let mut options = LaunchOptions { max_restarts: 5, ..sh(2, script) };
    options.args.push("train".into());
    let mut seen = Vec::new();
    let (outcome, lines, _) = run_with(&options, |death, restart| {
        seen.push((death.end.how, restart));
        vec!["--resume".into(), format!("number-{restart}").into()]
    });
    assert_eq!((outcome.death, outcome.restarts), (None, 2));
    assert_eq!(seen, [(How::Code(1), 1), (How::Code(1), 2)]);
    // A rank that is stopped with the first to fail may not get to speak.
    for line in ["attempt 0: train", "attempt 1: train --resume number-1", "attempt 2: train --resume number-2"] {
        assert!(lines.iter().any(|seen| seen.ends_with(&format!("] {line}"))), "{lines:?}");
    }
}

#[test]
fn restarts_end_at_their_number() {
    let (outcome, lines) = run(&LaunchOptions { max_restarts: 2, ..sh(1, "echo again; exit 4") });
    assert_eq!((outcome.restarts, outcome.exit_code(), lines.len()), (2, 4, 3));
}

#[test]
fn silent_ranks_and_endless_talkers() {
    let start = Instant::now();
    // Closed output must not turn the launcher into a busy loop or make it miss the end; endless output must not
    // keep it from seeing the death of another rank.
    let (outcome, _) = run(&sh(1, "exec >&- 2>&-; sleep 0.3; exit 5"));
    assert_eq!(outcome.exit_code(), 5);
    let script = "if [ $RANK = 1 ]; then sleep 0.3; exit 6; fi; exec yes";
    let options = sh(2, script);
    let outcome = launch(&options, |_, _, _| {}, |_, _| Vec::new()).unwrap();
    assert_eq!(outcome.exit_code(), 6);
    assert!(start.elapsed() < SOON);
}
