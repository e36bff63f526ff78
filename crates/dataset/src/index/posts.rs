//! Posts as JSON objects: danbooru's API (and dumps of it), rows of parquet files, and the sidecar files of webdataset shards. What is not there
//! stays unknown; numbers may be written as text, as old dumps do.

use serde_json::{Map, Value};

use super::kinds::day;
use super::{FileFormat, Rating, TagClass};

/// What is known of a post.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Post {
    pub id: Option<u32>,
    pub size: Option<(u32, u32)>,
    pub format: Option<FileFormat>,
    pub rating: Option<Rating>,
    pub score: Option<i32>,
    pub fav_count: Option<i32>,
    pub date: Option<i32>,
    pub deleted: bool,
    pub banned: bool,
    /// Name and class, each class in the order of the source.
    pub tags: Vec<(String, TagClass)>,
    /// A caption in words, as webdataset's sidecars have.
    pub caption: Option<String>,
}

/// Reads one JSON object.
///
/// # Errors
/// A sentence on what is wrong.
pub(super) fn parse(text: &[u8]) -> Result<Post, String> {
    match serde_json::from_slice(text) {
        Ok(Value::Object(object)) => Ok(from_object(&object)),
        Ok(_) => Err("it is no JSON object".into()),
        Err(error) => Err(format!("it is no JSON: {error}")),
    }
}

/// Reads what an object's keys tell.
pub(super) fn from_object(object: &Map<String, Value>) -> Post {
    let first = |keys: &[&str]| keys.iter().find_map(|key| object.get(*key)).filter(|v| !v.is_null());
    let number = |keys: &[&str]| first(keys).and_then(whole_number);
    let text = |keys: &[&str]| first(keys).and_then(Value::as_str);
    let small = |n: i64| i32::try_from(n).ok();
    let flag = |key: &str| first(&[key]).is_some_and(is_true);
    let side = |keys: &[&str]| number(keys).and_then(|n| u32::try_from(n).ok()).filter(|&n| n > 0);
    Post {
        id: number(&["id"]).and_then(|n| u32::try_from(n).ok()),
        size: side(&["image_width", "width"]).zip(side(&["image_height", "height"])),
        format: text(&["file_ext"]).map(FileFormat::from_extension),
        rating: first(&["rating"]).and_then(rating),
        score: number(&["score"]).and_then(small),
        fav_count: number(&["fav_count"]).and_then(small),
        date: text(&["created_at"]).map(day),
        deleted: flag("is_deleted"),
        banned: flag("is_banned"),
        tags: tags(object),
        caption: text(&["caption", "text", "prompt"]).map(|t| t.trim().to_string()).filter(|t| !t.is_empty()),
    }
}

fn whole_number(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_f64().filter(|f| f.fract() == 0.0).map(|f| f as i64)).or_else(|| value.as_str()?.trim().parse().ok())
}

fn is_true(value: &Value) -> bool {
    value.as_bool().unwrap_or_else(|| matches!(value.as_str(), Some("true" | "t")) || whole_number(value) == Some(1))
}

fn rating(value: &Value) -> Option<Rating> {
    match value.as_str() {
        Some(text) => Rating::from_text(text),
        None => Rating::from_number(whole_number(value)?),
    }
}

/// Tags from `tag_string_CLASS` (or a list `tags_CLASS`), else from `tags`: objects of name and category, texts, or one
/// text; those without a class are general.
fn tags(object: &Map<String, Value>) -> Vec<(String, TagClass)> {
    const CLASSES: [(&str, TagClass); 5] = [
        ("general", TagClass::General),
        ("artist", TagClass::Artist),
        ("character", TagClass::Character),
        ("copyright", TagClass::Copyright),
        ("meta", TagClass::Meta),
    ];
    let mut found = Vec::new();
    for (name, class) in CLASSES {
        for key in ["tag_string_", "tags_"] {
            match object.get(&format!("{key}{name}")) {
                Some(Value::String(text)) => found.extend(text.split_whitespace().map(|t| (t.to_string(), class))),
                Some(Value::Array(list)) => found.extend(list.iter().filter_map(Value::as_str).map(|t| (t.to_string(), class))),
                _ => {}
            }
        }
    }
    if !found.is_empty() {
        return found;
    }
    match object.get("tags").or_else(|| object.get("tag_string")) {
        Some(Value::Array(list)) => {
            for tag in list {
                if let Some(name) = tag.as_str().or_else(|| tag.get("name")?.as_str()) {
                    found.push((name.to_string(), class_of(tag.get("category"))));
                }
            }
        }
        // Captions separate tags by commas, boards by blanks.
        Some(Value::String(text)) if text.contains(',') => {
            found.extend(text.split(',').map(str::trim).filter(|t| !t.is_empty()).map(|t| (t.to_string(), TagClass::General)));
        }
        Some(Value::String(text)) => found.extend(text.split_whitespace().map(|t| (t.to_string(), TagClass::General))),
        _ => {}
    }
    found
}

/// danbooru's own numbers of categories, which are not HakuBooru's.
fn class_of(category: Option<&Value>) -> TagClass {
    match category.and_then(whole_number) {
        Some(1) => TagClass::Artist,
        Some(3) => TagClass::Copyright,
        Some(4) => TagClass::Character,
        Some(5) => TagClass::Meta,
        _ => TagClass::General,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_api_and_old_dumps() {
        let api = br#"{"id": 5, "created_at": "2024-05-19T01:30:25.096-04:00", "rating": "q", "score": -3, "fav_count": 7,
            "is_deleted": true, "image_width": 10, "image_height": 20, "file_ext": "jpg", "tag_string_general": "1girl o_o",
            "tag_string_artist": "a", "tag_string_meta": "", "tag_string": "1girl a o_o"}"#;
        let post = parse(api).unwrap();
        assert_eq!(
            (post.id, post.date, post.rating, post.score, post.fav_count),
            (Some(5), Some(20_240_519), Some(Rating::Questionable), Some(-3), Some(7))
        );
        assert_eq!((post.deleted, post.banned, post.size, post.format), (true, false, Some((10, 20)), Some(FileFormat::Jpeg)));
        let own = |list: &[(&str, TagClass)]| list.iter().map(|(n, c)| (n.to_string(), *c)).collect::<Vec<_>>();
        assert_eq!(post.tags, own(&[("1girl", TagClass::General), ("o_o", TagClass::General), ("a", TagClass::Artist)]));
        let dump =
            br#"{"id": "6", "score": "4", "is_deleted": "false", "tags": [{"name": "x", "category": "4"}, {"name": "y", "category": 3}]}"#;
        let post = parse(dump).unwrap();
        assert_eq!((post.id, post.score, post.deleted, post.date), (Some(6), Some(4), false, None));
        assert_eq!(post.tags, own(&[("x", TagClass::Character), ("y", TagClass::Copyright)]));
    }

    #[test]
    fn nonsense_is_named_or_unknown() {
        assert_eq!(parse(b"[1]").unwrap_err(), "it is no JSON object");
        assert!(parse(b"{").unwrap_err().starts_with("it is no JSON: EOF"));
        let post = parse(br#"{"id": -1, "score": 1e30, "rating": "z", "image_width": 0, "image_height": 4, "tags": 3}"#).unwrap();
        assert_eq!(post, Post::default());
        assert_eq!([day("2024-05-19x"), day("2024-13-01"), day("20a4-01-01"), day("2024"), day("é024-01-01")], [20_240_519, 0, 0, 0, 0]);
    }
}
