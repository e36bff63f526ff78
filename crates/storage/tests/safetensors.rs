//! Safetensors: what is written is read back, also by the reference crate; every broken header is a clear error.
#![allow(clippy::disallowed_methods)]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use storage::safetensors::{Dtype, SafeTensors, TensorSource, write};
use storage::{Error, Result};

fn source<'a>(name: &str, dtype: Dtype, shape: &[usize], bytes: &'a [u8]) -> TensorSource<'a> {
    TensorSource { name: name.into(), dtype, shape: shape.into(), data: Box::new(move || Cow::Borrowed(bytes)) }
}

fn file_with(dir: &Path, bytes: &[u8]) -> PathBuf {
    let path = dir.join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Opens a file made of this header and `data` zero bytes.
fn open(header: &str, data: usize) -> Result<SafeTensors> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    open_bytes(&bytes)
}

fn open_bytes(bytes: &[u8]) -> Result<SafeTensors> {
    let dir = tempfile::tempdir().unwrap();
    let result = SafeTensors::open(&file_with(dir.path(), bytes));
    if let Err(error) = &result {
        assert!(error.to_string().contains(dir.path().to_str().unwrap()), "the error does not name the path: {error}");
    }
    result
}

#[track_caller]
fn refused(result: Result<SafeTensors>, says: &str) {
    match result {
        Err(error @ Error::Header { .. }) => {
            assert!(error.to_string().contains(says), "`{error}` does not say `{says}`");
            assert!(error.hint().is_some());
        }
        other => panic!("expected a header error that says `{says}`, got {other:?}"),
    }
}

/// Bytes that are handed out live longer than the file's handle, and longer than its name.
#[test]
fn shared_bytes_keep_the_map() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, vec![source("a", Dtype::U8, &[2], &[1, 2]), source("b", Dtype::U8, &[3], &[3, 4, 5])], &BTreeMap::new()).unwrap();
    let file = SafeTensors::open(&path).unwrap();
    let (a, b) = (file.shared("a").unwrap(), file.shared("b").unwrap());
    assert!(file.shared("c").is_none());
    drop(file);
    std::fs::remove_file(&path).unwrap();
    assert_eq!((&a[..], &b[..]), (&[1u8, 2][..], &[3u8, 4, 5][..]));
}

/// Writing into the file is noticed, once; a file that another one replaces is as it was.
#[test]
fn a_file_that_is_written_to_has_changed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let tensors = || vec![source("a", Dtype::U8, &[2], &[1, 2])];
    write(&path, tensors(), &BTreeMap::new()).unwrap();
    let file = SafeTensors::open(&path).unwrap();
    assert!(file.unchanged().unwrap());
    write(&path, tensors(), &BTreeMap::new()).unwrap();
    assert!(file.unchanged().unwrap(), "replaced by rename");

    let file = SafeTensors::open(&path).unwrap();
    let earlier = std::time::SystemTime::now() - std::time::Duration::from_secs(9);
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(earlier).unwrap();
    assert!(!file.unchanged().unwrap());
    assert!(file.unchanged().unwrap(), "told once");
}

#[test]
fn what_is_written_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let metadata = BTreeMap::from([("ss_a".into(), "x \"quoted\"\n".into()), ("b".into(), "日本".into())]);
    let tensors = vec![
        source("z", Dtype::F32, &[2], &[1, 2, 3, 4, 5, 6, 7, 8]),
        source("empty", Dtype::F16, &[0, 3], &[]),
        source("scalar", Dtype::U8, &[], &[9]),
        source("a \"b\"", Dtype::U8, &[1, 2], &[10, 11]),
    ];
    write(&path, tensors, &metadata).unwrap();
    let file = SafeTensors::open(&path).unwrap();
    assert_eq!(file.path(), path);
    assert_eq!(file.names().collect::<Vec<_>>(), ["a \"b\"", "empty", "scalar", "z"]);
    assert_eq!(file.metadata(), &metadata);
    assert_eq!(file.info("empty").unwrap().shape, [0, 3]);
    assert_eq!(file.info("z").unwrap().dtype, Dtype::F32);
    assert_eq!(file.bytes("z").unwrap(), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(file.bytes("scalar").unwrap(), [9]);
    assert!(file.bytes("empty").unwrap().is_empty());
    assert!(file.bytes("none").is_none() && file.info("none").is_none());
    // Widest type first, then by name.
    assert_eq!(file.data_section(), [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 9]);
    let copy = file.clone();
    drop(file);
    assert_eq!(copy.bytes("scalar").unwrap(), [9]);
}

#[test]
fn a_file_equals_the_reference_crates() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let values: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = vec![
        ("b.weight".into(), Dtype::F16, vec![2, 2], (0..8).collect()),
        ("a.weight".into(), Dtype::F32, vec![1, 3], (0..12).collect()),
        ("c".into(), Dtype::I64, vec![1], (0..8).collect()),
        ("a.bias".into(), Dtype::F16, vec![1], (0..2).collect()),
    ];
    write(
        &path,
        values.iter().map(|(n, d, s, b)| source(n, *d, s, b)).collect(),
        &BTreeMap::from([("format".to_string(), "pt".to_string())]),
    )
    .unwrap();
    let views = values.iter().map(|(n, d, s, b)| (n.clone(), safetensors::tensor::TensorView::new(*d, s.clone(), b).unwrap()));
    let expected = safetensors::serialize(views, Some([("format".to_string(), "pt".to_string())].into())).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), expected);
}

#[test]
fn a_header_is_padded_to_eight_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    for name in ["a", "ab", "abc", "abcd", "abcde"] {
        write(&path, vec![source(name, Dtype::U8, &[1], &[1])], &BTreeMap::new()).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes[0] % 8, 0);
        assert_eq!(SafeTensors::open(&path).unwrap().bytes(name).unwrap(), [1]);
    }
    write(&path, vec![], &BTreeMap::new()).unwrap();
    assert_eq!(SafeTensors::open(&path).unwrap().names().count(), 0);
}

#[test]
fn data_is_asked_for_once_and_only_at_its_turn() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let turn = AtomicUsize::new(0);
    let tensors = (0..5usize)
        .rev()
        .map(|i| {
            let turn = &turn;
            let data = Box::new(move || {
                assert_eq!(turn.fetch_add(1, Ordering::SeqCst), i);
                Cow::Owned(vec![i as u8; 4])
            });
            TensorSource { name: format!("t{i}"), dtype: Dtype::F32, shape: vec![1], data }
        })
        .collect();
    write(&path, tensors, &BTreeMap::new()).unwrap();
    assert_eq!(turn.into_inner(), 5);
}

#[test]
fn a_source_of_wrong_length_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = file_with(dir.path(), b"old");
    let error = write(&path, vec![source("w", Dtype::F32, &[2], &[0; 7])], &BTreeMap::new()).unwrap_err();
    let text = format!("cannot write the safetensors file `{}`: tensor `w` gives 7 bytes; F32 [2] wants 8", path.display());
    assert_eq!(error.to_string(), text);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(storage::list_dir(dir.path()).unwrap(), [path]);
}

#[test]
fn tensors_that_make_no_file_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let cases = [
        (vec![source("w", Dtype::U8, &[1], &[0]), source("w", Dtype::F32, &[0], &[])], "two tensors are called `w`"),
        (vec![source("__metadata__", Dtype::U8, &[1], &[0])], "cannot be called `__metadata__`"),
        (vec![source("w", Dtype::F32, &[1 << 40, 1 << 40], &[])], "below 2^64"),
        (vec![source("a", Dtype::U8, &[usize::MAX / 8], &[]), source("b", Dtype::F4, &[3], &[])], "no whole number of bytes"),
    ];
    for (tensors, says) in cases {
        let error = write(&path, tensors, &BTreeMap::new()).unwrap_err();
        assert!(matches!(error, Error::Layout { .. }) && error.to_string().contains(says), "{error}");
    }
    assert!(storage::list_dir(dir.path()).unwrap().is_empty());
}

#[test]
fn an_empty_file_is_refused() {
    refused(open_bytes(b""), "the file is empty");
}

#[test]
fn a_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = SafeTensors::open(dir.path()).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot read `{}`", dir.path().display()));
}

#[test]
fn a_length_that_is_cut_is_refused() {
    refused(open_bytes(&[1, 0, 0]), "it has 3 bytes; the header's length alone takes 8");
}

#[test]
fn a_header_length_past_the_end_is_refused() {
    refused(open_bytes(&[[200, 0, 0, 0, 0, 0, 0, 0].as_slice(), b"{}"].concat()), "declares a header of 200 bytes, 2 follow");
}

#[test]
fn a_header_over_100_mb_is_refused() {
    for declared in [100_000_001u64, 1 << 63, u64::MAX] {
        let says = format!("declares a header of {declared} bytes; the format allows 100000000");
        refused(open_bytes(&[declared.to_le_bytes().as_slice(), b"{}"].concat()), &says);
    }
}

#[test]
fn a_header_that_is_not_utf8_is_refused() {
    refused(open_bytes(&[[3, 0, 0, 0, 0, 0, 0, 0].as_slice(), b"{\xff}"].concat()), "header byte 1 is not UTF-8");
}

#[test]
fn bad_json_is_refused() {
    for header in ["", "{", "[]", "{\"a\":1}", "{\"a\":{}}", "{} {}", "null", "\"x\"", "{\"a\":{\"dtype\":\"F32\"}}"] {
        refused(open(header, 0), "the header cannot be read");
    }
    refused(open(&"[".repeat(100_000), 0), "the header cannot be read");
    refused(open(&"{\"a\":".repeat(100_000), 0), "the header cannot be read");
}

#[test]
fn a_tensors_bad_field_names_the_tensor() {
    for entry in [
        r#"{"dtype":"F33","shape":[],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","shape":[1],"data_offsets":[0]}"#,
        r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}"#,
        r#"{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}"#,
        r#"{"dtype":"F32","data_offsets":[0,4]}"#,
    ] {
        refused(open(&format!("{{\"unet.w\":{entry}}}"), 4), "tensor `unet.w`: ");
    }
}

#[test]
fn repeated_keys_are_refused() {
    let w = r#""w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    refused(open(&format!("{{{w},{w}}}"), 1), "tensor `w` appears twice");
    refused(open(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), "`__metadata__` appears twice");
    refused(open(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0), "metadata key `k` appears twice");
}

#[test]
fn metadata_that_is_not_text_is_refused() {
    refused(open(r#"{"__metadata__":{"k":1}}"#, 0), "the header cannot be read");
    refused(open(r#"{"__metadata__":[]}"#, 0), "an object of strings");
    assert!(open(r#"{"__metadata__":null}"#, 0).unwrap().metadata().is_empty());
}

#[test]
fn overlapping_tensors_are_refused() {
    let header = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
    refused(open(header, 6), "tensors `a` and `b` overlap: one ends at byte 4, the other starts at 2");
    let header = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
    refused(open(header, 4), "tensors `a` and `b` overlap");
}

#[test]
fn a_gap_is_refused() {
    let header = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2],"data_offsets":[6,8]}}"#;
    refused(open(header, 8), "bytes 4..6, before tensor `b`, belong to no tensor");
    refused(open(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[1,5]}}"#, 5), "bytes 0..1, before tensor `a`");
}

#[test]
fn a_place_that_does_not_fit_the_shape_is_refused() {
    refused(open(r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,20]}}"#, 20), "tensor `a` takes 20 bytes; F32 [2, 3] wants 24");
    refused(open(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}"#, 4), "tensor `a` ends at byte 0, before its start 4");
}

#[test]
fn sizes_that_overflow_are_refused() {
    let big = 1u64 << 63;
    for (shape, end) in [
        (format!("[{big}]"), "0".to_string()),
        (format!("[{big},2]"), "0".to_string()),
        ("[4294967296,4294967296,4294967296]".to_string(), "0".to_string()),
        (format!("[{big},0]"), "18446744073709551615".to_string()),
    ] {
        refused(open(&format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#), 0), "tensor `a`");
    }
    let place = format!(r#"{{"a":{{"dtype":"U8","shape":[{big}],"data_offsets":[0,{big}]}}}}"#);
    refused(open(&place, 0), "tensor `a`");
    let place = format!(r#"{{"a":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}}}}"#, 1u64 << 60);
    refused(open(&place, 0), "it is cut short: tensor `a` ends at byte 1152921504606846976 of the data, the file holds 0");
}

#[test]
fn sub_byte_elements_that_fill_no_byte_are_refused() {
    refused(open(r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#, 2), "no whole number of bytes");
    assert_eq!(open(r#"{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}"#, 2).unwrap().bytes("a").unwrap().len(), 2);
}

#[test]
fn a_file_cut_in_its_data_is_refused() {
    let header = r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#;
    refused(open(header, 7), "it is cut short: tensor `a` ends at byte 8 of the data, the file holds 7");
    refused(open(header, 9), "1 bytes follow the last tensor");
    assert!(open(header, 8).is_ok());
}

#[test]
fn other_kinds_of_file_are_told_by_name() {
    for (start, what) in [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:".as_slice(), "a git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04\x00\x00\x08\x08", "a pickled PyTorch file or an archive"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    ] {
        let error = open_bytes(&[start, &[b' '; 200]].concat()).unwrap_err();
        assert!(matches!(error, Error::NotSafetensors { .. }) && error.to_string().contains(what), "{error}");
        assert!(error.hint().is_some());
    }
}

proptest! {
    /// Whatever the bytes: an error or a file that can be read, never a panic.
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        touch(open_bytes(&bytes));
    }

    /// A good file with some bytes changed and some cut: an error, or a file of which every tensor can be read.
    #[test]
    fn a_damaged_file_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), cut in 0usize..20) {
        let header = concat!(r#"{"__metadata__":{"k":"v"},"a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},"#,
            r#""b":{"dtype":"U8","shape":[4],"data_offsets":[8,12]}}"#);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&[0; 12]);
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        bytes.truncate(bytes.len() - cut);
        touch(open_bytes(&bytes));
    }

    /// Any set of tensors comes back bit for bit.
    #[test]
    fn any_tensors_come_back(tensors in prop::collection::btree_map("[a-zA-Z0-9._\"\\\\é]{1,12}", prop::collection::vec(any::<u16>(), 0..40), 0..12)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let bytes: BTreeMap<_, Vec<u8>> = tensors.iter().map(|(n, v)| (n, v.iter().flat_map(|x| x.to_le_bytes()).collect())).collect();
        write(&path, bytes.iter().map(|(n, b)| source(n, Dtype::U16, &[b.len() / 2], b)).collect(), &BTreeMap::new()).unwrap();
        let file = SafeTensors::open(&path).unwrap();
        prop_assert_eq!(file.names().count(), tensors.len());
        for (name, bytes) in bytes {
            prop_assert_eq!(file.bytes(name).unwrap(), bytes.as_slice());
        }
    }
}

fn touch(result: Result<SafeTensors>) {
    if let Ok(file) = result {
        for name in file.names() {
            assert!(file.info(name).is_some() && file.bytes(name).is_some());
        }
    }
}
