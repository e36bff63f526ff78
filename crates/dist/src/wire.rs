//! What travels between a rank and the hub of rank 0: frames of a small JSON header and raw bytes, and the two threads
//! that keep one connection alive.
//!
//! Layout of a frame, numbers little-endian: header length (u32), payload length (u64), header, payload. Before the
//! first frame each side sends the eight bytes of [`MAGIC`] and its protocol version (u32).
//!
//! A connection's reader always waits in `read` with the limit of silence as its timeout, and its writer sends a ping
//! whenever it has been idle for a heartbeat: so a closed socket is seen at once, a cut cable or a stopped process after
//! the limit, and neither depends on what the rank's main thread is busy with.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Refusal, Silence};
use crate::{Error, Operation, Result};

/// First bytes of every connection.
pub(crate) const MAGIC: [u8; 8] = *b"lokrdist";
/// Raised whenever a frame changes its meaning.
pub(crate) const PROTOCOL: u32 = 1;
/// A longer header is not one of ours.
const MAX_HEADER: u32 = 1 << 26;
/// These threads keep a few small values; a thousand of them should not cost a gigabyte of address space.
const STACK: usize = 256 << 10;

/// Who connects.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub rank: usize,
    pub world_size: usize,
    pub host: String,
    pub pid: u32,
    pub fingerprint: Vec<(String, String)>,
}

/// A frame's header.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Header {
    /// Rank to hub, first frame.
    Hello(Hello),
    /// Hub to rank: the group is whole. `token` marks the connections that belong to it.
    Welcome { hosts: Vec<String>, token: u64 },
    /// Hub to rank: there will be no group.
    Refused(Refusal),
    /// Rank to hub: here I am, with my part of the data.
    Call { operation: Operation, millis: u64 },
    /// Hub to rank: all have come; the payload is `parts` joined.
    Reply { parts: Vec<u64> },
    /// Rank to hub: in this operation no data comes from that rank.
    Stuck { operation: Operation, waiting_for: usize, millis: u64 },
    /// Either way: the group is broken.
    Failed(Failure),
    /// Rank to hub: farewell.
    Leave,
    /// Either way: I am alive.
    Ping,
}

/// A frame as received.
#[derive(Debug)]
pub(crate) struct Frame {
    pub header: Header,
    pub payload: Vec<u8>,
}

/// A frame to be sent; cheap to clone, so that one reply serves all ranks.
#[derive(Clone)]
pub(crate) struct Outgoing {
    head: Arc<Vec<u8>>,
    payload: Arc<Vec<u8>>,
}

impl Outgoing {
    pub(crate) fn new(header: &Header, payload: Vec<u8>) -> Self {
        // Headers hold strings, numbers and lists only: nothing in them that JSON cannot say.
        let json = serde_json::to_vec(header).expect("a header is plain data");
        let mut head = Vec::with_capacity(12 + json.len());
        head.extend((json.len() as u32).to_le_bytes());
        head.extend((payload.len() as u64).to_le_bytes());
        head.extend(json);
        Self { head: Arc::new(head), payload: Arc::new(payload) }
    }

    pub(crate) fn write_to(&self, stream: &mut impl Write) -> io::Result<()> {
        stream.write_all(&self.head)?;
        stream.write_all(&self.payload)
    }
}

/// Reads one frame. A read timeout on the stream limits silence, not the whole frame.
pub(crate) fn read_frame(stream: &mut impl Read) -> io::Result<Frame> {
    let mut lengths = [0; 12];
    stream.read_exact(&mut lengths)?;
    let (header, payload) = lengths.split_at(4);
    let header = u32::from_le_bytes(header.try_into().expect("4 of 12 bytes"));
    let payload = u64::from_le_bytes(payload.try_into().expect("8 of 12 bytes"));
    if header > MAX_HEADER {
        return Err(io::Error::new(ErrorKind::InvalidData, "not a frame of this protocol"));
    }
    let header = serde_json::from_slice(&read_bytes(stream, header.into())?)?;
    Ok(Frame { header, payload: read_bytes(stream, payload)? })
}

/// Grows the buffer with what comes, so that a wrong length cannot take all memory at once.
fn read_bytes(stream: &mut impl Read, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(length.min(1 << 20) as usize);
    stream.take(length).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == length { Ok(bytes) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

/// How often a sign of life is sent and how long its absence is borne.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pulse {
    pub heartbeat: Duration,
    pub silence: Duration,
}

/// What a connection's reader reports.
#[derive(Debug)]
pub(crate) enum Event {
    Frame(Frame),
    /// Nothing more will come.
    Gone(Silence),
}

/// One connection with its reader and writer threads. Dropping it sends what is still queued, then closes our side.
pub(crate) struct Link {
    queue: Option<Sender<Outgoing>>,
    writer: Option<JoinHandle<()>>,
}

impl Link {
    /// Starts the threads; what comes is sent to `events` together with `from`.
    ///
    /// # Errors
    /// [`Error::System`].
    pub(crate) fn start(stream: TcpStream, from: usize, pulse: Pulse, events: Sender<(usize, Event)>) -> Result<Self> {
        let failed = |source| Error::System { doing: "set up a connection between ranks", source };
        stream.set_nodelay(true).map_err(failed)?;
        stream.set_read_timeout(Some(pulse.silence)).map_err(failed)?;
        stream.set_write_timeout(Some(pulse.silence)).map_err(failed)?;
        let mut input = stream.try_clone().map_err(failed)?;
        let thread = |name: &str| std::thread::Builder::new().name(name.into()).stack_size(STACK);
        // Ends when the other side closes or falls silent; nobody waits for it.
        thread("dist-read").spawn(move || read_all(&mut input, from, pulse, &events)).map_err(failed)?;
        let (queue, frames) = channel();
        let writer = thread("dist-write").spawn(move || write_all(stream, &frames, pulse)).map_err(failed)?;
        Ok(Self { queue: Some(queue), writer: Some(writer) })
    }

    /// Queues a frame. That the other side is gone is told by the reader, which knows how it went.
    pub(crate) fn send(&self, frame: Outgoing) {
        if let Some(queue) = &self.queue {
            let _ = queue.send(frame);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

fn read_all(stream: &mut TcpStream, from: usize, pulse: Pulse, events: &Sender<(usize, Event)>) {
    loop {
        let event = match read_frame(stream) {
            Ok(Frame { header: Header::Ping, .. }) => continue,
            Ok(frame) => Event::Frame(frame),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Event::Gone(Silence::Quiet { millis: pulse.silence.as_millis() as u64 })
            }
            Err(_) => Event::Gone(Silence::Closed),
        };
        let last = matches!(event, Event::Gone(_));
        if events.send((from, event)).is_err() || last {
            return;
        }
    }
}

fn write_all(mut stream: TcpStream, frames: &Receiver<Outgoing>, pulse: Pulse) {
    let ping = Outgoing::new(&Header::Ping, Vec::new());
    loop {
        let frame = match frames.recv_timeout(pulse.heartbeat) {
            Ok(frame) => frame,
            Err(RecvTimeoutError::Timeout) => ping.clone(),
            Err(RecvTimeoutError::Disconnected) => break,
        };
        if frame.write_to(&mut stream).is_err() {
            break;
        }
    }
    // Only our side: the other's last words must still be read, or the system may throw away ours with a reset.
    let _ = stream.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_was() {
        let operation = Operation::Broadcast { name: "wörter".into(), bytes: 3, root: 1 };
        let mut bytes = Vec::new();
        Outgoing::new(&Header::Call { operation: operation.clone(), millis: 7 }, vec![1, 2, 3]).write_to(&mut bytes).unwrap();
        let frame = read_frame(&mut bytes.as_slice()).unwrap();
        assert!(matches!(frame.header, Header::Call { operation: ref same, millis: 7 } if *same == operation));
        assert_eq!(frame.payload, [1, 2, 3]);
    }

    #[test]
    fn torn_and_foreign_bytes_are_errors() {
        let mut bytes = Vec::new();
        Outgoing::new(&Header::Leave, vec![9; 10]).write_to(&mut bytes).unwrap();
        for end in 0..bytes.len() {
            assert_eq!(read_frame(&mut &bytes[..end]).unwrap_err().kind(), ErrorKind::UnexpectedEof, "cut at {end}");
        }
        let http = b"HTTP/1.1 400 Bad Request\r\n\r\n";
        assert_eq!(read_frame(&mut http.as_slice()).unwrap_err().kind(), ErrorKind::InvalidData);
        // A payload length beyond all memory must fail by the missing bytes, not by an allocation.
        let mut huge = bytes[..4].to_vec();
        huge.extend(u64::MAX.to_le_bytes());
        huge.extend(&bytes[12..]);
        assert_eq!(read_frame(&mut huge.as_slice()).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
