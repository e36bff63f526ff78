//! Which keys of two recipes differ in what changes the result of a run. A key that one of them lacks has its default there: a
//! checkpoint of before there was the key can be gone on from.

use toml::{Table, Value};

use crate::config::catalog;

/// Keys that may change at a resume: they decide what is shown or kept, or how long and how fast it runs, but not what a step does.
const FREE: &[&str] = &[
    "model.disable_mmap_load_safetensors",
    "train.max_train_steps",
    "train.max_train_epochs",
    "train.threads",
    "train.max_data_loader_n_workers",
    "train.gradient_checkpointing",
    "train.ddp_timeout",
    "train.ddp_bucket_cap_mb",
    "train.ddp_check_every_n_steps",
    "train.on_non_finite",
    "train.max_withheld_steps",
    "train.initial_loss_scale",
    "dataset.cache_latents_to_disk",
    "dataset.cache_latents_lazily",
    "dataset.cache_latents_dir",
    "dataset.max_broken_share",
    "dataset.vae_batch_size",
];

/// Sections that are free as a whole.
const FREE_SECTIONS: &[&str] = &["output", "sample", "validation"];

/// `key: then -> now` for each key whose change changes the result, sorted. A recipe that cannot be read differs as a whole.
pub fn differences(then: &str, now: &str) -> Vec<String> {
    let (Ok(then), Ok(now)) = (then.parse::<Table>(), now.parse::<Table>()) else {
        return vec!["the recipe as a whole: it cannot be read".into()];
    };
    let mut found = Vec::new();
    compare("", &Value::Table(then.clone()), &Value::Table(now.clone()), &mut found);
    // The end of the run enters the curve of every schedule that knows an end, and warmups given as a part of all steps.
    let text = |t: &Table, key: &str| t.get("train").and_then(|s| s.get(key)).cloned();
    let scheduler = text(&now, "lr_scheduler");
    let endless =
        ["constant", "constant_with_warmup", "inverse_sqrt"].iter().any(|s| scheduler.as_ref().and_then(Value::as_str) == Some(s));
    let ratio = matches!(text(&now, "lr_warmup_steps"), Some(Value::Float(_)));
    if !endless || ratio {
        for key in ["max_train_steps", "max_train_epochs"] {
            let (a, b) = (text(&then, key), text(&now, key));
            if a != b {
                found.push(line(&format!("train.{key}"), a.as_ref(), b.as_ref()));
            }
        }
    }
    found.sort();
    found
}

/// What `section.key` is where a recipe says nothing.
fn default(path: &str) -> Option<Value> {
    let (section, key) = path.rsplit_once('.')?;
    catalog().into_iter().find(|s| s.name == section)?.keys.into_iter().find(|k| k.name == key)?.default
}

fn line(key: &str, a: Option<&Value>, b: Option<&Value>) -> String {
    let show = |v: Option<&Value>| v.map_or_else(|| "absent".to_string(), Value::to_string);
    format!("{key}: {} -> {}", show(a), show(b))
}

fn compare(key: &str, a: &Value, b: &Value, found: &mut Vec<String>) {
    if let (Value::Array(x), Value::Array(y)) = (a, b)
        && x.len() == y.len()
        && x.iter().chain(y).all(Value::is_table)
    {
        return x.iter().zip(y).enumerate().for_each(|(i, (a, b))| compare(&format!("{key}[{i}]"), a, b, found));
    }
    let (Value::Table(x), Value::Table(y)) = (a, b) else {
        if a != b {
            found.push(line(key, Some(a), Some(b)));
        }
        return;
    };
    let keys: std::collections::BTreeSet<&String> = x.keys().chain(y.keys()).collect();
    for name in keys {
        let path = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
        if FREE.contains(&path.as_str()) || FREE_SECTIONS.contains(&path.as_str()) {
            continue;
        }
        match (x.get(name), y.get(name)) {
            (Some(a), Some(b)) => compare(&path, a, b, found),
            (Some(one), None) | (None, Some(one)) if default(&path).as_ref() == Some(one) => {}
            (a, b) => found.push(line(&path, a, b)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "[train]\nunet_lr = 1e-4\nlr_scheduler = \"constant\"\nmax_train_steps = 10\n[output]\ndir = \"a\"\n";

    #[test]
    fn what_changes_the_result_is_listed_and_the_rest_is_free() {
        assert!(differences(BASE, BASE).is_empty());
        let free = BASE.replace("10", "20").replace("\"a\"", "\"b\"");
        assert!(differences(BASE, &free).is_empty());
        let changed = BASE.replace("1e-4", "2e-4") + "[network]\nfactor = 4\n";
        assert_eq!(differences(BASE, &changed), ["network: absent -> { factor = 4 }", "train.unet_lr: 0.0001 -> 0.0002"]);
    }

    #[test]
    fn tables_in_lists_are_compared_key_by_key() {
        let subsets = "[[dataset.subsets]]\nkeep_tokens = 1\n[[dataset.subsets]]\nkeep_tokens = 2\n";
        assert_eq!(differences(subsets, &subsets.replace("= 2", "= 3")), ["dataset.subsets[1].keep_tokens: 2 -> 3"]);
        assert_eq!(differences(subsets, &format!("{subsets}[[dataset.subsets]]\n")).len(), 1);
    }

    #[test]
    fn a_key_that_is_newer_than_the_checkpoint_had_its_default_there() {
        let then = format!("[network]\nfactor = 8\n{BASE}");
        let now = |forward: &str| then.replace("factor = 8", &format!("factor = 8\nforward = \"{forward}\""));
        assert!(differences(&then, &now("auto")).is_empty());
        assert_eq!(differences(&then, &now("merged")), ["network.forward: absent -> \"merged\""]);
    }

    #[test]
    fn the_end_of_a_run_counts_where_the_schedule_knows_it() {
        let cosine = BASE.replace("constant", "cosine");
        assert_eq!(differences(&cosine, &cosine.replace("10", "20")), ["train.max_train_steps: 10 -> 20"]);
        let ratio = BASE.replace("[output]", "lr_warmup_steps = 0.1\n[output]");
        assert_eq!(differences(&ratio, &ratio.replace("max_train_steps = 10", "max_train_steps = 20")).len(), 1);
    }
}
