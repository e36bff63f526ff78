//! Hostile safetensors files: every file of `fuzz/corpus/safetensors`, and mutations of each. An error or a file that can be read, never a
//! panic, and never more memory than a small multiple of the file, whatever sizes it speaks of.
//!
//! `LOKR_FUZZ_ROUNDS` sets the mutations per file (default 60), `LOKR_FUZZ_SEED` the seed; a run with more is a fuzzing run.

#![allow(clippy::disallowed_methods)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use storage::safetensors::SafeTensors;

/// The system's allocator with a count of what is allocated now, and of the most that ever was.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a file may cost: a header's tensors take about 200 bytes each, of at least 40 bytes of text; an error may quote a shape.
fn allowed(file_len: usize) -> usize {
    (64 << 10) + 16 * file_len
}

/// Opens a file and touches all of it; gives whether it opened.
fn open(path: &Path, what: &dyn std::fmt::Display) -> bool {
    let len = std::fs::metadata(path).expect("it is there").len() as usize;
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let opened = SafeTensors::open(path);
    let used = PEAK.load(Ordering::Relaxed) - before;
    assert!(used <= allowed(len), "{what}: {used} bytes of memory for a file of {len}");
    match opened {
        Ok(file) => {
            let names: Vec<&str> = file.names().collect();
            let data: usize = names.iter().map(|n| file.bytes(n).expect("it is listed").len()).sum();
            assert_eq!(data, file.data_section().len(), "{what}: the tensors fill the data");
            assert!(names.iter().all(|n| file.info(n).is_some()), "{what}");
            true
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains(&path.display().to_string()), "{what}: the error names no file: {text}");
            assert!(error.hint().is_some(), "{what}: no way out: {text}");
            false
        }
    }
}

fn corpus() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/safetensors");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).expect("the corpus").map(|e| e.expect("an entry").path()).collect();
    files.sort();
    files
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end.max(1) as u64) as usize
    }
}

/// Numbers at which sizes and offsets go wrong.
const NUMBERS: [&str; 9] =
    ["0", "1", "8", "4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551615", "-1", "1e300"];

/// One to three changes: a bit, a byte, a cut, a repetition, a number of the header, the header's length.
fn mutated(good: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len());
        match random.below(7) {
            _ if bytes.is_empty() => bytes.push(random.below(256) as u8),
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.below(256) as u8,
            2 => bytes.truncate(at),
            3 => {
                let end = (at + 1 + random.below(60)).min(bytes.len());
                let piece = bytes[at..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, piece);
                fit_length(&mut bytes);
            }
            4 | 5 => {
                // The first number after a random place.
                let Some(start) = (at.max(8)..bytes.len()).find(|&i| bytes[i].is_ascii_digit()) else { continue };
                let end = (start..bytes.len()).find(|&i| !bytes[i].is_ascii_digit()).unwrap_or(bytes.len());
                let (old, new) = (end - start, NUMBERS[random.below(NUMBERS.len())]);
                bytes.splice(start..end, new.bytes());
                if let Some(length) = header_length(&bytes) {
                    set_length(&mut bytes, (length + new.len() as u64).wrapping_sub(old as u64));
                }
            }
            _ => set_length(&mut bytes, [0, 1, 7, 1 << 32, 1 << 63, u64::MAX, 99_999_999][random.below(7)]),
        }
    }
    bytes
}

fn header_length(bytes: &[u8]) -> Option<u64> {
    bytes.first_chunk::<8>().map(|b| u64::from_le_bytes(*b))
}

fn set_length(bytes: &mut [u8], length: u64) {
    if let Some(start) = bytes.first_chunk_mut::<8>() {
        *start = length.to_le_bytes();
    }
}

/// Lets the header end where its last brace stands, so that changes of its text reach the parser of its entries.
fn fit_length(bytes: &mut [u8]) {
    if let Some(end) = bytes.iter().rposition(|b| *b == b'}').filter(|&end| end >= 8) {
        set_length(bytes, end as u64 + 1 - 8);
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{variable}={v} is no number")))
}

/// One test, so that nothing else allocates while it counts.
#[test]
fn hostile_files_give_errors_and_cost_little() {
    let (rounds, seed) = (number("LOKR_FUZZ_ROUNDS", 60), number("LOKR_FUZZ_SEED", 1));
    let files = corpus();
    assert!(files.len() >= 38, "the corpus is there");
    for path in &files {
        let name = path.file_name().expect("a name").to_string_lossy();
        assert_eq!(open(path, &name), name.starts_with("good-"), "{name}");
    }
    let (folder, mut random, mut opened) = (tempfile::tempdir().expect("a folder"), Random(seed), 0);
    let target = folder.path().join("mutated.safetensors");
    for path in &files {
        let good = std::fs::read(path).expect("read");
        for round in 0..rounds {
            let bytes = mutated(&good, &mut random);
            std::fs::write(&target, &bytes).expect("written");
            let what = format!("seed {seed}, {} round {round}", path.display());
            opened += u64::from(open(&target, &what));
        }
    }
    let all = rounds * files.len() as u64;
    println!("{} files, {all} mutations: {opened} opened, {} refused, 0 panics", files.len(), all - opened);
    assert!(rounds < 50 || (opened > 0 && opened < all), "mutations reach both outcomes: {opened} of {all}");
}
