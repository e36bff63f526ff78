//! What a key that is not known may have meant, and what a value of the wrong kind should have been.

use toml::Value;

use super::error::{Fault, Place};
use super::foreign::WITHOUT_COUNTERPART;
use super::key::Origin;
use super::{SectionDoc, catalog};

/// The fault of a key that `section` does not have ("" for the top level).
pub(super) fn unknown(section: &str, key: &str, place: Place) -> Fault {
    let sections = catalog();
    let full = if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
    let fault = |what: String, hint: Option<String>| Fault { place: place.clone(), what, hint };

    let renamed: Vec<String> = paths(&sections, |k| matches!(k.origin, Origin::Named(names) if names.contains(&key)));
    if !renamed.is_empty() {
        let names = renamed.join(" or ");
        return fault(format!("unknown key `{full}`: sd-scripts' `{key}` is called {names} here"), Some(format!("write {names}")));
    }
    let homes: Vec<&str> = sections.iter().filter(|s| s.keys.iter().any(|k| k.name == key)).map(|s| s.name).collect();
    if !homes.is_empty() {
        let plain = homes.iter().any(|h| *h != "sample.prompts");
        let homes: Vec<String> = homes.iter().filter(|h| !plain || **h != "sample.prompts").map(|h| header(h)).collect();
        return fault(format!("`{key}` is not a key of {}", header(section)), Some(format!("it belongs in {}", homes.join(" or "))));
    }
    if let Some((_, advice)) = WITHOUT_COUNTERPART.iter().find(|(name, _)| *name == key) {
        return fault(format!("unknown key `{full}`: sd-scripts' `{key}` has no key of its own here"), Some((*advice).to_owned()));
    }
    let here = sections.iter().filter(|s| s.name == section).flat_map(|s| s.keys.iter().map(|k| (k.name.clone(), k.name.clone())));
    let anywhere = sections.iter().flat_map(|s| s.keys.iter().map(|k| (k.name.clone(), format!("{}.{}", s.name, k.name))));
    let hint = nearest(key, here).or_else(|| nearest(key, anywhere)).map(|name| format!("did you mean `{name}`?"));
    fault(format!("unknown key `{full}`"), hint)
}

/// The fault of a section that does not exist.
pub(super) fn unknown_section(name: &str, place: Place) -> Fault {
    let sections: Vec<&str> = catalog().iter().map(|s| s.name).filter(|n| !n.contains('.')).collect();
    let near = nearest(name, sections.iter().map(|n| ((*n).to_owned(), format!("[{n}]"))));
    let hint = near.map_or_else(|| format!("the sections are [{}]", sections.join("], [")), |n| format!("did you mean {n}?"));
    Fault { place, what: format!("unknown section [{name}]"), hint: Some(hint) }
}

/// The fault of a value of the wrong kind. `kind` completes "expected ...".
pub(super) fn wrong_kind(path: &str, kind: &str, value: &Value, place: Place) -> Fault {
    let hint = match value {
        Value::String(text) => {
            let names = kind.strip_prefix("one of ").map(|names| names.split(", ").map(|n| n.trim_matches('"').to_owned()));
            let near = names.and_then(|names| nearest(text, names.map(|n| (n.clone(), n))));
            let number = text.trim().parse::<f64>().is_ok() && kind.contains("number");
            let flag = matches!(text.to_ascii_lowercase().as_str(), "true" | "false") && kind.ends_with("true or false");
            match near {
                Some(name) => Some(format!("did you mean \"{name}\"?")),
                None if number || flag => Some(format!("write {} without quotes", text.trim().to_ascii_lowercase())),
                None => None,
            }
        }
        Value::Float(x) if x.fract() == 0.0 && kind.contains("whole number") => Some(format!("write {x} without a decimal point")),
        _ => None,
    };
    Fault { place, what: format!("{path}: expected {kind}, found {}", describe(value)), hint }
}

/// `[train]`, `[[dataset.subsets]]`, or words for the top level and for prompt tables.
fn header(section: &str) -> String {
    match section {
        "" => "the top level".into(),
        "dataset.subsets" => "[[dataset.subsets]]".into(),
        "sample.prompts" => "a table in sample.prompts".into(),
        name => format!("[{name}]"),
    }
}

fn paths(sections: &[SectionDoc], wanted: impl Fn(&super::Key) -> bool) -> Vec<String> {
    let top = sections.iter().filter(|s| s.name != "sample.prompts");
    top.flat_map(|s| s.keys.iter().filter(|k| wanted(k)).map(|k| format!("{}.{}", s.name, k.name))).collect()
}

fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => format!("the text \"{text}\""),
        Value::Array(_) => format!("the list {value}"),
        Value::Table(_) => "a table".into(),
        Value::Datetime(date) => format!("the date {date}"),
        Value::Integer(_) | Value::Float(_) => format!("the number {value}"),
        Value::Boolean(flag) => flag.to_string(),
    }
}

/// The answer whose name is nearest to `typed`, if it is near enough to be what was meant.
fn nearest(typed: &str, names: impl Iterator<Item = (String, String)>) -> Option<String> {
    let typed = typed.to_ascii_lowercase();
    let (distance, length, answer) = names
        .map(|(name, answer)| (strsim::damerau_levenshtein(&typed, &name.to_ascii_lowercase()), name.len(), answer))
        .min_by_key(|(distance, ..)| *distance)?;
    (distance <= (length.min(typed.len()) / 3).max(1)).then_some(answer)
}
