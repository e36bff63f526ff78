//! The lock: held once, named by pid, gone with its process.
#![allow(clippy::disallowed_methods)]

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use storage::{Error, Lock};

#[test]
fn a_held_lock_names_its_holder() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    let lock = Lock::acquire(&path).unwrap();
    let error = Lock::acquire(&path).unwrap_err();
    let pid = std::process::id();
    assert!(matches!(error, Error::Locked { pid: Some(p), .. } if p == pid), "{error:?}");
    assert_eq!(error.to_string(), format!("`{}` is locked by process {pid}", path.display()));
    assert_eq!(error.hint().unwrap(), format!("wait until process {pid} ends, or stop it"));
    drop(lock);
    Lock::acquire(&path).unwrap();
}

#[test]
fn a_lock_file_of_other_content_is_taken_and_rewritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    std::fs::write(&path, vec![b'9'; 1000]).unwrap();
    let _lock = Lock::acquire(&path).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
}

#[test]
fn a_holder_that_cannot_be_read_is_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    let _lock = Lock::acquire(&path).unwrap();
    std::fs::write(&path, "none").unwrap();
    let error = Lock::acquire(&path).unwrap_err();
    assert_eq!(error.to_string(), format!("`{}` is locked by another process", path.display()));
}

/// Not a test of its own: `a_killed_process_holds_no_lock` runs it in a process that it kills.
#[test]
fn child_holds_the_lock() {
    let Some(path) = std::env::var_os("STORAGE_TEST_LOCK").map(PathBuf::from) else { return };
    let _lock = Lock::acquire(&path).unwrap();
    println!("held");
    std::io::stdout().flush().unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
fn a_killed_process_holds_no_lock() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_holds_the_lock", "--nocapture"])
        .env("STORAGE_TEST_LOCK", &path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = child.stdout.as_mut().unwrap();
    let (mut seen, mut byte) = (Vec::new(), [0]);
    while !seen.ends_with(b"held") {
        assert_eq!(out.read(&mut byte).unwrap(), 1, "the child ended early");
        seen.push(byte[0]);
    }
    let error = Lock::acquire(&path).unwrap_err();
    assert!(matches!(error, Error::Locked { pid: Some(p), .. } if p == child.id()), "{error:?}");
    child.kill().unwrap();
    child.wait().unwrap();
    Lock::acquire(&path).unwrap();
}
