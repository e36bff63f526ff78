//! Rank 0's side of the rendezvous: collects all ranks, sees that they were started for the same run, and tells every
//! one of them the same verdict if not.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use crate::Operation;
use crate::failure::{Difference, Failure, Peer, Refusal};
use crate::group::{Options, Wait};
use crate::rendezvous::{Newcomer, receive};
use crate::wire::{Event, Header, Hello, Link, Outgoing, PROTOCOL};

/// Ranks that come after the verdict are still told why, for this long.
const LINGER: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(2);

/// What the hub of rank 0 works with.
pub(crate) struct Settings {
    pub world_size: usize,
    pub run_id: String,
    pub options: Options,
    /// Set when rank 0 gives up by itself.
    pub closing: Arc<AtomicBool>,
}

/// All ranks, by rank.
pub(crate) struct Gathered {
    pub links: Vec<Link>,
    pub peers: Vec<Peer>,
}

enum Verdict {
    /// With the number of processes that have been told besides the joined ones.
    Refused(Refusal, usize),
    Failed(Failure),
    Closed,
}

/// Accepts until all ranks are there. `None` if there will be no group; the ranks have then been told.
pub(crate) fn gather(
    listener: &TcpListener,
    settings: &Settings,
    events: &Sender<(usize, Event)>,
    received: &Receiver<(usize, Event)>,
) -> Option<Gathered> {
    let mut joined = BTreeMap::new();
    match collect(listener, settings, &mut joined, events, received) {
        Ok(()) => {
            let peers = joined.values().map(|(hello, _)| peer(hello)).collect();
            Some(Gathered { links: joined.into_values().map(|(_, link)| link).collect(), peers })
        }
        Err(Verdict::Closed) => None,
        Err(Verdict::Failed(failure)) => {
            let farewell = Outgoing::new(&Header::Failed(failure), Vec::new());
            joined.values().for_each(|(_, link)| link.send(farewell.clone()));
            None
        }
        Err(Verdict::Refused(refusal, told)) => {
            let farewell = Outgoing::new(&Header::Refused(refusal), Vec::new());
            joined.values().for_each(|(_, link)| link.send(farewell.clone()));
            refuse_others(listener, settings, joined.len() + told, &farewell);
            None
        }
    }
}

type Joined = BTreeMap<usize, (Hello, Link)>;

fn collect(
    listener: &TcpListener,
    settings: &Settings,
    joined: &mut Joined,
    events: &Sender<(usize, Event)>,
    received: &Receiver<(usize, Event)>,
) -> Result<(), Verdict> {
    let start = Instant::now();
    let mut notices = 0;
    // Without it `accept` cannot be given up; should the system refuse, the first poll shows it.
    let _ = listener.set_nonblocking(true);
    while joined.len() < settings.world_size {
        while let Ok((rank, event)) = received.try_recv() {
            if let (Event::Gone(silence), Some((hello, _))) = (event, joined.get(&rank)) {
                return Err(Verdict::Failed(Failure::Lost { peers: vec![peer(hello)], silence }));
            }
        }
        if settings.closing.load(Ordering::Relaxed) {
            return Err(Verdict::Closed);
        }
        match listener.accept() {
            Ok((stream, address)) => {
                admit(stream, &address.to_string(), settings, joined, events)?;
                continue;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            // A connection that was given up while it waited; the next one may be fine.
            Err(_) => {}
        }
        let waited = start.elapsed();
        let missing = || (0..settings.world_size).filter(|rank| !joined.contains_key(rank)).map(unknown).collect();
        if waited >= settings.options.rendezvous {
            let millis = waited.as_millis() as u64;
            return Err(Verdict::Failed(Failure::Missing { operation: Operation::Rendezvous, peers: missing(), millis }));
        }
        if waited >= settings.options.notice_after(notices) {
            notices += 1;
            settings.options.tell(&Wait { operation: Operation::Rendezvous, missing: missing(), waited });
        }
        std::thread::sleep(POLL);
    }
    let differences = compare(joined.values().map(|(hello, _)| hello));
    if differences.is_empty() { Ok(()) } else { Err(Verdict::Refused(Refusal::Fingerprint { differences }, 0)) }
}

fn admit(
    stream: TcpStream,
    address: &str,
    settings: &Settings,
    joined: &mut Joined,
    events: &Sender<(usize, Event)>,
) -> Result<(), Verdict> {
    let (hello, mut stream) = match receive(stream, &settings.run_id) {
        Newcomer::Rank(hello, stream) => (hello, stream),
        Newcomer::Stranger => return Ok(()),
        Newcomer::OtherProtocol(theirs) => {
            // It has seen our version in the greeting.
            return Err(Verdict::Refused(Refusal::Protocol { host: address.into(), theirs, ours: PROTOCOL }, 1));
        }
    };
    if hello.rank >= hello.world_size {
        return Ok(());
    }
    let refusal = if hello.world_size != settings.world_size {
        Some(Refusal::WorldSize { peer: peer(&hello), theirs: hello.world_size, ours: settings.world_size })
    } else {
        joined.get(&hello.rank).map(|(first, _)| Refusal::DuplicateRank {
            rank: hello.rank,
            processes: [first, &hello].map(|hello| format!("process {} on {}", hello.pid, hello.host)),
        })
    };
    if let Some(refusal) = refusal {
        // It is not among the joined, so it is told here. A newcomer that hangs up meanwhile needs no message.
        let _ = Outgoing::new(&Header::Refused(refusal.clone()), Vec::new()).write_to(&mut stream);
        return Err(Verdict::Refused(refusal, 1));
    }
    // A connection that breaks at this point shows as a rank that did not come.
    if let Ok(link) = Link::start(stream, hello.rank, settings.options.pulse(), events.clone()) {
        joined.insert(hello.rank, (hello, link));
    }
    Ok(())
}

fn refuse_others(listener: &TcpListener, settings: &Settings, mut told: usize, farewell: &Outgoing) {
    let start = Instant::now();
    while told < settings.world_size && start.elapsed() < LINGER {
        match listener.accept() {
            Ok((stream, _)) => {
                if let Newcomer::Rank(_, mut stream) = receive(stream, &settings.run_id) {
                    told += 1;
                    // Best effort: it may have been stopped already.
                    let _ = farewell.write_to(&mut stream);
                }
            }
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

fn peer(hello: &Hello) -> Peer {
    Peer { rank: hello.rank, host: hello.host.clone() }
}

fn unknown(rank: usize) -> Peer {
    Peer { rank, host: String::new() }
}

/// The entries on which not all ranks agree; `hellos` in rank order.
fn compare<'a>(hellos: impl Iterator<Item = &'a Hello>) -> Vec<Difference> {
    let hellos: Vec<&Hello> = hellos.collect();
    let mut names: Vec<&String> = Vec::new();
    for (name, _) in hellos.iter().flat_map(|hello| &hello.fingerprint) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let values_of = |name: &String| {
        let mut values: Vec<(Option<String>, Vec<Peer>)> = Vec::new();
        for hello in &hellos {
            let value = hello.fingerprint.iter().find(|(entry, _)| entry == name).map(|(_, value)| value.clone());
            match values.iter_mut().find(|(seen, _)| *seen == value) {
                Some((_, peers)) => peers.push(peer(hello)),
                None => values.push((value, vec![peer(hello)])),
            }
        }
        values
    };
    let all = names.into_iter().map(|name| Difference { name: name.clone(), values: values_of(name) });
    all.filter(|difference| difference.values.len() > 1).collect()
}
