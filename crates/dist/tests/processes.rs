//! Real processes: killed and stopped at each phase, and started by the launcher. Each test starts this test binary
//! again as the ranks, in the role that a variable names.
#![cfg(target_os = "linux")]

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use dist::launch::{Death, How, LaunchOptions, PEER_FAILED, end_with_launcher, free_port, launch};
use dist::{Error, Options, ProcessGroup, World};
use rustix::process::{Pid, Signal, kill_process};

const ROLE: &str = "LOKR_TEST_ROLE";
/// What makes the test harness run this binary as a rank.
const AS_RANK: [&str; 4] = ["rank_process", "--exact", "--ignored", "--nocapture"];
/// "Within seconds", on a machine that is busy with other tests.
const SOON: Duration = Duration::from_secs(8);

/// What a rank does. Run by the other tests, not by itself.
#[test]
#[ignore = "the other tests run it in processes of their own"]
fn rank_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    if role == "launcher" {
        let mut options = LaunchOptions::new(std::env::current_exe().unwrap(), AS_RANK);
        options.vars.push((ROLE.into(), "follower".into()));
        options.nproc_per_node = 2;
        launch(&options, |_, _, _| {}, |_, _| Vec::new()).unwrap();
        return;
    }
    if role == "follower" {
        end_with_launcher().unwrap();
        let _alive = std::net::TcpStream::connect(std::env::var("LOKR_TEST_ADDRESS").unwrap()).unwrap();
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    match rank(&role) {
        Ok(()) => {}
        Err(error) => {
            println!("error: {error}");
            std::process::exit(if error.is_peer_failure() { PEER_FAILED } else { 1 });
        }
    }
}

fn rank(role: &str) -> Result<(), Error> {
    let world = World::from_env()?;
    let seconds = Duration::from_secs;
    let mut options = Options { rendezvous: seconds(20), deadline: seconds(20), ..Options::default() };
    if role == "quick" {
        (options.heartbeat, options.silence) = (Duration::from_millis(100), Duration::from_millis(700));
    }
    println!("joining");
    let group = ProcessGroup::join(&world, &options)?;
    println!("joined");
    for step in 0.. {
        // Large enough for direct connections, whose loss must not be blamed on the wrong rank.
        let mut values = vec![1.0; 200_000];
        group.all_reduce_sum("grads", &mut values)?;
        assert!(values.iter().all(|&value| value == world.world_size as f32));
        if step == 3 {
            println!("stepping");
            if role == "suicide" && world.rank == 1 && std::env::var("TORCHELASTIC_RESTART_COUNT").unwrap() == "0" {
                println!("last words");
                kill_process(Pid::from_raw(std::process::id() as i32).unwrap(), Signal::KILL).unwrap();
            }
        }
        if role == "suicide" && step == 20 {
            break;
        }
    }
    Ok(())
}

struct Rank {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Rank {
    fn start(world: &World, role: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(AS_RANK)
            .env(ROLE, role)
            .envs([("RANK", world.rank), ("LOCAL_RANK", world.rank), ("WORLD_SIZE", world.world_size)].map(|(n, v)| (n, v.to_string())))
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", world.master_port.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    fn wait_for(&mut self, line: &str) {
        let mut seen = String::new();
        // The harness prints "test rank_process ... " without a line end before the first line.
        while !seen.trim_end().ends_with(line) {
            seen.clear();
            assert_ne!(self.output.read_line(&mut seen).unwrap(), 0, "ended before `{line}`");
        }
    }

    fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Exit code and the error line.
    fn end(mut self) -> (i32, String) {
        let mut text = String::new();
        self.output.read_to_string(&mut text).unwrap();
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        (code, text.lines().find(|line| line.starts_with("error: ")).unwrap_or(&text).to_owned())
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // Also those that were stopped, when a test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts `n` ranks, sends `signal` to `victim` once it wrote `line`, and checks what the others say and how soon.
fn lose(n: usize, victim: usize, line: &str, signal: Signal, role: &str, said: &str) {
    let port = free_port().unwrap();
    let world = |rank| World::on_this_machine(rank, n, port, dist::Launcher::None);
    // In the rendezvous phase the last rank never comes, so that the group cannot form.
    let started = if line == "joining" { n - 1 } else { n };
    let mut ranks: Vec<Rank> = (0..started).map(|rank| Rank::start(&world(rank), role)).collect();
    ranks.iter_mut().for_each(|rank| rank.wait_for(line));
    if line == "joining" {
        std::thread::sleep(Duration::from_millis(300));
    }
    let start = Instant::now();
    ranks[victim].send(signal);
    let victims = ranks.remove(victim);
    for (code, text) in ranks.into_iter().map(Rank::end) {
        assert_eq!(code, PEER_FAILED, "{text}");
        assert!(text.contains(&format!("rank {victim} (")) && text.contains(said), "{text}");
    }
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    drop(victims);
}

#[test]
fn a_rank_killed_in_the_rendezvous() {
    lose(3, 1, "joining", Signal::KILL, "steady", "was lost: the connection closed");
}

#[test]
fn a_rank_killed_between_sums() {
    for victim in [0, 2] {
        lose(3, victim, "stepping", Signal::KILL, "steady", "was lost: the connection closed");
    }
}

#[test]
fn a_stopped_rank_is_lost_after_the_limit_of_silence() {
    for victim in [0, 2] {
        lose(3, victim, "stepping", Signal::STOP, "quick", "was lost: nothing was heard for 0.7 s");
    }
}

#[test]
fn ranks_that_fall_silent_together_are_named_together() {
    let port = free_port().unwrap();
    let mut ranks: Vec<Rank> =
        (0..3).map(|rank| Rank::start(&World::on_this_machine(rank, 3, port, dist::Launcher::None), "quick")).collect();
    ranks.iter_mut().for_each(|rank| rank.wait_for("stepping"));
    ranks[1..].iter().for_each(|rank| rank.send(Signal::STOP));
    let (code, text) = ranks.remove(0).end();
    assert_eq!(code, PEER_FAILED, "{text}");
    assert!(text.contains(": ranks 1 (") && text.contains(", 2 (") && text.ends_with("were lost: nothing was heard for 0.7 s"), "{text}");
}

fn launched(role: &str, max_restarts: u32) -> (dist::launch::Outcome, String, Vec<Death>) {
    let mut options = LaunchOptions::new(std::env::current_exe().unwrap(), AS_RANK);
    options.vars.push((ROLE.into(), role.into()));
    (options.nproc_per_node, options.max_restarts) = (3, max_restarts);
    let (mut text, mut deaths) = (String::new(), Vec::new());
    let outcome = launch(
        &options,
        |rank, _, line| text += &format!("[rank {rank}] {line}\n"),
        |death, _| {
            deaths.push(death.clone());
            Vec::new()
        },
    );
    (outcome.unwrap(), text, deaths)
}

#[test]
fn the_launcher_blames_the_rank_that_was_killed_and_starts_again() {
    let start = Instant::now();
    let (outcome, text, _) = launched("suicide", 0);
    let death = outcome.death.as_ref().expect("rank 1 killed itself");
    assert_eq!((death.end.rank, death.end.how), (1, How::Signal(9)), "{text}");
    assert!(death.last_lines.iter().any(|line| line == "last words"), "{death:?}");
    assert_eq!(outcome.exit_code(), 137);
    let (outcome, text, deaths) = launched("suicide", 2);
    assert_eq!((outcome.restarts, outcome.death.as_ref()), (1, None), "{text}");
    assert_eq!(deaths.len(), 1);
    assert!(start.elapsed() < 2 * SOON);
}

#[test]
fn ranks_end_when_their_launcher_is_killed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut launcher = Command::new(std::env::current_exe().unwrap())
        .args(AS_RANK)
        .env(ROLE, "launcher")
        .env("LOKR_TEST_ADDRESS", listener.local_addr().unwrap().to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let followers = [listener.accept().unwrap().0, listener.accept().unwrap().0];
    let start = Instant::now();
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    for mut follower in followers {
        follower.set_read_timeout(Some(SOON)).unwrap();
        // The connection closes when the process ends; a rank that lives on makes this time out.
        assert_eq!(follower.read(&mut [0]).expect("a rank outlived its launcher"), 0);
    }
    assert!(start.elapsed() < SOON);
}
