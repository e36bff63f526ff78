//! How the ranks find rank 0: where it listens, how the others knock, and what both sides say before the first frame.
//! What rank 0 then checks stands in `gather`, the first half of `hub`'s life.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use crate::failure::{Peer, Refusal};
use crate::group::{Options, Wait};
use crate::wire::{Frame, Header, Hello, MAGIC, PROTOCOL, read_frame};
use crate::{Error, Operation, Result, World};

/// A process that connects and says nothing may hold up the others for no longer than this.
const NEWCOMER: Duration = Duration::from_secs(3);
/// Rank 0 may be busy with a few silent strangers before it greets us.
const GREETING: Duration = Duration::from_secs(10);
/// Where several ports are tried in turn, what is silent on one of them is rather not rank 0.
const GREETING_OF_SEVERAL: Duration = Duration::from_secs(1);
const CONNECT: Duration = Duration::from_secs(2);

/// The socket on which rank 0 waits for the others: only for this machine where all ranks are on it.
///
/// # Errors
/// [`Error::PortInUse`], [`Error::Listen`].
pub(crate) fn listen(world: &World) -> Result<TcpListener> {
    // A name that rank 0's own machine does not know may still lead the others here.
    let known: Vec<IpAddr> = resolve(&world.master_addr, 0).map(|all| all.iter().map(SocketAddr::ip).collect()).unwrap_or_default();
    let v6 = !known.is_empty() && known.iter().all(IpAddr::is_ipv6);
    let ip = bind_address(v6, world.local_world_size == world.world_size && known.iter().any(IpAddr::is_loopback));
    for port in ports(world) {
        match TcpListener::bind((ip, port)) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(source) => return Err(Error::Listen { address: SocketAddr::new(ip, port).to_string(), source }),
        }
    }
    Err(Error::PortInUse { address: SocketAddr::new(ip, world.master_port).to_string(), span: world.port_span })
}

/// The address to bind: all of this machine's, or its loopback.
pub(crate) fn bind_address(v6: bool, loopback: bool) -> IpAddr {
    match (v6, loopback) {
        (false, false) => Ipv4Addr::UNSPECIFIED.into(),
        (false, true) => Ipv4Addr::LOCALHOST.into(),
        (true, false) => Ipv6Addr::UNSPECIFIED.into(),
        (true, true) => Ipv6Addr::LOCALHOST.into(),
    }
}

fn ports(world: &World) -> impl Iterator<Item = u16> {
    world.master_port..=world.master_port.saturating_add(world.port_span.max(1) - 1)
}

fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

/// What rank 0 found at the other end of a new connection.
pub(crate) enum Newcomer {
    /// A rank.
    Rank(Hello, TcpStream),
    /// A rank of another build.
    OtherProtocol(u32),
    /// Something else, or a rank of another run: none of our business.
    Stranger,
}

/// Rank 0's side of the first words.
pub(crate) fn receive(mut stream: TcpStream, run_id: &str) -> Newcomer {
    let mut words = || -> io::Result<Newcomer> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(NEWCOMER))?;
        stream.set_write_timeout(Some(NEWCOMER))?;
        let mut greeting = MAGIC.to_vec();
        greeting.extend(PROTOCOL.to_le_bytes());
        let id = run_id.as_bytes();
        greeting.extend((id.len() as u32).to_le_bytes());
        greeting.extend(id);
        stream.write_all(&greeting)?;
        match read_version(&mut stream)? {
            Some(PROTOCOL) => {}
            Some(version) => return Ok(Newcomer::OtherProtocol(version)),
            None => return Ok(Newcomer::Stranger),
        }
        match read_frame(&mut stream)? {
            Frame { header: Header::Hello(hello), .. } => Ok(Newcomer::Rank(hello, stream.try_clone()?)),
            _ => Ok(Newcomer::Stranger),
        }
    };
    words().unwrap_or(Newcomer::Stranger)
}

fn read_version(stream: &mut TcpStream) -> io::Result<Option<u32>> {
    let mut magic = [0; MAGIC.len()];
    stream.read_exact(&mut magic)?;
    if magic != MAGIC {
        return Ok(None);
    }
    let mut version = [0; 4];
    stream.read_exact(&mut version)?;
    Ok(Some(u32::from_le_bytes(version)))
}

/// Why one knock led to no connection.
enum Knock {
    /// Try again: what the last attempt met.
    Again(String),
    /// Trying again is of no use.
    Never(Error),
}

/// Finds rank 0, trying again until `options.rendezvous` has passed: machines do not start at the same moment.
/// Rank 0 itself gives the port that it listens on and connects over the loopback.
///
/// # Errors
/// [`Error::Unreachable`], [`Error::Refused`] where rank 0 is of another build.
pub(crate) fn find(world: &World, options: &Options, host: &str, own: Option<SocketAddr>) -> Result<TcpStream> {
    let start = Instant::now();
    let mut notices = 0;
    let mut pause = Duration::from_millis(5);
    let mut last = String::new();
    loop {
        for port in own.map_or_else(|| ports(world).collect(), |own| vec![own.port()]) {
            let addresses = match own {
                Some(own) => vec![SocketAddr::new(bind_address(own.is_ipv6(), true), port)],
                None => match resolve(&world.master_addr, port) {
                    Ok(addresses) => addresses,
                    Err(error) => {
                        last = format!("the name cannot be resolved: {error}");
                        continue;
                    }
                },
            };
            for address in addresses {
                match knock(address, &world.run_id, host, if world.port_span > 1 { GREETING_OF_SEVERAL } else { GREETING }) {
                    Ok(stream) => return Ok(stream),
                    Err(Knock::Never(error)) => return Err(error),
                    Err(Knock::Again(what)) => last = what,
                }
            }
        }
        let waited = start.elapsed();
        if waited >= options.rendezvous {
            return Err(Error::Unreachable {
                rank: world.rank,
                address: match world.port_span {
                    0 | 1 => format!("{}:{}", world.master_addr, world.master_port),
                    span => format!("{}:{} and the {} ports after it", world.master_addr, world.master_port, span - 1),
                },
                millis: waited.as_millis() as u64,
                last,
                torchrun: world.port_span > 1 && world.launcher == crate::Launcher::Torchrun,
            });
        }
        if waited >= options.notice_after(notices) {
            notices += 1;
            let missing = vec![Peer { rank: 0, host: world.master_addr.clone() }];
            options.tell(&Wait { operation: Operation::Rendezvous, missing, waited });
        }
        std::thread::sleep(pause.min(options.rendezvous.saturating_sub(waited)));
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

fn knock(address: SocketAddr, run_id: &str, host: &str, patience: Duration) -> std::result::Result<TcpStream, Knock> {
    let mut stream = TcpStream::connect_timeout(&address, CONNECT).map_err(|error| Knock::Again(error.to_string()))?;
    let greeting = (|| {
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        stream.write_all(&[&MAGIC[..], &PROTOCOL.to_le_bytes()].concat())?;
        let version = match read_version(&mut stream)? {
            Some(PROTOCOL) => PROTOCOL,
            other => return Ok((other, Vec::new())),
        };
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        let mut id = Vec::new();
        (&mut stream).take(u32::from_le_bytes(length).into()).read_to_end(&mut id)?;
        Ok((Some(version), id))
    })();
    match greeting {
        Ok((Some(PROTOCOL), id)) if id == run_id.as_bytes() => Ok(stream),
        Ok((Some(PROTOCOL), id)) => Err(Knock::Again(format!("rank 0 of another run (`{}`) listens there", String::from_utf8_lossy(&id)))),
        Ok((Some(version), _)) => {
            Err(Knock::Never(Error::Refused(Refusal::Protocol { host: host.into(), theirs: PROTOCOL, ours: version })))
        }
        Ok((None, _)) => Err(Knock::Again("another program listens there".into())),
        Err(error) => {
            let error: io::Error = error;
            match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => Err(Knock::Again("what listens there does not answer".into())),
                _ => Err(Knock::Again(format!("what listens there hung up: {error}"))),
            }
        }
    }
}
