//! Signals that the launcher is sent. In a binary with one test, because they reach every launcher of a process.
#![cfg(unix)]

use std::time::{Duration, Instant};

use dist::launch::{How, LaunchOptions, launch};
use rustix::process::{Signal, getpid, kill_process};

#[test]
fn signals_are_passed_on_and_repeated_ones_kill() {
    let send = |signal| kill_process(getpid(), signal).unwrap();
    let start = Instant::now();

    // Ranks that end well on SIGTERM, as after a last checkpoint. A restart must not follow.
    let script = "trap 'echo saved; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
    let mut options = LaunchOptions { nproc_per_node: 2, max_restarts: 3, ..LaunchOptions::new("sh", ["-c", script]) };
    let (mut ready, mut saved) = (0, 0);
    let on_line = |_: usize, _, line: &str| {
        ready += usize::from(line == "ready");
        saved += usize::from(line == "saved");
        if line == "ready" && ready == 2 {
            send(Signal::TERM);
        }
    };
    let outcome = launch(&options, on_line, |_, _| panic!("started again after SIGTERM")).unwrap();
    assert_eq!((outcome.interrupted, outcome.exit_code(), saved), (Some(15), 0, 2));

    // SIGINT reaches them as SIGINT; with no handler they die of it, and the exit code says so.
    options.args[1] = "echo ready; exec sleep 60".into();
    let mut ready = 0;
    let on_line = |_: usize, _, _: &str| {
        ready += 1;
        if ready == 2 {
            send(Signal::INT);
        }
    };
    let outcome = launch(&options, on_line, |_, _| panic!("started again after SIGINT")).unwrap();
    assert_eq!((outcome.interrupted, outcome.exit_code()), (Some(2), 130));

    // Ranks that ignore everything: the third signal kills at once, long before the grace.
    options.args[1] = "trap '' INT TERM; echo ready; while :; do sleep 0.05; done".into();
    options.nproc_per_node = 1;
    options.grace = Duration::from_secs(60);
    let on_line = |_: usize, _, _: &str| {
        std::thread::spawn(move || {
            for _ in 0..3 {
                kill_process(getpid(), Signal::INT).unwrap();
                std::thread::sleep(Duration::from_millis(200));
            }
        });
    };
    let outcome = launch(&options, on_line, |_, _| panic!("started again after SIGINT")).unwrap();
    assert_eq!(outcome.ends[0].how, How::Signal(9));
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
}
