//! Direct connections between all ranks, for sums that are too large to pass through the hub.
//!
//! Each rank owns one stretch of the buffer. All send it their values of that stretch, it adds them in rank order, and
//! sends the result to all: 2 (n - 1) / n of the buffer out and as much in for each of n ranks, as with a ring, but
//! every element is added in the same order wherever the buffer was cut.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::wire::MAGIC;

/// Sums of up to this many numbers go through the hub: one round trip beats two where latency counts, not bandwidth.
pub(crate) const SMALL: u64 = 4096;
/// How soon a blocked read or write looks whether the group still stands.
const SLICE: Duration = Duration::from_millis(50);
/// Numbers that are turned into bytes and back at a time: they stay in the cache.
const BLOCK: usize = 32 << 10;
/// For a connection to a socket that is known to listen.
const CONNECT: Duration = Duration::from_secs(10);

/// Why an exchange did not end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// This rank's connection closed.
    Closed(usize),
    /// Nothing came from this rank, or it took nothing, for as long as was allowed.
    Silent(usize),
    /// The caller's `alive` said no.
    Told,
}

/// One connection to every other rank.
pub(crate) struct Mesh {
    rank: usize,
    /// By rank; `None` at our own.
    peers: Vec<Option<TcpStream>>,
}

impl Mesh {
    /// Connects to the lower ranks and accepts the higher ones. All listen before any connects.
    ///
    /// # Errors
    /// The rank that is not connected and why; `None` if it did not come in time or `alive` said no.
    pub(crate) fn connect(
        rank: usize,
        listener: &TcpListener,
        addresses: &[SocketAddr],
        token: u64,
        limit: Duration,
        alive: &mut dyn FnMut() -> bool,
    ) -> Result<Self, (usize, Option<String>)> {
        let start = Instant::now();
        let mut peers: Vec<Option<TcpStream>> = addresses.iter().map(|_| None).collect();
        let mine = [&MAGIC[..], &token.to_le_bytes(), &(rank as u64).to_le_bytes()].concat();
        for (peer, address) in addresses.iter().enumerate().take(rank) {
            let connect = || {
                let mut stream = TcpStream::connect_timeout(address, CONNECT.min(limit))?;
                stream.write_all(&mine)?;
                ready(&stream)?;
                Ok(stream)
            };
            peers[peer] = Some(connect().map_err(|error: std::io::Error| (peer, Some(error.to_string())))?);
        }
        // Without it `accept` cannot be given up.
        listener.set_nonblocking(true).map_err(|error| (rank, Some(error.to_string())))?;
        while let Some(missing) = (rank + 1..peers.len()).find(|&peer| peers[peer].is_none()) {
            if !alive() || start.elapsed() >= limit {
                return Err((missing, None));
            }
            match listener.accept().ok().and_then(|(stream, _)| recognize(stream, token)) {
                Some((peer, stream)) if peer > rank && peer < peers.len() => peers[peer] = Some(stream),
                Some(_) | None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        Ok(Self { rank, peers })
    }

    /// Replaces `values` by their sum over ranks.
    ///
    /// # Errors
    /// [`Broken`]; `values` and the connections are then of no more use.
    pub(crate) fn sum(&self, values: &mut [f32], patience: Duration, alive: &mut dyn FnMut() -> bool) -> Result<(), Broken> {
        let (elements, n) = (values.len(), self.peers.len());
        let stretch = |owner| stretch(elements, n, owner);
        let mine = stretch(self.rank);
        let parts = self.swap(&|peer| &values[stretch(peer)], &|_| mine.len(), patience, alive)?;
        let mut total = vec![0.0; mine.len()];
        for (rank, part) in parts.iter().enumerate() {
            let add = |total: &mut [f32], part: &[f32]| match rank {
                0 => total.copy_from_slice(part),
                _ => total.iter_mut().zip(part).for_each(|(total, value)| *total += value),
            };
            add(&mut total, if rank == self.rank { &values[mine.clone()] } else { part });
        }
        let parts = self.swap(&|_| &total, &|peer| stretch(peer).len(), patience, alive)?;
        values[mine].copy_from_slice(&total);
        for (rank, part) in parts.iter().enumerate().filter(|&(rank, _)| rank != self.rank) {
            values[stretch(rank)].copy_from_slice(part);
        }
        Ok(())
    }

    /// Sends `outgoing(p)` to and receives `incoming(p)` numbers from each other rank p. In round k a rank sends to the
    /// one k places on and receives from the one k places back, so that nobody waits for a rank that is not sending
    /// to it; sending has its own thread, so that full buffers on both sides cannot block both.
    fn swap<'a>(
        &self,
        outgoing: &(dyn Fn(usize) -> &'a [f32] + Sync),
        incoming: &dyn Fn(usize) -> usize,
        patience: Duration,
        alive: &mut dyn FnMut() -> bool,
    ) -> Result<Vec<Vec<f32>>, Broken> {
        let n = self.peers.len();
        let stop = AtomicBool::new(false);
        let mut parts: Vec<Vec<f32>> = vec![Vec::new(); n];
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                (1..n).try_for_each(|round| {
                    let peer = (self.rank + round) % n;
                    let ok = || !stop.load(Ordering::Relaxed);
                    self.write(peer, outgoing(peer), patience, &ok)
                })
            });
            let mut read = || {
                for round in 1..n {
                    let peer = (self.rank + n - round) % n;
                    parts[peer] = self.read(peer, incoming(peer), patience, alive)?;
                }
                while !writer.is_finished() {
                    if !alive() {
                        return Err(Broken::Told);
                    }
                    std::thread::sleep(Duration::from_micros(100));
                }
                Ok(())
            };
            let read = read();
            stop.store(read.is_err(), Ordering::Relaxed);
            // A panic in the writer is a bug in this file; it goes on as one.
            let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            read.and(written)
        })?;
        Ok(parts)
    }

    fn read(&self, peer: usize, length: usize, patience: Duration, alive: &mut dyn FnMut() -> bool) -> Result<Vec<f32>, Broken> {
        let Some(mut stream) = self.peers[peer].as_ref() else { return Ok(Vec::new()) };
        let mut values = Vec::with_capacity(length);
        let mut block = vec![0; 4 * BLOCK.min(length)];
        let mut last = Instant::now();
        while values.len() < length {
            let bytes = 4 * BLOCK.min(length - values.len());
            let mut done = 0;
            while done < bytes {
                match stream.read(&mut block[done..bytes]) {
                    Ok(0) => return Err(Broken::Closed(peer)),
                    Ok(count) => (done, last) = (done + count, Instant::now()),
                    Err(error) => pause(&error, peer, last, patience)?,
                }
                if !alive() {
                    return Err(Broken::Told);
                }
            }
            values.extend(block[..bytes].chunks_exact(4).map(number));
        }
        Ok(values)
    }

    fn write(&self, peer: usize, values: &[f32], patience: Duration, alive: &dyn Fn() -> bool) -> Result<(), Broken> {
        let Some(mut stream) = self.peers[peer].as_ref() else { return Ok(()) };
        let mut last = Instant::now();
        for block in values.chunks(BLOCK) {
            let bytes = to_bytes(block);
            let mut done = 0;
            while done < bytes.len() {
                match stream.write(&bytes[done..]) {
                    Ok(0) => return Err(Broken::Closed(peer)),
                    Ok(count) => (done, last) = (done + count, Instant::now()),
                    Err(error) => pause(&error, peer, last, patience)?,
                }
                if !alive() {
                    return Err(Broken::Told);
                }
            }
        }
        Ok(())
    }
}

/// Whether a read or write that failed may be tried again.
fn pause(error: &std::io::Error, peer: usize, last: Instant, patience: Duration) -> Result<(), Broken> {
    match error.kind() {
        ErrorKind::Interrupted => Ok(()),
        ErrorKind::WouldBlock | ErrorKind::TimedOut if last.elapsed() < patience => Ok(()),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Err(Broken::Silent(peer)),
        _ => Err(Broken::Closed(peer)),
    }
}

fn ready(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SLICE))?;
    stream.set_write_timeout(Some(SLICE))
}

/// The rank at the other end of an accepted connection, if it is one of ours.
fn recognize(mut stream: TcpStream, token: u64) -> Option<(usize, TcpStream)> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(CONNECT)).ok()?;
    let mut words = [0; MAGIC.len() + 16];
    stream.read_exact(&mut words).ok()?;
    let (magic, numbers) = words.split_at(MAGIC.len());
    let (theirs, rank) = numbers.split_at(8);
    if magic != MAGIC || theirs != token.to_le_bytes() {
        return None;
    }
    ready(&stream).ok()?;
    Some((u64::from_le_bytes(rank.try_into().ok()?) as usize, stream))
}

/// The part of a buffer of `elements` numbers that rank `owner` of `world_size` adds up.
fn stretch(elements: usize, world_size: usize, owner: usize) -> Range<usize> {
    // In u128: a product of two usize need not fit into one.
    let bound = |rank: usize| (elements as u128 * rank as u128 / world_size as u128) as usize;
    bound(owner)..bound(owner + 1)
}

/// Little-endian bytes of `values`.
pub(crate) fn to_bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; 4 * values.len()];
    bytes.chunks_exact_mut(4).zip(values).for_each(|(four, value)| four.copy_from_slice(&value.to_le_bytes()));
    bytes
}

/// The values whose little-endian bytes these are.
pub(crate) fn from_bytes(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(number).collect()
}

fn number(bytes: &[u8]) -> f32 {
    f32::from_le_bytes(bytes.try_into().expect("chunks of 4"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_cover_a_buffer_once() {
        for (elements, world_size) in [(0, 3), (1, 4), (7, 3), (4097, 4), (100, 1)] {
            let all: Vec<usize> = (0..world_size).flat_map(|rank| stretch(elements, world_size, rank)).collect();
            assert_eq!(all, (0..elements).collect::<Vec<_>>(), "{elements} over {world_size}");
        }
    }
}
