//! The members of a tar shard, by walking its headers: one read for a member's header and the first bytes of its
//! content, the rest is skipped. ustar, GNU long names and pax paths and sizes are understood.

use storage::RangeReader;

use super::head::FIRST;

const BLOCK: u64 = 512;
/// Longest name record that is believed.
const LONGEST_NAME: u64 = 1 << 16;

/// A file inside a shard.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Its path, as written.
    pub name: String,
    /// Place of its first byte in the shard.
    pub offset: u64,
    /// Its length.
    pub len: u64,
    /// Its first bytes.
    pub first: Vec<u8>,
}

/// Calls `each` for every file of a shard, in order; the reader is lent for more of its content. Gives what is wrong with
/// the shard, if anything is: what came before that is good.
///
/// # Errors
/// [`storage::Error`] if it cannot be read, and those of `each`.
pub(super) fn walk<E: From<storage::Error>>(
    reader: &mut RangeReader,
    mut each: impl FnMut(Member, &mut RangeReader) -> Result<(), E>,
) -> Result<Option<String>, E> {
    let mut at = 0;
    let (mut long_name, mut pax) = (None, Pax::default());
    loop {
        let mut bytes = reader.read_up_to(at, BLOCK as usize + FIRST)?;
        if bytes.is_empty() {
            // Many writers leave the end mark out.
            return Ok(None);
        }
        if bytes.len() < BLOCK as usize {
            return Ok(Some(format!("it is cut inside the header at byte {at}")));
        }
        let mut first = bytes.split_off(BLOCK as usize);
        if bytes.iter().all(|&b| b == 0) {
            return Ok(None);
        }
        let header = tar::Header::from_byte_slice(&bytes);
        let sum: u32 = bytes.iter().enumerate().map(|(i, &b)| if (148..156).contains(&i) { 32 } else { u32::from(b) }).sum();
        let (Ok(mut len), true) = (header.entry_size(), header.cksum().is_ok_and(|c| c == sum)) else {
            return Ok(Some(format!("there is no tar header at byte {at}")));
        };
        let kind = header.entry_type();
        let offset = at + BLOCK;
        let is_record =
            kind.is_gnu_longname() || kind.is_gnu_longlink() || kind.is_pax_local_extensions() || kind.is_pax_global_extensions();
        if !is_record {
            len = pax.size.unwrap_or(len);
        }
        let Some(end) = offset.checked_add(len).filter(|&end| end <= reader.file_len()) else {
            return Ok(Some(format!("it is cut inside the member at byte {at}")));
        };
        if is_record {
            let record = if len <= LONGEST_NAME { reader.read(offset, len as usize)? } else { Vec::new() };
            if kind.is_gnu_longname() {
                long_name = Some(text(record.split(|&b| b == 0).next().unwrap_or_default()));
            } else if kind.is_pax_local_extensions() {
                pax = Pax::parse(&record);
            }
        } else {
            let name = pax.path.take().or(long_name.take()).unwrap_or_else(|| text(&header.path_bytes()));
            (long_name, pax) = (None, Pax::default());
            if kind.is_file() {
                first.truncate(usize::try_from(len).unwrap_or(usize::MAX));
                each(Member { name, offset, len, first }, reader)?;
            }
        }
        at = end.div_ceil(BLOCK) * BLOCK;
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What pax records say of the next member.
#[derive(Default)]
struct Pax {
    path: Option<String>,
    size: Option<u64>,
}

impl Pax {
    /// Records are `length key=value` and a line end, the length counting all of it.
    fn parse(mut bytes: &[u8]) -> Self {
        let mut pax = Self::default();
        while let Some(blank) = bytes.iter().position(|&b| b == b' ') {
            let length = std::str::from_utf8(&bytes[..blank]).ok().and_then(|n| n.parse::<usize>().ok());
            let Some(record) = length.and_then(|n| bytes.get(blank + 1..n.checked_sub(1)?)) else { break };
            let Some(equals) = record.iter().position(|&b| b == b'=') else { break };
            match (&record[..equals], &record[equals + 1..]) {
                (b"path", value) => pax.path = Some(text(value)),
                (b"size", value) => pax.size = text(value).parse().ok(),
                _ => {}
            }
            bytes = &bytes[blank + record.len() + 2..];
        }
        pax
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, name, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn read(bytes: &[u8]) -> (Vec<Member>, Option<String>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        storage::write_whole(&path, bytes).unwrap();
        let mut members = Vec::new();
        let problem = walk::<storage::Error>(&mut RangeReader::open(&path).unwrap(), |member, _| {
            members.push(member);
            Ok(())
        });
        (members, problem.unwrap())
    }

    #[test]
    fn members_lie_where_they_are_said_to_lie() {
        let long = format!("{}/x.txt", "d".repeat(150));
        let big = vec![7; 10_000];
        let bytes = shard(&[("a.txt", b"one"), (&long, b"two"), ("empty", b""), ("big", &big)]);
        let (members, problem) = read(&bytes);
        assert_eq!(problem, None);
        assert_eq!(members.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["a.txt", &long, "empty", "big"]);
        for (member, content) in members.iter().zip([b"one".as_slice(), b"two", b"", &big]) {
            let at = member.offset as usize;
            assert_eq!(&bytes[at..at + member.len as usize], content, "{}", member.name);
            assert!(content.starts_with(&member.first) && member.first.len() == content.len().min(FIRST));
        }
    }

    #[test]
    fn pax_paths_and_sizes() {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_pax_extensions([("path", b"p/\xc3\xa9.png".as_slice()), ("size", b"3")]).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_size(0);
        header.set_cksum();
        header.set_path("short").unwrap();
        header.set_cksum();
        let mut bytes = builder.into_inner().unwrap();
        // The builder's end mark goes; the member's own size field says 0, the record says 3.
        bytes.truncate(bytes.len() - 1024);
        bytes.extend(header.as_bytes());
        bytes.extend([b"abc".as_slice(), &[0; 509]].concat());
        let (members, problem) = read(&bytes);
        assert_eq!((members.len(), problem), (1, None));
        assert_eq!((members[0].name.as_str(), members[0].first.as_slice()), ("p/é.png", b"abc".as_slice()));
    }

    #[test]
    fn cut_and_foreign_shards_are_named() {
        let bytes = shard(&[("a", &[1; 600]), ("b", &[2; 600])]);
        let problem = |bytes: &[u8]| read(bytes).1.unwrap_or_default();
        assert_eq!(problem(&bytes[..700]), "it is cut inside the member at byte 0");
        assert_eq!(problem(&bytes[..1536 + 100]), "it is cut inside the header at byte 1536");
        assert_eq!((read(&bytes[..1536]).0.len(), problem(&bytes[..1536])), (1, String::new()));
        assert_eq!(problem(&[b'x'; 2000]), "there is no tar header at byte 0");
        assert_eq!(problem(&[&bytes[..1536], &[b'x'; 600]].concat()), "there is no tar header at byte 1536");
        assert_eq!(problem(b""), "");
    }
}
