//! A dataset over an index: the same commands as over a folder, captions by rules, checks and explanations.

use std::collections::HashSet;
use std::ops::ControlFlow;

use dataset::check::{CheckOptions, check};
use dataset::explain::{RunShape, explain, sample_of_id, visits_of_sample, visits_of_step};
use dataset::index::{Index, Source};
use dataset::select::{SampleFrom, SelectionConfig, select};
use dataset::tags::{CaptionRules, Part};
use dataset::{CaptionContext, Dataset, DatasetConfig, Error, SubsetConfig, histogram};

fn over(index: &std::path::Path, subset: SubsetConfig) -> DatasetConfig {
    DatasetConfig {
        resolution: (128, 128),
        min_bucket_reso: 64,
        max_bucket_reso: 256,
        bucket_reso_steps: 32,
        subsets: vec![SubsetConfig { index: Some(index.into()), ..subset }],
        ..Default::default()
    }
}

fn at(position: u64) -> CaptionContext {
    CaptionContext { seed: 5, epoch: 0, position, step: 0, max_train_steps: 10 }
}

#[test]
fn an_index_of_a_folder_gives_what_the_folder_gives() {
    let images: Vec<_> = (0..6).map(|i| super::png(100 + 20 * i, 128, i as u8)).collect();
    let names: Vec<String> = (0..6).map(|i| format!("{i}.png")).collect();
    let texts: Vec<String> = (0..6).map(|i| format!("{i}.txt")).collect();
    let mut files: Vec<(&str, &[u8])> = names.iter().zip(&images).map(|(n, i)| (n.as_str(), i.as_slice())).collect();
    files.extend(texts.iter().map(|t| (t.as_str(), b"one, two, three, four".as_slice())));
    let dir = super::folder(&files);
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("i.sqlite");
    super::index::build(&path, vec![Source::folder(dir.path())]);
    let subset = SubsetConfig { shuffle_caption: true, flip_aug: true, num_repeats: 2, ..Default::default() };
    let mut of_folder = super::small_config(dir.path());
    of_folder.subsets[0] = SubsetConfig { image_dir: dir.path().into(), ..subset.clone() };
    let (folder, report) = Dataset::open(&of_folder).unwrap();
    let (indexed, indexed_report) = Dataset::open(&over(&path, subset)).unwrap();
    assert_eq!(folder.samples(), indexed.samples());
    assert_eq!((folder.buckets(), report.buckets, report.visits), (indexed.buckets(), indexed_report.buckets, indexed_report.visits));
    assert_eq!(folder.plan(3, 1, 4).unwrap().fingerprint(), indexed.plan(3, 1, 4).unwrap().fingerprint());
    for n in 0..6 {
        assert_eq!(folder.caption(n, at(7)).unwrap(), indexed.caption(n, at(7)).unwrap());
        assert_eq!(folder.load_pixels(n, 1, 0, 9).unwrap(), indexed.load_pixels(n, 1, 0, 9).unwrap());
    }
    assert_eq!(indexed.latent_keys().unwrap().count(), 12);
    assert_ne!(folder.fingerprint(), indexed.fingerprint());
    // The same index under another name, and its images elsewhere, are the same dataset.
    let moved = tempfile::tempdir().unwrap();
    std::fs::copy(&path, moved.path().join("j.sqlite")).unwrap();
    let mut config = indexed.config().clone();
    (config.subsets[0].index, config.subsets[0].image_dir) = (Some(moved.path().join("j.sqlite")), dir.path().into());
    assert_eq!(Dataset::open(&config).unwrap().0.fingerprint(), indexed.fingerprint());
}

#[test]
fn captions_of_visits_follow_the_rules() {
    let (_dir, index, _) = super::index::golden_index();
    let rules = |name: &str| SubsetConfig { caption_rules: Some(name.into()), selection: "kohaku-delta".into(), ..Default::default() };
    let (dataset, report) = Dataset::open(&over(index.path(), rules("kohaku-epsilon"))).unwrap();
    assert!(report.to_string().contains("images taken"), "{report}");
    let mut drawn = HashSet::new();
    let (mut kept_tags, mut flexible, mut left) = (0, 0, 0);
    for n in 0..dataset.len() as u32 {
        let written = dataset.sample(n).unwrap().caption.clone();
        let (kept, rest) = written.split_once("|||").unwrap();
        let kept: Vec<&str> = kept.split(", ").filter(|t| !t.is_empty()).collect();
        let rest: HashSet<&str> = rest.split(", ").collect();
        for position in 0..60 {
            let caption = dataset.caption(n, at(position)).unwrap();
            let tags: Vec<&str> = if caption.is_empty() { vec![] } else { caption.split(", ").collect() };
            assert_eq!(tags[..kept.len()], kept, "{written} -> {caption}");
            assert!(tags[kept.len()..].iter().all(|tag| rest.contains(tag)), "{written} -> {caption}");
            (kept_tags, flexible, left) = (kept_tags + kept.len(), flexible + rest.len(), left + tags.len() - kept.len());
            drawn.insert(caption);
        }
        assert_eq!(dataset.caption(n, at(3)).unwrap(), dataset.caption(n, at(3)).unwrap());
    }
    let rate = 1.0 - left as f64 / flexible as f64;
    // Four standard errors of the share of dropped ones among that many draws.
    let error = 4.0 * (0.15f64 * 0.85 / flexible as f64).sqrt();
    assert!((rate - 0.15).abs() < error && kept_tags > 0 && drawn.len() > 1000, "{rate} of {flexible}, {} captions", drawn.len());
    // The order of prompts: the words stand at the end, in their order.
    let (card, _) = Dataset::open(&over(index.path(), rules("model-card"))).unwrap();
    let written = card.sample(0).unwrap().caption.clone();
    let parts: Vec<&str> = written.split("|||").collect();
    assert_eq!(parts.len(), 3, "{written}");
    assert!(card.caption(0, at(1)).unwrap().ends_with(parts[2].trim_start_matches(", ")), "{written}");
}

#[test]
fn rules_from_a_file() {
    let dir = super::folder(&[
        ("drop.toml", b"base = \"kohaku-delta\"\ndrop_tags = [\"solo\"]\n[[groups]]\nparts = [\"special\", \"artist\"]\nkept = true\n[[groups]]\nparts = [\"general\", \"rating\"]\ndrop = 1.0\ndrop_only = [\"general\"]\n[ratings]\ngeneral = [\"sfw\"]\n"),
        ("typo.toml", b"grups = []\n"),
        ("twice.toml", b"[[groups]]\nparts = [\"meta\", \"meta\"]\n"),
        ("kept.toml", b"[[groups]]\nparts = [\"meta\"]\nkept = true\ndrop = 0.1\n"),
        ("quality.toml", b"[quality]\nwords = [\"a\"]\n"),
        ("select.toml", b"seed = 3\nratings = [\"general\"]\n[[ranges]]\nto = 4000000\nsample = 100\n"),
        ("select-typo.toml", b"[[ranges]]\nform = 1\n"),
    ]);
    let load = |name: &str| CaptionRules::load(dir.path().join(name).to_str().unwrap());
    let rules = load("drop.toml").unwrap();
    assert_eq!(
        (rules.groups.len(), rules.groups[1].drop_only.as_slice(), rules.ratings.general[0].as_str()),
        (2, &[Part::General][..], "sfw")
    );
    assert_eq!(rules.ratings.explicit, ["explicit", "nsfw"]);
    for (name, part) in [
        ("typo.toml", "unknown field `grups`"),
        ("twice.toml", "the part Meta stands 2 times"),
        ("kept.toml", "groups[0] is kept, and yet"),
        ("quality.toml", "quality has 1 words"),
        ("none.toml", "no such file"),
    ] {
        let error = load(name).unwrap_err();
        let text = format!("{error} / {}", error.hint().unwrap());
        assert!(text.contains(part), "{text}");
    }
    let path = dir.path().join("select.toml");
    let (_dir, index, _) = super::index::golden_index();
    let config = SelectionConfig::load(path.to_str().unwrap()).unwrap();
    let (taken, _) = select(&index, &config).unwrap();
    let ids = |config: &SelectionConfig| select(&index, config).unwrap().0.iter().map(|t| t.id).collect::<Vec<_>>();
    assert!(taken.iter().all(|t| t.id <= 4_000_000) && !taken.is_empty());
    assert_eq!(ids(&config), ids(&config));
    let error = SelectionConfig::load(dir.path().join("select-typo.toml").to_str().unwrap()).unwrap_err();
    assert!(error.to_string().contains("unknown field `form`"), "{error}");
    // Keyed: exactly as many as asked for, others with another seed, and a sample holds every smaller one.
    let all = index.scan(|row| Some(row.id)).unwrap();
    let sample = |seed, k| {
        let range = dataset::select::IdRange { from: 0, to: None, sample: Some(k) };
        SelectionConfig { ranges: vec![range], seed, sample_from: SampleFrom::All, ..Default::default() }.choose(&all)
    };
    let (small, large) = (sample(1, 100), sample(1, 200));
    assert!(small.len() == 100 && large.len() == 200 && small.iter().all(|id| large.contains(id)));
    assert_ne!(sample(2, 100), small);
    assert_eq!(sample(1, 1 << 20), all);
}

#[test]
fn conditions_hold_and_are_counted() {
    let (_dir, index, _) = super::index::golden_index();
    let with = |config: SelectionConfig| select(&index, &config).unwrap();
    let (plain, report) = with(SelectionConfig::default());
    assert_eq!(report.images, report.taken + report.refused.values().sum::<usize>());
    let tags = index.tags().unwrap();
    let has = |id: u32, name: &str| index.post(id).unwrap().tags.contains(&tags.find(name).unwrap());
    let name = tags.get(index.post(plain[0].id).unwrap().tags[0]).unwrap().0.to_string();
    let split = |all: Vec<String>, none: Vec<String>| with(SelectionConfig { tags_all: all, tags_none: none, ..Default::default() }).0;
    let (yes, no) = (split(vec![name.clone()], vec![]), split(vec![], vec![name.clone()]));
    assert_eq!(yes.len() + no.len(), plain.len());
    assert!(!yes.is_empty() && yes.iter().all(|t| has(t.id, &name)) && no.iter().all(|t| !has(t.id, &name)));
    let any = with(SelectionConfig { tags_any: vec![name.clone()], ..Default::default() }).0;
    assert_eq!(any, yes);
    let rows = |config| with(config).0.iter().map(|t| index.row(t.id).unwrap()).collect::<Vec<_>>();
    let scores = rows(SelectionConfig { score_min: Some(10), year_min: Some(2011), ..Default::default() });
    assert!(scores.iter().all(|r| r.score >= Some(10) && r.date >= Some(20_110_000)) && scores.len() < plain.len());
    let error = select(&index, &SelectionConfig { tags_all: vec!["no_such_tag".into()], ..Default::default() }).unwrap_err();
    assert!(error.to_string().contains("`no_such_tag`: the index has no such tag"), "{error}");
    let none = over(index.path(), SubsetConfig { selection: "kohaku-delta".into(), caption_rules: Some("x".into()), ..Default::default() });
    assert!(matches!(Dataset::open(&none), Err(Error::Rules { kind: "caption rules", .. })));
}

#[test]
fn a_step_is_explained() {
    let (_dir, index, _) = super::index::golden_index();
    let subset = SubsetConfig { caption_rules: Some("kohaku-epsilon".into()), ..Default::default() };
    let (dataset, _) = Dataset::open(&over(index.path(), subset)).unwrap();
    let run = RunShape { seed: 4, batch_size: 2, gradient_accumulation_steps: 3, max_train_steps: None };
    let mut seen = HashSet::new();
    let steps = dataset.plan(4, 0, 2).unwrap().len().div_ceil(3) as u64;
    for step in 0..steps {
        for visit in visits_of_step(&dataset, &run, step).unwrap() {
            assert!(seen.insert(visit.sample));
            assert_eq!(visits_of_sample(&dataset, &run, visit.sample, Some(step)).unwrap(), [visit]);
            let told = explain(&dataset, &run, visit).unwrap();
            let context = CaptionContext { seed: 4, epoch: 0, position: visit.position, step, max_train_steps: 1 };
            assert_eq!(told.caption, dataset.caption(visit.sample, context).unwrap());
            let count = |text: &str| text.split(", ").filter(|t| !t.is_empty()).count();
            let tags: usize = told.parts.iter().map(|(_, tags)| tags.len()).sum();
            assert_eq!(tags - told.dropped.len(), count(&told.caption), "{told:?}");
            assert!(told.dropped.iter().all(|tag| told.written.contains(tag)) && !told.reasons.is_empty());
        }
    }
    assert_eq!(seen.len(), dataset.len());
    let second = visits_of_step(&dataset, &run, steps).unwrap();
    assert!(second.iter().all(|v| v.epoch == 1));
    let id = index.scan(|row| (row.state == dataset::index::State::Absent).then_some(row.id)).unwrap()[0];
    assert!(matches!(sample_of_id(&dataset, id), Err(Error::NotSelected { .. })));
}

#[test]
fn a_check_finds_what_would_fail() {
    let (good, small, late) = (super::png(128, 128, 1), super::png(20, 20, 2), super::png(128, 128, 3));
    let mut cut = super::png(128, 128, 4);
    cut.truncate(cut.len() - 40);
    let dir = super::folder(&[
        ("a.png", &good),
        ("a.txt", b"x"),
        ("b.png", &good),
        ("b.txt", b" "),
        ("c.png", &small),
        ("c.txt", b"x"),
        ("d.png", &cut),
        ("d.txt", b"x"),
        ("e.png", &late),
        ("e.txt", b"x"),
    ]);
    let path = dir.path().join("i.sqlite");
    super::index::build(&path, vec![Source::folder(dir.path())]);
    let (dataset, _) = Dataset::open(&over(&path, SubsetConfig::default())).unwrap();
    std::fs::write(dir.path().join("e.png"), super::png(130, 128, 3)).unwrap();
    let mut calls = 0;
    let report = check(&dataset, &CheckOptions::default(), &mut |_, _| {
        calls += 1;
        ControlFlow::Continue(())
    })
    .unwrap();
    let text = report.to_string();
    let counts = [&report.broken, &report.changed, &report.empty_captions, &report.duplicates, &report.enlarged].map(|n| n.count);
    assert_eq!((report.samples, counts, calls), (5, [1, 1, 1, 1, 1], 1), "{text}");
    for part in ["d.png: ", "e.png: 130x128, was 128x128", "b.png is ", "c.png: 6.4 times"] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
    let stopped = check(&dataset, &CheckOptions::default(), &mut |_, _| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(Error::Stopped)));
}

#[test]
fn histograms_show_every_bucket() {
    let (_dir, index, _) = super::index::golden_index();
    let (dataset, _) = Dataset::open(&over(index.path(), SubsetConfig::default())).unwrap();
    let counts = dataset.bucket_counts();
    let text = histogram::text(&counts, 4);
    let svg = histogram::svg(&counts, 4);
    assert_eq!(text.lines().count(), counts.len() + 2);
    assert!(text.contains(&format!("{} images", dataset.len())) && text.contains("every image is used"), "{text}");
    assert_eq!(svg.matches("<rect").count(), counts.len() + 1);
    for b in &counts {
        assert!(text.contains(&format!("{}x{}", b.size.0, b.size.1)) && svg.contains(&format!("{} x {}", b.size.0, b.size.1)));
    }
}

#[test]
fn keys_that_contradict_each_other() {
    let (_dir, index, _) = super::index::golden_index();
    let drawn = SubsetConfig { caption_rules: Some("kohaku-epsilon".into()), shuffle_caption: true, ..Default::default() };
    let error = Dataset::open(&over(index.path(), drawn)).unwrap_err();
    assert!(error.to_string().contains("shuffle_caption") && error.hint().unwrap().contains("remove"), "{error}");
    let folder = SubsetConfig { image_dir: "x".into(), selection: "kohaku-delta".into(), ..Default::default() };
    let error = DatasetConfig { subsets: vec![folder], ..Default::default() }.check().unwrap_err();
    assert!(error.to_string().contains("have no meaning without subsets[0].index"), "{error}");
    let one = over(index.path(), SubsetConfig::default());
    let twice = DatasetConfig { subsets: [one.subsets.clone(), one.subsets.clone()].concat(), ..one.clone() };
    assert!(twice.check().unwrap_err().to_string().contains("take the same selection of the index"));
    let none = over(index.path(), SubsetConfig { selection: "none".into(), ..Default::default() });
    let error = Dataset::open(&none).unwrap_err();
    assert!(error.to_string().contains("selection `none`") && error.hint().unwrap().contains("kohaku-epsilon"), "{error}");
    assert!(Index::open(std::path::Path::new("/nowhere/i.sqlite")).is_err());
}
