//! The house rules that a compiler does not see: which crate may know which, and that commands and recipes in the documents work.

use std::path::{Path, PathBuf};

use crate::support::*;

/// Crates of this workspace that a crate may know (docs/architecture.md). A crate that is not listed may know all but `cli`.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("storage", &[]),
    ("random", &[]),
    ("ops", &[]),
    ("optim", &[]),
    ("dist", &[]),
    ("sdxl", &["ops", "storage"]),
    ("lokr", &["ops", "sdxl", "random", "storage"]),
    ("diffusion", &["random"]),
    ("dataset", &["storage", "random"]),
    ("cli", &["trainer"]),
];

/// The first edge that the rules forbid, if there is one. `manifests`: crate and text of its Cargo.toml.
fn first_forbidden_edge(manifests: &[(String, String)]) -> Option<String> {
    for (name, manifest) in manifests {
        let table: toml::Table = manifest.parse().expect("TOML");
        let mut tables = vec![&table];
        tables.extend(table.get("target").and_then(|t| t.as_table()).into_iter().flat_map(|t| t.values()).filter_map(|t| t.as_table()));
        let sections = ["dependencies", "dev-dependencies", "build-dependencies"];
        let known = tables.iter().flat_map(|t| sections.iter().filter_map(|s| t.get(*s)?.as_table())).flat_map(|d| d.iter());
        for (key, value) in known {
            let package = value.get("package").and_then(|p| p.as_str()).unwrap_or(key);
            if !manifests.iter().any(|(other, _)| other == package) {
                continue;
            }
            let allowed = MAY_KNOW.iter().find(|(n, _)| n == name).map_or(package != "cli", |(_, may)| may.contains(&package));
            if !allowed {
                return Some(format!("crates/{name} must not know crates/{package}"));
            }
        }
    }
    None
}

#[test]
fn no_crate_knows_what_it_must_not_know() {
    let mut manifests = Vec::new();
    for entry in std::fs::read_dir(repository().join("crates")).expect("the crates") {
        let folder = entry.expect("an entry").path();
        if folder.join("Cargo.toml").exists() {
            manifests.push((folder.file_name().expect("a name").to_string_lossy().into_owned(), text(folder.join("Cargo.toml"))));
        }
    }
    manifests.sort();
    for (name, _) in MAY_KNOW {
        assert!(manifests.iter().any(|(n, _)| n == name), "crates/{name} is gone: change the rules");
    }
    assert_eq!(first_forbidden_edge(&manifests), None);
    // The rule can fail: each kind of table is looked at.
    for section in ["dependencies", "dev-dependencies", "target.'cfg(unix)'.dependencies"] {
        let mut wrong = manifests.clone();
        let (_, ops) = wrong.iter_mut().find(|(n, _)| n == "ops").expect("it was found above");
        *ops = format!("[{section}]\nother-name = {{ path = \"../storage\", package = \"storage\" }}\n");
        assert_eq!(first_forbidden_edge(&wrong).as_deref(), Some("crates/ops must not know crates/storage"));
    }
}

/// README.md and the pages of docs/, as far as they exist.
fn pages() -> Vec<PathBuf> {
    let docs = std::fs::read_dir(repository().join("docs")).into_iter().flatten().map(|e| e.expect("an entry").path());
    let mut pages: Vec<PathBuf> = docs.filter(|p| p.extension().is_some_and(|e| e == "md")).collect();
    pages.extend(["README.md", "assets/README.md"].map(|p| repository().join(p)).into_iter().filter(|p| p.exists()));
    pages.sort();
    pages
}

/// Recipes that are in the repository.
fn recipes() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(repository().join("configs")).expect("recipes").map(|e| e.expect("an entry").path()).collect();
    found.retain(|p| p.extension().is_some_and(|e| e == "toml"));
    found.sort();
    found
}

/// A line of a shell as words, if it runs lokr: `lokr ...`, or `cargo run ... -- ...` of it.
fn words_of_command(line: &str) -> Option<Vec<String>> {
    let line = line.trim().trim_start_matches(['$', '#']).trim();
    let rest = match line.strip_prefix("cargo run ") {
        Some(cargo) => cargo.split_once("-- ").filter(|(options, _)| !options.contains("-p ") || options.contains("-p cli"))?.1,
        None => line.strip_prefix("lokr ").or_else(|| line.strip_prefix("target/release/lokr "))?,
    };
    let (mut words, mut word, mut quote, mut open) = (Vec::new(), String::new(), None, false);
    for c in rest.chars() {
        match (c, quote) {
            (c, Some(q)) if c == q => quote = None,
            (c, Some(_)) => word.push(c),
            ('\'' | '"', None) => (quote, open) = (Some(c), true),
            (c, None) if c.is_whitespace() => {
                if open || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                open = false;
            }
            // What follows is the shell's.
            ('#' | '>' | '|' | ';' | '&', None) if word.is_empty() => break,
            (c, None) => word.push(c),
        }
    }
    if open || !word.is_empty() {
        words.push(word);
    }
    (!words.is_empty()).then_some(words)
}

/// Commands of a text: whole lines of code blocks (continued ones joined), and code within lines. `true`: a line of a block, which must
/// be complete.
fn commands(text: &str) -> Vec<(Vec<String>, bool)> {
    let joined = text.replace("\\\n", " ");
    let (mut found, mut block) = (Vec::new(), false);
    for line in joined.lines() {
        if line.trim_start().starts_with("```") {
            block = !block;
        } else if block || line.starts_with("# ") {
            found.extend(words_of_command(line).map(|w| (w, true)));
        } else {
            found.extend(line.split('`').skip(1).step_by(2).filter_map(words_of_command).map(|w| (w, false)));
        }
    }
    found
}

/// What is wrong with a command, run where none of its files exists: only the meaning of the words is looked at.
fn fault(folder: &Path, words: &[String], complete: bool) -> Option<String> {
    let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
    // In a sentence a command may be named without its arguments: then only those that stand there are looked at. So are those of the one that
    // would write gigabytes.
    if !complete || words.first() == Some(&"init-base") {
        words.retain(|w| *w != "..." && *w != "…");
        words.push("--help");
    }
    let ran = lokr(folder, &words);
    (ran.status == Some(2)).then(|| ran.all())
}

/// Source files under `folder` of which only a build for GPUs has parts.
fn files_for_gpus(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.expect("an entry").path();
        let has = |parts: &[&str]| parts.iter().any(|part| text(&path).contains(part));
        match path.extension().and_then(|e| e.to_str()) {
            None if path.is_dir() => found.extend(files_for_gpus(&path)),
            Some("cu") => found.push(path),
            Some("rs") if has(&["feature = \"cuda\"", "feature = \"cudnn\"", "feature = \"nccl\"", "cudarc::"]) => found.push(path),
            _ => {}
        }
    }
    found.sort();
    found
}

#[test]
fn every_file_with_lines_that_only_a_gpu_runs_is_on_the_page_about_gpus() {
    let page = text(repository().join("docs/cuda.md"));
    let crates = std::fs::read_dir(repository().join("crates")).expect("the crates").map(|e| e.expect("an entry").path());
    let files: Vec<PathBuf> = crates.flat_map(|c| ["src", "kernels"].map(|folder| files_for_gpus(&c.join(folder)))).flatten().collect();
    let names = files.iter().map(|f| f.strip_prefix(repository()).expect("inside").display().to_string());
    // What a crate's `lib.rs` says of GPUs is which modules it has.
    let missing: Vec<String> = names.filter(|n| !n.ends_with("/lib.rs") && !page.contains(&format!("`{n}`"))).collect();
    assert!(missing.is_empty(), "docs/cuda.md does not say how these were checked: {missing:?}");
    assert!(files.len() > 20, "the search finds only {files:?}");
}

#[test]
fn the_commands_in_the_documents_are_understood() {
    let world = World::new("documents");
    let empty = world.path("empty");
    std::fs::create_dir(&empty).expect("a folder");
    let (mut tried, mut wrong) = (0, Vec::new());
    for page in pages().into_iter().chain(recipes()) {
        for (words, complete) in commands(&text(&page)) {
            tried += 1;
            if let Some(fault) = fault(&empty, &words, complete) {
                wrong.push(format!("{}: lokr {}\n{fault}", page.display(), words.join(" ")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(tried > 0, "no page names a command: is the search right?");
}

#[test]
fn the_search_for_commands_finds_them_and_a_wrong_one_fails() {
    let page = "Run `lokr train`, or `lokr verify RUN`:\n```sh\n$ lokr train --config \"my file.toml\" \\\n  --set 'a.b=1' # try\n\
                cargo run --release -- recipe > mine.toml\ncargo test --release\n```\nNot lokr sample, nor `cargo fmt`.\n";
    let found: Vec<String> = commands(page).iter().map(|(w, complete)| format!("{complete}: {}", w.join("|"))).collect();
    assert_eq!(found, ["false: train", "false: verify|RUN", "true: train|--config|my file.toml|--set|a.b=1", "true: recipe"]);
    let world = World::new("documents-wrong");
    let words = |text: &str| text.split(' ').map(str::to_string).collect::<Vec<_>>();
    for (command, complete, wrong) in [
        ("train --config x.toml", true, false),
        ("train", true, true),
        ("train", false, false),
        ("train --confg x.toml", false, true),
        ("export merged --format ckpt", false, true),
        ("tarin", false, true),
    ] {
        assert_eq!(fault(&world.folder, &words(command), complete).is_some(), wrong, "{command}");
    }
}

#[test]
fn the_recipes_in_the_repository_are_understood_and_break_no_rule() {
    let world = World::new("recipes");
    // Where none of their files exists, that is all that may be wrong with them.
    let empty = world.path("empty");
    std::fs::create_dir(&empty).expect("a folder");
    let complaints = |path: &Path, set: &[&str]| {
        let path = path.display().to_string();
        let mut args = vec!["train", "--config", &path, "--set", "output.dir=run", "--set", "model.base=no-model.safetensors"];
        set.iter().for_each(|s| args.extend(["--set", s]));
        let err = lokr(&empty, &args).refusal();
        let what = err.lines().map(|l| l.trim_start_matches("error:").trim());
        let absent = |l: &&str| l.ends_with("does not exist") || l.starts_with("hint: ") || l.starts_with("the recipe has ");
        what.filter(|l| !absent(l)).map(str::to_string).collect::<Vec<_>>()
    };
    let recipes = recipes();
    for recipe in &recipes {
        assert_eq!(complaints(recipe, &[]), [""; 0], "{}", recipe.display());
    }
    // What `lokr recipe` prints is a recipe with gaps, no more.
    let template = world.path("template.toml");
    std::fs::write(&template, lokr(&world.folder, &["recipe"]).good().out).expect("written");
    let gaps = complaints(&template, &["train.max_train_steps=10", "dataset.subsets[0].image_dir=pictures"]);
    assert_eq!(gaps, [""; 0]);
    // A rule that is broken would be seen.
    let broken = complaints(&recipes[0], &["train.max_train_epochs=3", "train.max_train_steps=3000"]);
    assert_eq!(broken, ["train.max_train_steps = 3000 and train.max_train_epochs = 3 both set the length of the run"]);
}
