//! Texts made from the declarations of the keys: a complete recipe, the template, the reference page.

use std::fmt::Write as _;

use toml::Value;

use super::dataset as data;
use super::foreign::WITHOUT_COUNTERPART;
use super::key::{Key, Origin, Section};
use super::{RunConfig, SectionDoc, catalog};

const WIDTH: usize = 120;

/// The recipe with every key that has a value; the others as comments.
pub(super) fn recipe(config: &RunConfig) -> String {
    let mut text = format!("# Complete recipe, defaults written out. lokr {}\n", env!("CARGO_PKG_VERSION"));
    let borrowed = |section: &dyn Section| section.values().into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<Vec<_>>();
    let mut dataset = data::values(&config.dataset, &data::dataset_keys());
    dataset.extend(borrowed(&config.cache as &dyn Section));
    let blocks = [
        ("model", borrowed(&config.model)),
        ("network", borrowed(&config.network)),
        ("train", borrowed(&config.train)),
        ("output", borrowed(&config.output)),
        ("sample", borrowed(&config.sample)),
        ("validation", borrowed(&config.validation)),
        ("dataset", dataset),
    ];
    for (name, values) in blocks {
        block(&mut text, &format!("[{name}]"), &values);
    }
    for subset in &config.dataset.subsets {
        block(&mut text, "[[dataset.subsets]]", &data::values(subset, &data::subset_keys()));
    }
    text
}

fn block(text: &mut String, header: &str, values: &[(String, Option<Value>)]) {
    let _ = writeln!(text, "\n{header}");
    for (key, value) in values {
        let _ = match value {
            Some(value) => writeln!(text, "{key} = {}", show(value)),
            None => writeln!(text, "# {key} is not set"),
        };
    }
}

/// A recipe with every key, its doc and its default, to be filled in.
pub fn template() -> String {
    let mut text = String::from(
        "# A recipe for lokr. Keys with a default may be left out; those that are commented out have none.\n\
         # Relative paths start at the folder in which lokr is called.\n",
    );
    for section in catalog().iter().filter(|s| s.name != "sample.prompts") {
        let subsets = section.name == "dataset.subsets";
        let _ = writeln!(text, "\n{}", if subsets { "[[dataset.subsets]]".into() } else { format!("[{}]", section.name) });
        comment(&mut text, &section.doc);
        for key in &section.keys {
            let required = if key.required { "; required" } else { "" };
            text.push('\n');
            comment(&mut text, &format!("{} ({}{required})", key.doc, key.kind));
            let _ = match &key.default {
                _ if key.required => writeln!(text, "{} = \"\"", key.name),
                Some(value) => writeln!(text, "{} = {}", key.name, show(value)),
                None => writeln!(text, "# {} =", key.name),
            };
        }
    }
    text
}

fn comment(text: &mut String, paragraph: &str) {
    let mut line = String::from("#");
    for word in paragraph.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            let _ = writeln!(text, "{line}");
            line = "#".into();
        }
        let _ = write!(line, " {word}");
    }
    let _ = writeln!(text, "{line}");
}

/// The reference page `docs/recipe-reference.md`.
pub fn reference() -> String {
    let mut text = String::from(
        "# Recipe reference\n\n\
         Made from the program's own declarations of its keys; `LOKR_UPDATE_DOCS=1 cargo test --release -p trainer` writes it anew.\n\n\
         - A recipe is a TOML file. Every key stands in its section; a key that is not listed here is an error.\n\
         - **Relative paths start at the current working directory**, as in sd-scripts, not at the recipe's folder.\n\
         - `--set section.key=value` on the command line replaces a key. The value is written as in TOML; a text may stand without\n  \
           quotes. `--set 'dataset.subsets[0].num_repeats=2'` reaches into a subset.\n\
         - A step is one optimizer step, whatever the accumulation and the number of processes.\n\
         - The complete recipe, defaults written out, is saved beside every run.\n\
         - \"sd-scripts\" names the option of kohya-ss/sd-scripts with the same meaning; `=` is the same name, `-` means that it has none.\n",
    );
    for section in &catalog() {
        section_page(&mut text, section);
    }
    text.push_str("\n## Options of sd-scripts without a key here\n\n| option | instead |\n|---|---|\n");
    for (name, advice) in WITHOUT_COUNTERPART {
        let _ = writeln!(text, "| `{name}` | {} |", cell(advice));
    }
    text
}

fn section_page(text: &mut String, section: &SectionDoc) {
    let title = match section.name {
        "dataset.subsets" => "[[dataset.subsets]]".into(),
        "sample.prompts" => "Tables in sample.prompts".into(),
        name => format!("[{name}]"),
    };
    let _ = writeln!(text, "\n## {title}\n\n{}\n\n| key | value | default | sd-scripts | meaning |\n|---|---|---|---|---|", section.doc);
    for key in &section.keys {
        let _ = writeln!(text, "| `{}` | {} | {} | {} | {} |", key.name, cell(&key.kind), default(key), origin(key), cell(&key.doc));
    }
}

fn default(key: &Key) -> String {
    match &key.default {
        _ if key.required => "**required**".into(),
        Some(value) => format!("`{}`", cell(&show(value))),
        None => "not set".into(),
    }
}

fn origin(key: &Key) -> String {
    match key.origin {
        Origin::Same => "=".into(),
        Origin::Ours => "-".into(),
        Origin::Named(names) => names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", "),
    }
}

/// A value as TOML, small numbers as people write them: `2e-5`, not `0.00002`.
pub(super) fn show(value: &Value) -> String {
    match value {
        Value::Float(x) if *x != 0.0 && x.abs() < 1e-3 => format!("{x:e}"),
        Value::Array(list) if list.iter().all(Value::is_float) => format!("[{}]", list.iter().map(show).collect::<Vec<_>>().join(", ")),
        other => other.to_string(),
    }
}

/// Text inside a table of Markdown.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}
