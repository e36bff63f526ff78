//! The tokenizer against captions recorded from the Python CLIPTokenizer with ftfy, laid out by sd-scripts
//! (tests/golden/tokens.json). Exact.

#![allow(clippy::disallowed_methods)]

use std::path::PathBuf;

use sdxl::tokenizer::Tokenizer;
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    let folder = std::env::var("LOKR_GOLDEN").unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden").into());
    PathBuf::from(folder).join(name)
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn flat(value: &Value) -> Vec<u32> {
    match value.as_array().unwrap().first() {
        Some(Value::Array(_)) => value.as_array().unwrap().iter().flat_map(ids).collect(),
        _ => ids(value),
    }
}

#[test]
fn every_recorded_caption_gives_the_recorded_ids() {
    let tokens: Value = serde_json::from_str(&std::fs::read_to_string(golden("tokens.json")).unwrap()).unwrap();
    let tokenizer = Tokenizer::new().unwrap();
    let captions = tokens["captions"].as_array().unwrap();
    assert_eq!(captions.len(), 41);
    let mut wrong = Vec::new();
    for caption in captions {
        let text = caption["text"].as_str().unwrap();
        for (key, got) in [
            ("ids", tokenizer.encode(text)),
            ("te1_77", tokenizer.te1_rows(text, 1).concat()),
            ("te2_77", tokenizer.te2_rows(text, 1).concat()),
            ("te1_225", tokenizer.te1_rows(text, 3).concat()),
            ("te2_225", tokenizer.te2_rows(text, 3).concat()),
        ] {
            if got != flat(&caption[key]) {
                wrong.push(format!("{key} of {text:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
