//! Whole-or-absent writes, appends, folders and hashes: one test for each way to be broken, messages included.
#![allow(clippy::disallowed_methods)]

use std::error::Error as _;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use storage::{Error, Result};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    storage::list_dir(folder).unwrap().iter().map(|p| p.file_name().unwrap().to_str().unwrap().into()).collect()
}

#[test]
fn a_written_file_is_whole_and_leaves_no_scratch() {
    let dir = folder();
    let path = dir.path().join("a.bin");
    storage::write_whole(&path, b"one").unwrap();
    storage::write_whole(&path, b"second").unwrap();
    assert_eq!(storage::read(&path).unwrap(), b"second");
    assert_eq!(names(dir.path()), ["a.bin"]);
}

#[test]
fn a_returned_error_leaves_the_old_file_and_no_scratch() {
    let dir = folder();
    let path = dir.path().join("a.bin");
    storage::write_whole(&path, b"old").unwrap();
    let error = storage::write_whole_with(&path, |out| {
        out.write_all(&[7; 3 << 20])?;
        Err(io::Error::other("source went away"))
    })
    .unwrap_err();
    assert_eq!(error.to_string(), format!("cannot write `{}`", path.display()));
    assert_eq!(error.source().unwrap().to_string(), "source went away");
    assert_eq!(storage::read(&path).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["a.bin"]);
}

#[test]
fn a_panic_leaves_the_old_file_and_no_scratch() {
    let dir = folder();
    let path = dir.path().join("a.bin");
    storage::write_whole(&path, b"old").unwrap();
    let caught = std::panic::catch_unwind(|| {
        storage::write_whole_with(&path, |out| {
            out.write_all(&[7; 3 << 20])?;
            panic!("in the middle")
        })
    });
    assert!(caught.is_err());
    assert_eq!(storage::read(&path).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["a.bin"]);
    storage::write_whole(&path, b"new").unwrap();
    assert_eq!(storage::read(&path).unwrap(), b"new");
}

/// Not a test of its own: `a_kill_leaves_the_old_file` runs it in a process that it kills.
#[test]
fn child_writes_half_and_waits() {
    let Some(path) = std::env::var_os("STORAGE_TEST_HALF").map(PathBuf::from) else { return };
    let _ = storage::write_whole_with(&path, |out| {
        out.write_all(&[7; 3 << 20])?;
        println!("half");
        io::stdout().flush()?;
        loop {
            std::thread::park();
        }
    });
}

#[test]
fn a_kill_leaves_the_old_file_and_a_scratch_that_does_not_disturb() {
    let dir = folder();
    let path = dir.path().join("a.bin");
    storage::write_whole(&path, b"old").unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_writes_half_and_waits", "--nocapture"])
        .env("STORAGE_TEST_HALF", &path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for(child.stdout.as_mut().unwrap(), "half");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(storage::read(&path).unwrap(), b"old");
    let left: Vec<_> = storage::list_dir(dir.path()).unwrap().into_iter().filter(|p| storage::is_scratch(p)).collect();
    assert_eq!(left, [dir.path().join(format!(".a.bin.tmp-{}", child.id()))]);
    storage::write_whole(&path, b"new").unwrap();
    assert_eq!(storage::read(&path).unwrap(), b"new");
}

fn wait_for(out: &mut impl Read, word: &str) {
    let mut seen = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&seen).contains(word) {
        assert_eq!(out.read(&mut byte).unwrap(), 1, "the child ended early: {}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
}

/// A process of the same number (in containers it is often 1) may have left its scratch file.
#[test]
fn a_stale_scratch_of_the_same_pid_is_taken_over() {
    let dir = folder();
    let path = dir.path().join("a.bin");
    fs::write(dir.path().join(format!(".a.bin.tmp-{}", std::process::id())), [1; 100]).unwrap();
    storage::write_whole(&path, b"new").unwrap();
    assert_eq!(storage::read(&path).unwrap(), b"new");
    assert_eq!(names(dir.path()), ["a.bin"]);
}

#[test]
fn threads_that_write_one_target_take_turns() {
    let dir = folder();
    let path = dir.path().join("a.bin");
    std::thread::scope(|scope| {
        for value in 0..8u8 {
            let path = &path;
            scope.spawn(move || {
                for _ in 0..5 {
                    storage::write_whole(path, &vec![value; 200_000]).unwrap();
                }
            });
        }
        for _ in 0..50 {
            if let Ok(bytes) = storage::read(&path) {
                assert_eq!(bytes.len(), 200_000);
                assert!(bytes.iter().all(|b| *b == bytes[0]), "two writers mixed");
            }
        }
    });
    assert_eq!(names(dir.path()), ["a.bin"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_with_the_way_out() {
    let dir = folder();
    let path = dir.path().join("a.bin");
    storage::write_whole(&path, b"old").unwrap();
    let error = storage::write_whole_with(&path, |_| fs::OpenOptions::new().write(true).open("/dev/full")?.write_all(b"x")).unwrap_err();
    assert!(error.is_no_space());
    let hint = error.hint().unwrap();
    assert!(hint.starts_with("free some space on the disk that holds") && hint.contains(dir.path().to_str().unwrap()), "{hint}");
    assert_eq!(storage::read(&path).unwrap(), b"old");
    let error = storage::append_line(Path::new("/dev/full"), "{}").unwrap_err();
    assert_eq!(error.to_string(), "cannot append to `/dev/full`");
    assert!(error.is_no_space() && error.hint().is_some());
}

#[test]
fn a_permission_error_is_told_with_the_way_out() {
    // Made by hand: tests often run as root, whom no folder refuses.
    let path = folder().path().join("a.bin");
    let error = Error::Io { doing: "write", path: path.clone(), source: io::ErrorKind::PermissionDenied.into() };
    assert_eq!(error.to_string(), format!("cannot write `{}`", path.display()));
    assert!(error.hint().unwrap().contains("who owns"));
}

#[test]
fn a_missing_file_names_its_path_and_where_it_was_looked_for() {
    let error = storage::read(Path::new("no/such/file")).unwrap_err();
    assert!(error.is_not_found());
    assert_eq!(error.to_string(), "cannot read `no/such/file`");
    assert_eq!(error.path(), Path::new("no/such/file"));
    let cwd = std::env::current_dir().unwrap();
    assert!(error.hint().unwrap().contains(cwd.to_str().unwrap()));
}

#[test]
fn every_call_on_an_absent_path_names_it() {
    let dir = folder();
    let path = dir.path().join("absent/x");
    let name = path.display().to_string();
    let results: Vec<(&str, Result<()>)> = vec![
        ("read", storage::read(&path).map(drop)),
        ("read_to_string", storage::read_to_string(&path).map(drop)),
        ("write_whole", storage::write_whole(&path, b"")),
        ("append_line", storage::append_line(&path, "")),
        ("remove_file", storage::remove_file(&path)),
        ("remove_dir_all", storage::remove_dir_all(&path)),
        ("list_dir", storage::list_dir(&path).map(drop)),
        ("rename", storage::rename(&path, dir.path())),
        ("copy_whole from", storage::copy_whole(&path, &dir.path().join("to"))),
        ("sha256_file", storage::sha256_file(&path).map(drop)),
        ("blake3_file", storage::blake3_file(&path).map(drop)),
        ("lock", storage::Lock::acquire(&path).map(drop)),
        ("safetensors", storage::safetensors::SafeTensors::open(&path).map(drop)),
    ];
    for (call, result) in results {
        let error = result.expect_err(call);
        assert!(error.is_not_found() && error.to_string().contains(&name), "{call}: {error}");
    }
    assert!(names(dir.path()).is_empty());
}

#[test]
fn a_path_without_a_name_is_refused() {
    let error = storage::write_whole(Path::new("/"), b"x").unwrap_err();
    assert_eq!(error.source().unwrap().to_string(), "the path names no file");
    assert!(storage::write_whole(Path::new("a/.."), b"x").is_err());
}

#[test]
fn text_that_is_not_utf8_names_the_byte() {
    let dir = folder();
    let path = dir.path().join("caption.txt");
    fs::write(&path, b"1girl, \xff\xfe").unwrap();
    let error = storage::read_to_string(&path).unwrap_err();
    assert_eq!(error.to_string(), format!("`{}` is not UTF-8 text: byte 7 is invalid", path.display()));
    assert_eq!(error.hint().unwrap(), "save the file as UTF-8");
}

#[test]
fn appended_lines_stay_apart_from_a_torn_one() {
    let dir = folder();
    let path = dir.path().join("metrics.jsonl");
    storage::append_line(&path, "{\"step\":1}").unwrap();
    storage::append_line(&path, "{\"step\":2}").unwrap();
    assert_eq!(storage::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n");
    fs::write(&path, "{\"step\":1}\n{\"st").unwrap();
    storage::append_line(&path, "{\"step\":3}").unwrap();
    assert_eq!(storage::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"st\n{\"step\":3}\n");
}

#[test]
fn a_line_with_a_line_end_is_refused() {
    let dir = folder();
    let path = dir.path().join("metrics.jsonl");
    assert!(storage::append_line(&path, "a\nb").is_err());
    assert!(!path.exists());
}

#[test]
fn folders_are_listed_by_name_and_removed() {
    let dir = folder();
    let deep = dir.path().join("x/y");
    storage::create_dir_all(&deep).unwrap();
    storage::create_dir_all(&deep).unwrap();
    for name in ["b", "a", "B", "a1"] {
        storage::write_whole(&deep.join(name), b"").unwrap();
    }
    assert_eq!(names(&deep), ["B", "a", "a1", "b"]);
    storage::remove_file(&deep.join("a")).unwrap();
    assert_eq!(names(&deep), ["B", "a1", "b"]);
    storage::remove_dir_all(&dir.path().join("x")).unwrap();
    assert!(names(dir.path()).is_empty());
    let file = dir.path().join("file");
    storage::write_whole(&file, b"").unwrap();
    let error = storage::create_dir_all(&file.join("below")).unwrap_err();
    assert!(error.to_string().starts_with("cannot create the folder"), "{error}");
}

#[test]
fn rename_moves_between_folders_and_names_the_culprit() {
    let dir = folder();
    let (from, to) = (dir.path().join("a/f"), dir.path().join("b/g"));
    storage::create_dir_all(from.parent().unwrap()).unwrap();
    storage::write_whole(&from, b"x").unwrap();
    let error = storage::rename(&from, &to).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot rename to `{}`", to.display()));
    storage::create_dir_all(to.parent().unwrap()).unwrap();
    storage::rename(&from, &to).unwrap();
    assert_eq!(storage::read(&to).unwrap(), b"x");
    let error = storage::rename(&from, &to).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot rename `{}`", from.display()));
}

#[test]
fn a_copy_is_whole_or_absent_and_names_the_side_that_failed() {
    let dir = folder();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    storage::write_whole(&from, &bytes).unwrap();
    storage::copy_whole(&from, &to).unwrap();
    assert_eq!(storage::read(&to).unwrap(), bytes);
    // A folder opens but does not read.
    let error = storage::copy_whole(dir.path(), &dir.path().join("third")).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot read `{}`", dir.path().display()));
    let error = storage::copy_whole(&from, &dir.path().join("no/such")).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot write `{}`", dir.path().join("no/such").display()));
    assert_eq!(names(dir.path()), ["from", "to"]);
}

#[test]
fn hashes_equal_the_published_ones() {
    let dir = folder();
    let path = dir.path().join("abc");
    // SHA-256 of "abc": FIPS 180-2, appendix B.1; of a million "a": B.3.
    storage::write_whole(&path, b"abc").unwrap();
    assert_eq!(storage::sha256_file(&path).unwrap(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    storage::write_whole(&path, &[b'a'; 1_000_000]).unwrap();
    assert_eq!(storage::sha256_file(&path).unwrap(), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    // BLAKE3 of nothing: test_vectors.json of the BLAKE3 repository, input_len 0. Longer than one chunk: its own one-shot hash.
    storage::write_whole(&path, b"").unwrap();
    assert_eq!(storage::blake3_file(&path).unwrap(), "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262");
    let bytes = vec![5; 2_500_000];
    storage::write_whole(&path, &bytes).unwrap();
    assert_eq!(storage::blake3_file(&path).unwrap(), blake3::hash(&bytes).to_hex().to_string());
}

#[test]
fn scratch_names_are_told_from_others() {
    assert!(storage::is_scratch(Path::new("x/.a.bin.tmp-12")));
    for other in ["a.bin.tmp-12", ".a.bin.tmp-", ".a.bin.tmp-1x", ".a.bin", "..tmp-", ".tmp-1", "x/.."] {
        assert!(!storage::is_scratch(Path::new(other)), "{other}");
    }
}

#[test]
fn ranges_and_prefixes() {
    let dir = folder();
    let path = dir.path().join("a.bin");
    fs::write(&path, (0..=255).collect::<Vec<u8>>()).unwrap();
    assert_eq!(storage::read_range(&path, 10, 3).unwrap(), [10, 11, 12]);
    assert_eq!(storage::read_range(&path, 256, 0).unwrap(), [0u8; 0]);
    assert_eq!(storage::read_prefix(&path, 2).unwrap(), [0, 1]);
    assert_eq!(storage::read_prefix(&path, 1 << 40).unwrap().len(), 256);
    let mut reader = storage::RangeReader::open(&path).unwrap();
    assert_eq!((reader.file_len(), reader.read(255, 1).unwrap(), reader.read(0, 1).unwrap()), (256, vec![255], vec![0]));
    assert_eq!(reader.read_up_to(250, 100).unwrap().len(), 6);
    assert_eq!(reader.read_up_to(u64::MAX, 100).unwrap(), [0u8; 0]);
    assert_eq!(storage::stamp(&path).unwrap().len, 256);
}

#[test]
fn a_range_behind_the_end_names_file_and_places() {
    let dir = folder();
    let path = dir.path().join("a.bin");
    fs::write(&path, [1, 2, 3]).unwrap();
    // The length is a lie of petabytes: nothing may be allocated for it.
    for (offset, len) in [(2, 2), (3, 1), (u64::MAX, 1), (0, usize::MAX)] {
        let error = storage::read_range(&path, offset, len).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot read `{}`", path.display()));
        let cause = error.source().unwrap().to_string();
        assert!(cause.contains("it ends at byte 3") && cause.contains(&len.to_string()), "{cause}");
    }
    let absent = dir.path().join("b.bin");
    assert!(storage::read_range(&absent, 0, 1).unwrap_err().is_not_found());
    assert!(storage::stamp(&absent).unwrap_err().is_not_found());
}
