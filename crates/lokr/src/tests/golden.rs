//! Reading the golden data in tests. `LOKR_GOLDEN` names another folder.
#![allow(clippy::disallowed_methods)]

use crate::shape::{LayerShape, LokrOptions};
use candle_core::Tensor;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use storage::safetensors::SafeTensors;

pub(crate) fn path(name: &str) -> PathBuf {
    let folder = std::env::var_os("LOKR_GOLDEN")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden")), PathBuf::from);
    folder.join(name)
}

pub(crate) fn json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path(name)).expect("golden file")).expect("JSON")
}

/// All tensors of a golden file, f32.
pub(crate) fn tensors(name: &str) -> BTreeMap<String, Tensor> {
    let file = SafeTensors::open(&path(name)).expect("golden file");
    file.names().filter_map(|key| Some((key.to_string(), crate::load::tensor(&file, key).ok()?))).collect()
}

/// A case of lokr.json.
pub(crate) struct Case {
    pub id: String,
    pub layer: LayerShape,
    pub options: LokrOptions,
    pub stride: usize,
    pub padding: usize,
    pub multiplier: f64,
    pub scale: f64,
    pub alpha_saved: f64,
    pub shapes: Vec<(String, Vec<usize>)>,
}

pub(crate) fn shapes(value: &Value) -> Vec<(String, Vec<usize>)> {
    let dims = |v: &Value| v.as_array().expect("a shape").iter().map(|n| n.as_u64().expect("a side") as usize).collect();
    value.as_object().expect("shapes").iter().map(|(key, v)| (key.clone(), dims(v))).collect()
}

pub(crate) fn cases() -> Vec<Case> {
    let number = |case: &Value, key: &str| case[key].as_f64();
    let count = |case: &Value, key: &str| case[key].as_u64().unwrap_or(0) as usize;
    let flag = |case: &Value, key: &str| case[key].as_bool().unwrap_or(false);
    let read = |case: &Value| {
        let (inp, out, k) = (count(case, "cin"), count(case, "cout"), count(case, "k"));
        let kernel = (case["kind"] == "conv").then_some((k, k));
        Case {
            id: case["id"].as_str().expect("id").into(),
            layer: LayerShape { out, inp, kernel },
            options: LokrOptions {
                dim: count(case, "dim"),
                alpha: number(case, "alpha"),
                factor: case["factor"].as_i64().expect("factor"),
                full_matrix: flag(case, "full"),
                decompose_both: flag(case, "both"),
                use_tucker: flag(case, "tucker"),
                rs_lora: flag(case, "rs"),
                unbalanced_factorization: flag(case, "unbalanced"),
            },
            stride: count(case, "stride"),
            padding: count(case, "pad"),
            multiplier: number(case, "mult").unwrap_or(1.0),
            scale: number(case, "scale").expect("scale"),
            alpha_saved: number(case, "alpha_saved").expect("alpha"),
            shapes: shapes(&case["shapes"]),
        }
    };
    json("lokr.json")["cases"].as_array().expect("cases").iter().map(read).collect()
}
