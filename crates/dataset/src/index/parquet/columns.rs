//! Which columns of a parquet file tell something of posts, and what each of them must hold.

use std::path::Path;

use ::parquet::basic::{Compression, ConvertedType, LogicalType, Type as Physical};
use ::parquet::file::metadata::ParquetMetaData;
use ::parquet::schema::types::{Type, TypePtr};

use crate::{Error, Result};

/// What a column must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// Whole numbers (or floating ones, as pandas makes of whole numbers where some are missing).
    Whole,
    /// A letter or word, or a number.
    Rating,
    /// Text or points in time.
    Date,
    /// True or false, or whole numbers.
    Flag,
    Text,
    /// Text, or lists of text.
    Words,
    /// The same, or lists of groups with `name` and `category`.
    Tags,
}

use Content::{Date, Flag, Rating, Tags, Text, Whole, Words};

/// Columns by the names that posts have in JSON too, and what they must hold.
const COLUMNS: [(&str, Content); 20] = [
    ("id", Whole),
    ("image_width", Whole),
    ("image_height", Whole),
    ("width", Whole),
    ("height", Whole),
    ("file_ext", Text),
    ("rating", Rating),
    ("score", Whole),
    ("fav_count", Whole),
    ("created_at", Date),
    ("is_deleted", Flag),
    ("is_banned", Flag),
    ("tags", Tags),
    ("tag_string", Words),
    ("caption", Text),
    ("text", Text),
    ("prompt", Text),
    ("tag_string_", Words),
    ("tags_", Words),
    // Tables of tags on Hugging Face name the columns by the classes alone.
    ("", Words),
];

const CLASSES: [&str; 5] = ["general", "artist", "character", "copyright", "meta"];

/// A column that is read.
#[derive(Debug, Clone)]
pub(super) struct Column {
    /// Its name in JSON.
    pub key: String,
    pub field: TypePtr,
    /// Of points in time that the crate does not tell from whole numbers: how many make a microsecond.
    pub per_microsecond: Option<i64>,
}

/// What a column of the file holds.
enum Kind {
    Whole,
    Real,
    Flag,
    Text,
    Time,
    List(Box<Kind>),
    Group(Vec<String>),
    Other,
}

/// The columns that tell something of posts, in the file's order.
///
/// # Errors
/// [`Error::Source`]: no column `id`, nothing besides it, a column that does not hold what it must, or a compression that
/// this program does not know.
pub(super) fn columns(file: &Path, data: &ParquetMetaData) -> Result<Vec<Column>> {
    let fields = data.file_metadata().schema().get_fields();
    let refuse = |what: String, way_out| Err(Error::Source { path: file.into(), what, way_out });
    let mut found: Vec<Column> = Vec::new();
    for (name, content) in COLUMNS.iter().flat_map(|&(name, content)| names(name).map(move |full| (full, content))) {
        let Some(field) = fields.iter().find(|f| f.name() == name) else { continue };
        // A bare class is read where its tags stand in no other column.
        let key = if CLASSES.contains(&name.as_str()) { format!("tags_{name}") } else { name.clone() };
        if name != key && found.iter().any(|c| c.key == key || c.key == format!("tag_string_{name}")) {
            continue;
        }
        let kind = kind(field);
        if !fits(content, &kind) {
            let what = format!("column `{name}` holds {}, not {}", kind.words(), content.words());
            return refuse(
                what,
                "convert the column, as with duckdb: COPY (SELECT * REPLACE (CAST(NAME AS BIGINT) AS NAME) FROM 'posts.parquet') TO 'new.parquet'",
            );
        }
        found.push(Column { key, field: field.clone(), per_microsecond: per_microsecond(field) });
    }
    if !found.iter().any(|c| c.key == "id") {
        let has: Vec<&str> = fields.iter().map(|f| f.name()).collect();
        return refuse(format!("it has no column `id`; its columns are {}", has.join(", ")), "each post needs its id");
    }
    let tagged = found.iter().any(|c| c.key.starts_with("tag"));
    if found.len() == 1 || (!tagged && file.with_file_name("posttagrelation.parquet").exists()) {
        return refuse(
            "it is one of the tables of danbooru2023, which keep posts, tags and the relations between them apart".into(),
            "name danbooru2023.db in its place: it holds the same",
        );
    }
    // Rows come with their fields in the file's order.
    found.sort_by_key(|c| fields.iter().position(|f| f.name() == c.field.name()));
    for group in data.row_groups() {
        for column in group.columns() {
            let used = column.column_path().parts().first().is_some_and(|root| found.iter().any(|c| c.field.name() == root));
            if used && !matches!(column.compression(), Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_)) {
                return refuse(
                    format!("column `{}` is compressed with {}", column.column_path(), column.compression_codec()),
                    "write it with snappy or zstd, as with duckdb: COPY (SELECT * FROM 'posts.parquet') TO 'new.parquet' (COMPRESSION zstd)",
                );
            }
        }
    }
    Ok(found)
}

/// The column names that an entry of [`COLUMNS`] stands for.
fn names(entry: &'static str) -> impl Iterator<Item = String> {
    let of_classes = entry.is_empty() || entry.ends_with('_');
    let endings: &[&str] = if of_classes { &CLASSES } else { &[""] };
    endings.iter().map(move |ending| format!("{entry}{ending}"))
}

fn fits(content: Content, kind: &Kind) -> bool {
    let text = matches!(kind, Kind::Text);
    let number = matches!(kind, Kind::Whole | Kind::Real);
    match content {
        Whole => number,
        Rating => text || number,
        Date => text || matches!(kind, Kind::Time),
        Flag => number || matches!(kind, Kind::Flag),
        Text => text,
        Words => text || matches!(kind, Kind::List(of) if matches!(**of, Kind::Text)),
        Tags => {
            fits(Words, kind) || matches!(kind, Kind::List(of) if matches!(&**of, Kind::Group(names) if names.iter().any(|n| n == "name")))
        }
    }
}

impl Content {
    fn words(self) -> &'static str {
        match self {
            Whole => "whole numbers",
            Rating => "text or whole numbers",
            Date => "text or points in time",
            Flag => "true or false",
            Text => "text",
            Words => "text or lists of text",
            Tags => "text, lists of text or lists of groups with a name",
        }
    }
}

impl Kind {
    fn words(&self) -> String {
        match self {
            Kind::Whole => "whole numbers".into(),
            Kind::Real => "numbers".into(),
            Kind::Flag => "true or false".into(),
            Kind::Text => "text".into(),
            Kind::Time => "points in time".into(),
            Kind::List(of) => format!("lists of {}", of.words()),
            Kind::Group(names) => format!("groups of {}", names.join(", ")),
            Kind::Other => "values of another type".into(),
        }
    }
}

fn kind(field: &Type) -> Kind {
    let info = field.get_basic_info();
    let converted = info.converted_type();
    if field.is_primitive() {
        return match (field.get_physical_type(), converted) {
            (_, ConvertedType::DECIMAL | ConvertedType::INTERVAL | ConvertedType::TIME_MILLIS | ConvertedType::TIME_MICROS) => Kind::Other,
            (_, ConvertedType::DATE | ConvertedType::TIMESTAMP_MILLIS | ConvertedType::TIMESTAMP_MICROS) => Kind::Time,
            _ if matches!(info.logical_type_ref(), Some(LogicalType::Timestamp(_))) => Kind::Time,
            (Physical::INT96, _) => Kind::Time,
            (Physical::BOOLEAN, _) => Kind::Flag,
            (Physical::INT32 | Physical::INT64, _) => Kind::Whole,
            (Physical::FLOAT | Physical::DOUBLE, _) => Kind::Real,
            // Old writers mark text by nothing.
            (Physical::BYTE_ARRAY, ConvertedType::UTF8 | ConvertedType::ENUM | ConvertedType::JSON | ConvertedType::NONE) => Kind::Text,
            _ => Kind::Other,
        };
    }
    let inside = field.get_fields();
    match (converted, inside) {
        // A list is a group of one repeated group of one element, or (old form) of the repeated element itself.
        (ConvertedType::LIST, [repeated]) if repeated.is_primitive() => Kind::List(Box::new(kind(repeated))),
        (ConvertedType::LIST, [repeated]) => match repeated.get_fields() {
            [element] => Kind::List(Box::new(kind(element))),
            _ => Kind::List(Box::new(kind(repeated))),
        },
        (ConvertedType::NONE, _) => Kind::Group(inside.iter().map(|f| f.name().to_string()).collect()),
        _ => Kind::Other,
    }
}

/// Nanoseconds are the one unit for which parquet's older marks have no name; the reader of rows gives bare numbers then.
fn per_microsecond(field: &Type) -> Option<i64> {
    let info = field.get_basic_info();
    let nanos = matches!(info.logical_type_ref(), Some(LogicalType::Timestamp(_))) && info.converted_type() == ConvertedType::NONE;
    nanos.then_some(1000)
}
