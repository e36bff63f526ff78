//! Posts in parquet files: what other programs write (golden, by pyarrow), what is broken or of a wrong type, builds that stop.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use dataset::Error;
use dataset::index::{self, BuildOptions, BuildReport, Ids, Index, Source};
use parquet::basic::Compression;
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

fn build(index: &Path, file: &Path) -> dataset::Result<BuildReport> {
    let options = BuildOptions { index: index.into(), sources: vec![Source::detect(file)?], ids: Ids::Auto, threads: 2 };
    index::build(&options, &mut |_| ControlFlow::Continue(()))
}

/// Everything that an index knows of its posts.
fn contents(path: &Path) -> Vec<String> {
    let index = Index::open(path).unwrap();
    let names = index.tags().unwrap();
    let one = |id: u32| {
        let post = index.post(id).unwrap();
        let tags: Vec<_> = post.tags.iter().map(|&t| names.get(t).unwrap()).collect();
        format!("{:?} {tags:?} {:?}", post.row, post.caption)
    };
    index.scan(|row| Some(row.id)).unwrap().into_iter().map(one).collect()
}

/// A column of a test file.
enum Values {
    Numbers(Vec<i64>),
    Flags(Vec<bool>),
    Texts(Vec<String>),
}

/// Writes columns of one schema in groups of `rows`.
fn write(path: &Path, schema: &str, columns: &[Values], rows: usize, compression: Compression) {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer = SerializedFileWriter::new(std::fs::File::create(path).unwrap(), schema, properties).unwrap();
    let len = match &columns[0] {
        Values::Numbers(v) => v.len(),
        Values::Flags(v) => v.len(),
        Values::Texts(v) => v.len(),
    };
    for start in (0..len).step_by(rows) {
        let part = start..(start + rows).min(len);
        let mut group = writer.next_row_group().unwrap();
        for values in columns {
            let mut column = group.next_column().unwrap().unwrap();
            match values {
                Values::Numbers(v) => _ = column.typed::<Int64Type>().write_batch(&v[part.clone()], None, None).unwrap(),
                Values::Flags(v) => _ = column.typed::<BoolType>().write_batch(&v[part.clone()], None, None).unwrap(),
                Values::Texts(v) => {
                    let bytes: Vec<ByteArray> = v[part.clone()].iter().map(|t| t.as_str().into()).collect();
                    _ = column.typed::<ByteArrayType>().write_batch(&bytes, None, None).unwrap();
                }
            }
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
}

const SCHEMA: &str = "message posts {
    required int64 id; required binary rating (UTF8); required int64 fav_count; required boolean is_deleted;
    required binary tag_string_general (UTF8); required binary source (UTF8);
}";

/// Many posts in several groups, and the same as JSON lines.
fn write_posts(dir: &Path, count: i64, compression: Compression) {
    let texts = |f: &dyn Fn(i64) -> String| Values::Texts((0..count).map(f).collect());
    let tags = |i: i64| format!("solo tag_{} tag_{}", i % 97, i % 1013);
    let columns = [
        Values::Numbers((0..count).map(|i| i * 2 + 1).collect()),
        texts(&|i| ["g", "s", "q", "e"][i as usize % 4].to_string()),
        Values::Numbers((0..count).map(|i| i % 300).collect()),
        Values::Flags((0..count).map(|i| i % 50 == 0).collect()),
        texts(&tags),
        texts(&|_| "https://example.invalid/".repeat(5)),
    ];
    write(&dir.join("posts.parquet"), SCHEMA, &columns, 7000, compression);
    let line = |i: i64| {
        let rating = ["g", "s", "q", "e"][i as usize % 4];
        let (id, favourites, deleted) = (i * 2 + 1, i % 300, i % 50 == 0);
        format!(
            "{{\"id\": {id}, \"rating\": \"{rating}\", \"fav_count\": {favourites}, \"is_deleted\": {deleted}, \"tag_string_general\": \"{}\"}}\n",
            tags(i)
        )
    };
    std::fs::write(dir.join("posts.jsonl"), (0..count).map(line).collect::<String>()).unwrap();
}

/// Files of pyarrow give the index that the same posts give as JSON lines.
#[test]
fn files_of_pyarrow_are_read_as_the_same_posts_in_json() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["posts-text", "posts-typed"] {
        let at = |ending: &str| dir.path().join(format!("{name}-{ending}.sqlite"));
        let report = build(&at("parquet"), &super::own_golden(&format!("{name}.parquet"))).unwrap();
        let json = build(&at("json"), &super::own_golden(&format!("{name}.jsonl"))).unwrap();
        assert_eq!((report.changes.posts, report.changes.bad_lines.count), (60, 0));
        assert_eq!(report.summary.tagged, json.summary.tagged);
        let (ours, theirs) = (contents(&at("parquet")), contents(&at("json")));
        assert_eq!(ours, theirs);
        assert!(ours[1].contains("someone_(series)") && ours[1].contains("Sensitive"), "{}", ours[1]);
        assert_eq!(report.fingerprint, json.fingerprint);
    }
}

#[test]
fn every_compression_and_group_size_gives_the_same_posts() {
    for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(Default::default())] {
        let dir = tempfile::tempdir().unwrap();
        write_posts(dir.path(), 20_000, compression);
        let at = |name: &str| dir.path().join(name);
        let report = build(&at("p.sqlite"), &at("posts.parquet")).unwrap();
        assert_eq!((report.summary.images, report.summary.deleted, report.summary.tagged), (20_000, 400, 20_000));
        assert_eq!(report.fingerprint, build(&at("j.sqlite"), &at("posts.jsonl")).unwrap().fingerprint);
        // A second look reads nothing; the file replaced is read again.
        let again = build(&at("p.sqlite"), &at("posts.parquet")).unwrap();
        assert_eq!((again.changes.posts, again.fingerprint.as_str()), (0, report.fingerprint.as_str()));
        write_posts(dir.path(), 20_001, compression);
        assert_eq!(build(&at("p.sqlite"), &at("posts.parquet")).unwrap().summary.images, 20_001);
    }
}

#[test]
fn a_build_that_is_stopped_anywhere_ends_the_same() {
    let dir = tempfile::tempdir().unwrap();
    write_posts(dir.path(), 30_000, Compression::SNAPPY);
    let file = dir.path().join("posts.parquet");
    let expected = build(&dir.path().join("whole.sqlite"), &file).unwrap();
    for stop_at in [0, 1, 2, 4, 7, 8, 9, 10] {
        let index = dir.path().join(format!("{stop_at}.sqlite"));
        let options = BuildOptions { index: index.clone(), sources: vec![Source::detect(&file).unwrap()], ids: Ids::Auto, threads: 1 };
        let mut seen = 0;
        let stopped = index::build(&options, &mut |_| {
            seen += 1;
            if seen > stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(stopped, Err(Error::Stopped)), "{stop_at}: {stopped:?}");
        let resumed = build(&index, &file).unwrap();
        assert_eq!(resumed.fingerprint, expected.fingerprint, "stopped at {stop_at}");
        assert!(stop_at == 0 || resumed.changes.posts < 30_000, "what was read is not read again");
    }
}

/// An error's words and way out.
fn refused(dir: &Path, file: &Path) -> String {
    let error = build(&dir.join("refused.sqlite"), file).unwrap_err();
    assert!(error.to_string().contains(&file.display().to_string()), "{error}");
    format!("{} / {}", super::chain(&error), error.hint().unwrap_or_default())
}

#[test]
fn columns_of_a_wrong_type_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p.parquet");
    let case = |schema: &str, columns: &[Values]| {
        write(&file, &format!("message m {{ {schema} }}"), columns, 10, Compression::SNAPPY);
        refused(dir.path(), &file)
    };
    let numbers = || Values::Numbers(vec![1, 2]);
    let texts = || Values::Texts(vec!["a".into(), "b".into()]);
    let message = case("required int64 id; required binary score (UTF8);", &[numbers(), texts()]);
    assert!(message.contains("column `score` holds text, not whole numbers") && message.contains("duckdb"), "{message}");
    let message = case("required int64 id; required int64 tag_string_general;", &[numbers(), numbers()]);
    assert!(message.contains("column `tag_string_general` holds whole numbers, not text or lists of text"), "{message}");
    let message = case("required int64 id (TIMESTAMP_MILLIS); required binary rating (UTF8);", &[numbers(), texts()]);
    assert!(message.contains("column `id` holds points in time, not whole numbers"), "{message}");
    let message = case("required int64 id; required group tags { required int64 a; }", &[numbers(), numbers()]);
    assert!(message.contains("column `tags` holds groups of a, not text"), "{message}");
    let message = case("required binary tag_string (UTF8); required int64 number;", &[texts(), numbers()]);
    assert!(message.contains("it has no column `id`; its columns are tag_string, number"), "{message}");
    let message = case("required int64 id; required int64 post_id; required int64 tag_id;", &[numbers(), numbers(), numbers()]);
    assert!(message.contains("one of the tables of danbooru2023") && message.contains("danbooru2023.db"), "{message}");
}

#[test]
fn broken_files_are_named_and_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    write_posts(dir.path(), 3000, Compression::SNAPPY);
    let file = dir.path().join("posts.parquet");
    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, &good[..good.len() / 2]).unwrap();
    let message = refused(dir.path(), &file);
    assert!(message.contains("its parquet data cannot be read") && message.contains("fetch it again"), "{message}");
    // Bytes changed anywhere: an error or other values, and always an end.
    for k in 0..60 {
        let mut bytes = good.clone();
        let at = good.len() * k / 60;
        bytes[at..(at + 16).min(good.len())].fill(0xA5);
        std::fs::write(&file, &bytes).unwrap();
        let index = dir.path().join(format!("{k}.sqlite"));
        match Source::detect(&file) {
            Ok(Source::Parquet { .. }) => match build(&index, &file) {
                Ok(_) => {}
                Err(error) => assert!(matches!(error, Error::Source { .. }), "{error:?}"),
            },
            other => assert_eq!(k, 0, "{other:?}"),
        }
    }
    std::fs::remove_file(&file).unwrap();
    let gone = build(&dir.path().join("gone.sqlite"), &file).unwrap_err();
    assert!(super::chain(&gone).contains("cannot look at"), "{gone}");
}
