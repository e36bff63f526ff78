//! The TCP group: the contract for 1 to 4 ranks, and every way in which a group does not form or breaks, as far as
//! threads can play it. Killed and stopped processes are in `processes.rs`.

mod contract;

use std::io::Write;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use contract::{contract, each};
use dist::launch::free_port;
use dist::{Error, Failure, Launcher, Options, ProcessGroup, Refusal, Result, World};

/// Bounds for "within seconds": generous, since tests share two cores with others.
const SOON: Duration = Duration::from_secs(5);

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn options() -> Options {
    Options { rendezvous: Duration::from_secs(20), deadline: Duration::from_secs(20), ..Options::default() }
}

/// Joins one rank per entry at once; results in the order of the entries.
fn join_all(entries: Vec<(World, Options)>) -> Vec<Result<ProcessGroup>> {
    let threads: Vec<_> =
        entries.into_iter().map(|(world, options)| std::thread::spawn(move || ProcessGroup::join(&world, &options))).collect();
    threads.into_iter().map(|thread| thread.join().expect("a rank's thread panicked")).collect()
}

fn worlds(n: usize) -> Vec<World> {
    let port = free_port().unwrap();
    (0..n).map(|rank| World::on_this_machine(rank, n, port, Launcher::None)).collect()
}

fn group_with(n: usize, options: &Options) -> Vec<ProcessGroup> {
    join_all(worlds(n).into_iter().map(|world| (world, options.clone())).collect()).into_iter().map(Result::unwrap).collect()
}

fn group(n: usize) -> Vec<ProcessGroup> {
    group_with(n, &options())
}

fn failed(results: Vec<Result<ProcessGroup>>) -> Vec<Error> {
    results.into_iter().map(|result| result.err().expect("the group formed")).collect()
}

#[test]
fn contract_of_a_world_of_one() {
    contract(1, &group);
}

#[test]
fn contract_of_two() {
    contract(2, &group);
}

#[test]
fn contract_of_three() {
    contract(3, &group);
}

#[test]
fn contract_of_four() {
    contract(4, &group);
}

#[test]
fn ranks_may_come_late_and_the_wait_names_them() {
    let notices = Arc::new(Mutex::new(Vec::new()));
    let told = notices.clone();
    let options =
        Options { notice: millis(50), on_wait: Some(Arc::new(move |wait| told.lock().unwrap().push(wait.to_string()))), ..options() };
    let mut entries: Vec<_> = worlds(3).into_iter().map(|world| (world, options.clone())).collect();
    let late = entries.pop().unwrap();
    let slow = std::thread::spawn(move || {
        std::thread::sleep(millis(300));
        ProcessGroup::join(&late.0, &Options { on_wait: None, ..late.1 }).unwrap()
    });
    let mut groups: Vec<_> = join_all(entries).into_iter().map(Result::unwrap).collect();
    groups.push(slow.join().unwrap());
    each(groups, |group| {
        if group.rank() == 1 {
            std::thread::sleep(millis(300));
        }
        group.barrier("cache").unwrap();
    });
    let notices = notices.lock().unwrap().join("\n");
    assert!(notices.contains("waiting for rank 2 in the rendezvous since"), "{notices}");
    assert!(notices.lines().any(|line| line.starts_with("waiting for rank 1 (") && line.contains("in barrier \"cache\"")), "{notices}");
}

#[test]
fn a_long_wait_is_reported_at_growing_intervals() {
    let notices = Arc::new(Mutex::new(Vec::new()));
    let told = notices.clone();
    let on_wait: dist::OnWait = Arc::new(move |wait| told.lock().unwrap().push((wait.to_string(), wait.waited)));
    let options = Options { notice: millis(40), ..options() };
    let entries = worlds(2).into_iter().map(|world| {
        let on_wait = (world.rank == 0).then(|| on_wait.clone());
        (world, Options { on_wait, ..options.clone() })
    });
    let groups = join_all(entries.collect()).into_iter().map(Result::unwrap).collect();
    notices.lock().unwrap().clear();
    each(groups, |group| {
        if group.rank() == 1 {
            std::thread::sleep(millis(800));
        }
        group.barrier("the previews of rank 1").unwrap();
    });
    let notices = notices.lock().unwrap();
    assert!(notices.iter().all(|(text, _)| text.contains("in barrier \"the previews of rank 1\"")), "{notices:?}");
    // After 40, 120, 280 and 600 ms; on a busy machine some are late.
    assert!((2..=4).contains(&notices.len()), "{notices:?}");
    let due = [40, 120, 280, 600];
    assert!(notices.iter().zip(due).all(|((_, waited), due)| *waited >= millis(due)), "{notices:?}");
}

#[test]
fn rank_0_may_come_last() {
    let mut entries: Vec<_> = worlds(2).into_iter().map(|world| (world, options())).collect();
    let (world, options) = entries.remove(0);
    let first = std::thread::spawn(move || {
        std::thread::sleep(millis(300));
        ProcessGroup::join(&world, &options).unwrap()
    });
    let mut groups: Vec<_> = join_all(entries).into_iter().map(Result::unwrap).collect();
    groups.push(first.join().unwrap());
    each(groups, |group| group.barrier("start").unwrap());
}

#[test]
fn different_fingerprints_are_refused_on_all_sides_with_what_differs() {
    let start = Instant::now();
    let print = |recipe: &str, data: Option<&str>| {
        let data = data.map(|data| ("data".to_string(), data.to_string()));
        let fingerprint = [("recipe".to_string(), recipe.to_string())].into_iter().chain(data).collect();
        Options { fingerprint, ..options() }
    };
    let prints = [print("r1", Some("d1")), print("r1", Some("d2")), print("r1", None)];
    for error in failed(join_all(worlds(3).into_iter().zip(prints).collect())) {
        let text = error.to_string();
        assert!(matches!(error, Error::Refused(Refusal::Fingerprint { .. })), "{text}");
        for part in ["`data` is `d1` on rank 0 (", "`d2` on rank 1 (", "absent on rank 2 ("] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("recipe"), "names an entry that does not differ: {text}");
        assert!(error.hint().is_some());
    }
    assert!(start.elapsed() < SOON);
}

#[test]
fn a_wrong_world_size_is_refused_on_all_sides() {
    let start = Instant::now();
    let mut worlds = worlds(3);
    worlds[2].world_size = 4;
    for error in failed(join_all(worlds.into_iter().map(|world| (world, options())).collect())) {
        let text = error.to_string();
        assert!(text.starts_with("rank 2 (") && text.ends_with("was started for a world of 4, rank 0 for a world of 3"), "{text}");
    }
    assert!(start.elapsed() < SOON);
}

#[test]
fn a_rank_that_is_there_twice_is_refused_on_all_sides() {
    let mut worlds = worlds(3);
    worlds[2].rank = 1;
    for error in failed(join_all(worlds.into_iter().map(|world| (world, options())).collect())) {
        assert!(matches!(&error, Error::Refused(Refusal::DuplicateRank { rank: 1, .. })), "{error}");
    }
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let mut worlds = worlds(3);
    worlds.remove(1);
    let short = Options { rendezvous: millis(400), ..options() };
    for error in failed(join_all(worlds.into_iter().map(|world| (world, short.clone())).collect())) {
        let text = error.to_string();
        assert!(text.starts_with("rank 1 did not come to the rendezvous within 0.4 s"), "{text}");
    }
}

#[test]
fn a_port_in_use_is_said_on_rank_0() {
    let port = free_port().unwrap();
    let _holder = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let error = ProcessGroup::join(&World::on_this_machine(0, 2, port, Launcher::None), &options()).err().unwrap();
    assert_eq!(error.to_string(), format!("rank 0 cannot listen on 127.0.0.1:{port}: the port is in use"));
    assert!(error.hint().unwrap().contains("MASTER_PORT"));
}

#[test]
fn rank_0_takes_the_next_port_where_it_may() {
    // As under torchrun, whose agent holds the port that it hands out.
    let mut worlds = worlds(2);
    let _holder = TcpListener::bind(("127.0.0.1", worlds[0].master_port)).unwrap();
    worlds.iter_mut().for_each(|world| world.port_span = 4);
    let groups = join_all(worlds.into_iter().map(|world| (world, options())).collect());
    each(groups.into_iter().map(Result::unwrap).collect(), |group| group.barrier("start").unwrap());
}

#[test]
fn two_runs_that_share_their_ports_do_not_mix() {
    let worlds: Vec<World> = worlds(2);
    let run = |id: &str| {
        let own = worlds.iter().map(|world| World { port_span: 4, run_id: id.into(), ..world.clone() });
        own.map(|world| (world, Options { fingerprint: vec![("run".into(), id.into())], ..options() })).collect::<Vec<_>>()
    };
    let both: Vec<_> = run("a").into_iter().chain(run("b")).collect();
    let groups = join_all(both).into_iter().map(Result::unwrap).collect();
    each(groups, |group| group.barrier("start").unwrap());
}

#[test]
fn nobody_at_the_address() {
    let port = free_port().unwrap();
    let short = Options { rendezvous: millis(300), ..options() };
    let error = ProcessGroup::join(&World::on_this_machine(1, 2, port, Launcher::None), &short).err().unwrap();
    let text = error.to_string();
    assert!(text.starts_with(&format!("rank 1 did not find rank 0 at 127.0.0.1:{port} within 0.")), "{text}");
    assert!(text.contains("refused"), "{text}");
    let nameless = World { master_addr: "no-such-host.invalid".into(), ..World::on_this_machine(1, 2, port, Launcher::None) };
    let text = ProcessGroup::join(&nameless, &short).err().unwrap().to_string();
    assert!(text.contains("the name cannot be resolved"), "{text}");
}

#[test]
fn another_program_at_the_address() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.and_then(|mut stream| stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
        }
    });
    let short = Options { rendezvous: millis(300), ..options() };
    let error = ProcessGroup::join(&World::on_this_machine(1, 2, port, Launcher::None), &short).err().unwrap();
    assert!(error.to_string().ends_with("another program listens there"), "{error}");
}

#[test]
fn strangers_at_rank_0s_port_are_ignored() {
    let worlds = worlds(2);
    let port = worlds[0].master_port;
    let stranger = std::thread::spawn(move || {
        for _ in 0..20 {
            if let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", port)) {
                let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
                return true;
            }
            std::thread::sleep(millis(10));
        }
        false
    });
    let mut entries: Vec<_> = worlds.into_iter().map(|world| (world, options())).collect();
    let (world, late) = entries.pop().unwrap();
    let rank_1 = std::thread::spawn(move || {
        std::thread::sleep(millis(200));
        ProcessGroup::join(&world, &late).unwrap()
    });
    let mut groups: Vec<_> = join_all(entries).into_iter().map(Result::unwrap).collect();
    groups.push(rank_1.join().unwrap());
    assert!(stranger.join().unwrap(), "the stranger did not get through, so this test shows nothing");
    each(groups, |group| group.barrier("start").unwrap());
}

#[test]
fn a_rank_that_leaves_is_named_at_once() {
    for leaver in 0..3 {
        let start = Instant::now();
        let mut groups = group(3);
        drop(groups.remove(leaver));
        let errors = each(groups, |group| group.all_reduce_sum("grads", &mut [0.0; 10]).unwrap_err());
        for error in errors {
            let text = error.to_string();
            assert!(text.starts_with(&format!("in all-reduce \"grads\" of 10 numbers: rank {leaver} (")), "{text}");
            assert!(text.ends_with("has left the group") && error.is_peer_failure(), "{text}");
        }
        assert!(start.elapsed() < SOON);
    }
}

#[test]
fn leaving_after_the_last_call_harms_nobody() {
    // Rank 0 may end first; the reply of the last barrier must have reached all, and so must its part of the last sum.
    for _ in 0..20 {
        let sums = group(3)
            .into_iter()
            .map(|group| std::thread::spawn(move || group.all_reduce_sum("last", &mut vec![1.0; 50_000]).map(|()| drop(group))));
        sums.collect::<Vec<_>>().into_iter().for_each(|thread| thread.join().unwrap().unwrap());

        let mut groups = group(3);
        groups.reverse();
        let threads: Vec<_> =
            groups.into_iter().map(|group| std::thread::spawn(move || group.barrier("end").map(|()| drop(group)))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
    }
}

#[test]
fn a_hung_rank_is_named_at_the_deadline() {
    for elements in [10, 100_000] {
        let start = Instant::now();
        let errors = each(group_with(3, &Options { deadline: millis(300), ..options() }), |group| {
            if group.rank() == 1 {
                std::thread::sleep(millis(900));
            }
            group.all_reduce_sum("grads", &mut vec![0.0; elements]).unwrap_err()
        });
        for error in errors {
            let text = error.to_string();
            assert!(
                text.starts_with("rank 1 (")
                    && text.contains(&format!("did not come to all-reduce \"grads\" of {elements} numbers within 0.3")),
                "{text}"
            );
        }
        assert!(start.elapsed() < SOON);
    }
}

#[test]
fn a_barrier_may_have_a_deadline_of_its_own() {
    each(group_with(2, &Options { deadline: millis(100), ..options() }), |group| {
        if group.rank() == 1 {
            std::thread::sleep(millis(400));
        }
        group.barrier_within("cache", Duration::from_secs(20)).unwrap();
    });
}

#[test]
fn an_idle_group_outlives_the_limit_of_silence() {
    let quick = Options { heartbeat: millis(50), silence: millis(200), ..options() };
    each(group_with(3, &quick), |group| {
        group.all_reduce_sum("first", &mut vec![0.0; 10_000]).unwrap();
        std::thread::sleep(millis(700));
        group.all_reduce_sum("second", &mut vec![0.0; 10_000]).unwrap();
    });
}

#[test]
fn a_group_that_is_dropped_gives_up_what_is_under_way() {
    let start = Instant::now();
    let mut groups = group(2);
    let handle = groups[1].all_reduce_async("never", vec![0.0; 10]);
    drop(groups.remove(1));
    let Err(Error::Failed { failure, .. }) = handle.wait() else { panic!("a sum without the others") };
    assert!(matches!(*failure, Failure::Left { peer } if peer.rank == 1));
    assert!(start.elapsed() < SOON);
}

#[test]
fn options_that_cannot_work() {
    let worlds = worlds(2);
    let bad = Options { heartbeat: millis(300), silence: millis(400), ..options() };
    assert!(matches!(ProcessGroup::join(&worlds[0], &bad), Err(Error::Option { .. })));
    let outside = World { rank: 2, ..worlds[0].clone() };
    assert!(matches!(ProcessGroup::join(&outside, &options()), Err(Error::Option { .. })));
}
