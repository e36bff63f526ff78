//! The section `[dataset]`: the keys of crate `dataset`, and those about cached latents, which that crate leaves to us.
//!
//! Names, docs and types of `dataset`'s keys are read out of the source of its own structs, and the defaults out of their
//! `Default`, so that nothing about them is repeated here; a test compares the two.

use std::path::PathBuf;

use dataset::{DatasetConfig, SubsetConfig};
use toml::{Table, Value};

use super::key::{Key, Origin, Section, one_of, section};

const SOURCE: &str = include_str!("../../../dataset/src/config.rs");

/// Name of the list of subsets, whose entries are tables.
pub(super) const SUBSETS: &str = "subsets";

section! {
    /// The pictures and their captions. Each `[[dataset.subsets]]` is a folder; a subset's key that is written in `[dataset]` holds for
    /// every subset that does not give it itself.
    CacheConfig = "dataset" {
        /// Encode each picture once and keep the latents in memory, in f16.
        cache_latents: bool = false, same;
        /// Encode each picture once and keep the latents in files, for later runs too. Includes `cache_latents`; the numbers are the same.
        cache_latents_to_disk: bool = false, same;
        /// Encode a picture when it is first visited, instead of all before the first step. The result is the same.
        cache_latents_lazily: bool = false, ours;
        /// The folder of `cache_latents_to_disk`; several runs may share one. If absent: `.lokr-latents` beside the first subset's
        /// pictures, or beside its index.
        cache_latents_dir: Option<PathBuf> = None, ours;
        /// With cached latents: take those that sd-scripts left in `.npz` files beside the pictures, where they fit. They do not say
        /// which VAE made them: it must have been this one.
        read_npz_latents: bool = false, ours;
        /// Pictures that the VAE encodes at once.
        vae_batch_size: usize = 1, same;
    }
}

/// Keys that sd-scripts does not have.
const OURS: &[&str] = &["on_broken_image", "max_broken_share", "crop_condition", "index", "selection", "caption_rules"];

/// The keys of `[dataset]` that crate `dataset` reads, without `subsets`.
pub(super) fn dataset_keys() -> Vec<Key> {
    keys("DatasetConfig", &defaults(&DatasetConfig::default()))
}

/// The keys of `[[dataset.subsets]]`.
pub(super) fn subset_keys() -> Vec<Key> {
    let mut keys = keys("SubsetConfig", &defaults(&SubsetConfig::default()));
    for key in keys.iter_mut().filter(|k| k.name == "image_dir") {
        (key.required, key.default) = (true, None);
    }
    keys
}

/// Whether `value` is of the kind that crate `dataset` expects for `key`; `subset`: as a subset's key.
pub(super) fn fits(subset: bool, key: &str, value: &Value) -> bool {
    let table = Value::Table(Table::from_iter([(key.to_owned(), value.clone())]));
    if subset { table.try_into::<SubsetConfig>().is_ok() } else { table.try_into::<DatasetConfig>().is_ok() }
}

/// Every key with its value, in the order of the struct; `subsets` left out.
pub(super) fn values<T: serde::Serialize>(config: &T, keys: &[Key]) -> Vec<(String, Option<Value>)> {
    let table = defaults(config);
    keys.iter().map(|k| (k.name.clone(), table.get(&k.name).cloned())).collect()
}

fn defaults<T: serde::Serialize>(config: &T) -> Table {
    // The structs hold numbers, texts, flags and lists of such: all of them exist in TOML. An empty table would show
    // up as missing defaults in the test below.
    Table::try_from(config).unwrap_or_default()
}

fn keys(name: &str, defaults: &Table) -> Vec<Key> {
    fields(name)
        .into_iter()
        .filter(|(field, ..)| *field != SUBSETS)
        .map(|(field, ty, doc)| Key {
            name: field.to_owned(),
            doc,
            kind: kind(ty),
            default: defaults.get(field).cloned(),
            required: false,
            origin: if OURS.contains(&field) { Origin::Ours } else { Origin::Same },
        })
        .collect()
}

/// Name, type and doc of each public field of a struct in the source.
fn fields(name: &str) -> Vec<(&'static str, &'static str, String)> {
    let mut doc = Vec::new();
    let mut fields = Vec::new();
    for line in body("struct", name) {
        if let Some(text) = line.strip_prefix("///") {
            doc.push(text);
        } else if let Some((field, ty)) = line.strip_prefix("pub ").and_then(|l| l.trim_end_matches(',').split_once(": ")) {
            fields.push((field, ty, super::key::paragraph(&doc).replace("[`", "`").replace("`]", "`")));
            doc.clear();
        }
    }
    fields
}

/// Names of an enum's variants in kebab case, which is how they are written in a recipe.
fn variants(name: &str) -> Vec<String> {
    let bare = |line: &&str| !line.starts_with("//") && !line.starts_with('#') && line.ends_with(',');
    body("enum", name).filter(bare).map(|line| kebab(line.trim_end_matches(','))).collect()
}

fn kebab(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push('-');
        }
        out.extend(c.to_lowercase());
    }
    out
}

/// The trimmed lines between the braces of an item of the source.
fn body(item: &str, name: &str) -> impl Iterator<Item = &'static str> {
    let head = format!("pub {item} {name} {{");
    let inside = SOURCE.split_once(&head).map_or("", |(_, rest)| rest.split_once("\n}").map_or("", |(inside, _)| inside));
    inside.lines().map(str::trim)
}

fn kind(ty: &str) -> String {
    match ty.strip_prefix("Option<").and_then(|t| t.strip_suffix('>')).unwrap_or(ty) {
        "bool" => "true or false".into(),
        "u32" | "u64" | "usize" => "whole number".into(),
        "f64" => "number".into(),
        "String" => "text".into(),
        "PathBuf" => "path".into(),
        "(u32, u32)" => "whole number, or [width, height]".into(),
        other => one_of(&variants(other).iter().map(String::as_str).collect::<Vec<_>>()),
    }
}

/// Every key of `[dataset]` itself, ours last.
pub(super) fn section_keys() -> Vec<Key> {
    let mut keys = dataset_keys();
    keys.extend(CacheConfig::keys());
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every field that serde knows is found in the source with a doc and a kind, and every default fits its kind.
    #[test]
    fn keys_read_from_the_source_are_those_of_the_structs() {
        let mut dataset = defaults(&DatasetConfig::default());
        dataset.remove(SUBSETS);
        for (subset, keys, table) in [(false, dataset_keys(), dataset), (true, subset_keys(), defaults(&SubsetConfig::default()))] {
            assert!(!table.is_empty());
            for name in table.keys() {
                assert!(keys.iter().any(|k| k.name == *name), "{name} is not found in the source");
            }
            for key in &keys {
                assert!(key.doc.len() > 10 && !key.doc.contains("//"), "{key:?}");
                assert_ne!(key.kind, "one of ", "{key:?}");
                assert!(key.default.as_ref().is_none_or(|v| fits(subset, &key.name, v)), "{key:?}");
                // A name that serde does not know would be refused with any value.
                let probes: [Value; 4] = [true.into(), 1.into(), ".x".into(), "area".into()];
                assert!(probes.iter().any(|v| fits(subset, &key.name, v)) || key.kind.starts_with("one of"), "{key:?}");
            }
        }
        let interpolation = dataset_keys().into_iter().find(|k| k.name == "resize_interpolation").unwrap();
        assert_eq!(interpolation.kind, r#"one of "lanczos", "box", "area", "linear", "cubic", "nearest""#);
        for name in ["lanczos", "box", "area", "linear", "cubic", "nearest"] {
            assert!(fits(false, "resize_interpolation", &name.into()), "{name}");
        }
        let crop = dataset_keys().into_iter().find(|k| k.name == "crop_condition").unwrap();
        assert_eq!(crop.kind, r#"one of "pixel", "sd-scripts""#);
        assert!(fits(false, "resolution", &Value::from(vec![1024, 768])) && !fits(false, "resolution", &"big".into()));
    }
}
