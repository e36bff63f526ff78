//! The ranks' output, cut into lines.

use std::io::{Read, Write};

/// Longer lines are passed on in pieces.
const MAX_LINE: usize = 64 << 10;

/// Where a line was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Writes `[rank 2] line` to the launcher's own stream of the same kind; the plainest `on_line`.
pub fn print_line(rank: usize, stream: Stream, line: &str) {
    let text = format!("[rank {rank}] {line}\n");
    // That nobody reads any more is no reason to stop a training.
    let _ = match stream {
        Stream::Stdout => std::io::stdout().lock().write_all(text.as_bytes()),
        Stream::Stderr => std::io::stderr().lock().write_all(text.as_bytes()),
    };
}

/// Reads to the end and gives `each` every line, without its end. Of a line that was drawn over with carriage returns,
/// as progress bars are, the last state remains.
pub(super) fn lines(mut from: impl Read, mut each: impl FnMut(String)) {
    let mut pending: Vec<u8> = Vec::new();
    let mut chunk = [0; 8192];
    loop {
        let count = match from.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        pending.extend(&chunk[..count]);
        while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
            each(shown(&pending[..end]));
            pending.drain(..=end);
        }
        if pending.len() > MAX_LINE {
            match pending.iter().rposition(|&byte| byte == b'\r') {
                Some(last) => drop(pending.drain(..=last)),
                None => {
                    each(shown(&pending));
                    pending.clear();
                }
            }
        }
    }
    if !pending.is_empty() {
        each(shown(&pending));
    }
}

fn shown(line: &[u8]) -> String {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let start = line.iter().rposition(|&byte| byte == b'\r').map_or(0, |place| place + 1);
    String::from_utf8_lossy(&line[start..]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &[u8]) -> Vec<String> {
        let mut seen = Vec::new();
        lines(text, |line| seen.push(line));
        seen
    }

    #[test]
    fn line_ends_bars_and_broken_text() {
        assert_eq!(all(b"a\n\nb\r\nlast"), ["a", "", "b", "last"]);
        assert_eq!(all(b"10%\r50%\r100%\ndone\n"), ["100%", "done"]);
        assert_eq!(all(b"\xff\n"), ["\u{fffd}"]);
        assert_eq!(all(b""), [""; 0]);
    }

    #[test]
    fn a_line_without_end_takes_no_endless_memory() {
        let pieces = all(&vec![b'x'; 3 * MAX_LINE]);
        assert!(pieces.len() >= 2 && pieces.iter().all(|piece| piece.len() <= MAX_LINE + 8192), "{}", pieces.len());
        assert_eq!(pieces.concat().len(), 3 * MAX_LINE);
        let bar = all(&b"#\r".repeat(MAX_LINE));
        assert_eq!(bar, ["#"]);
    }
}
