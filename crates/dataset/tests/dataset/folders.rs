//! Folders: what is found, in which order, with which captions; and what each visit sees.

use dataset::{CaptionContext, CropCondition, Dataset, DatasetConfig, Error, OnBrokenImage, Report, SubsetConfig};

fn open(config: &DatasetConfig) -> (Dataset, Report) {
    Dataset::open(config).unwrap()
}

fn names(dataset: &Dataset) -> Vec<String> {
    dataset.samples().iter().map(|s| s.path.file_name().unwrap().to_string_lossy().into_owned()).collect()
}

#[test]
fn extensions_order_and_subfolders() {
    let png = super::png(128, 128, 0);
    let dir = super::folder(&[
        ("b.PNG", &png),
        ("a.jpeg", &png),
        ("notes.md", b"no image"),
        (".hidden.png", b"not looked at"),
        ("3_amber_cat/x.png", &png),
        ("3_amber_cat/deeper/y.png", &png),
        ("0_off/z.png", &png),
        ("other/z.png", &png),
    ]);
    let mut config = super::small_config(dir.path());
    config.subsets[0].num_repeats = 2;
    let (dataset, report) = open(&config);
    assert_eq!(names(&dataset), ["a.jpeg", "b.PNG", "x.png"]);
    assert_eq!(dataset.samples().iter().map(|s| s.repeats).collect::<Vec<_>>(), [2, 2, 6]);
    assert_eq!(dataset.samples()[2].caption, "amber_cat");
    assert_eq!((report.visits, report.class_token_captions, report.missing_captions.count), (10, 1, 2));
    assert_eq!(report.ignored_folders.count, 2, "{report}");
    assert_eq!(dataset.plan(0, 0, 3).unwrap().visits(), 10);
}

#[test]
fn missing_and_empty_folders() {
    let dir = super::folder(&[("sub/a.png", &super::png(8, 8, 0)), ("file", b"")]);
    let fails = |path: &str| {
        let mut config = super::small_config(dir.path());
        config.subsets[0].image_dir = dir.path().join(path);
        Dataset::open(&config).unwrap_err()
    };
    assert!(fails("absent").to_string().ends_with("absent` does not exist"), "{}", fails("absent"));
    assert!(fails("absent").to_string().starts_with("subsets[0].image_dir = "));
    assert!(fails("file").to_string().ends_with("file` is not a folder"));
    let none = fails("");
    assert!(matches!(none, Error::NoImages { ignored_folders: 1, .. }), "{none}");
    assert!(none.hint().unwrap().contains("N_name"));
}

#[test]
fn captions_and_what_is_said_of_them() {
    let png = super::png(128, 128, 0);
    let images = ["a", "b", "c", "d", "e", "f_1_2_3_4", "g"].map(|stem| format!("{stem}.png"));
    let mut files: Vec<(&str, &[u8])> = images.iter().map(|name| (name.as_str(), png.as_slice())).collect();
    files.extend([
        ("a.txt", b"\xEF\xBB\xBF\r\n  one, two \r\nsecond\n".as_slice()),
        ("b.txt", b" \n"),
        ("c.caption", b"from caption"),
        ("d.txt", b"caf\xE9"),
        ("e.txt", b"nul\0"),
        ("f.txt", b"face"),
    ]);
    let dir = super::folder(&files);
    let mut config = super::small_config(dir.path());
    let (dataset, report) = open(&config);
    let captions: Vec<&str> = dataset.samples().iter().map(|s| s.caption.as_str()).collect();
    assert_eq!(captions, ["one, two", "", "from caption", "face", ""]);
    assert_eq!((report.captions_from_files, report.fallback_captions), (3, 1));
    assert_eq!((report.empty_captions.count, report.missing_captions.count, report.broken_captions.count), (1, 1, 2));
    let text = report.to_string();
    for part in ["d.txt: it is not UTF-8 (byte 3)", "e.txt: it holds a NUL (byte 3)", "g.png", "b.png", "left out, caption not readable: 2"]
    {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }

    config.subsets[0].class_tokens = Some("cls".into());
    config.subsets[0].enable_wildcard = true;
    let (dataset, report) = open(&config);
    assert_eq!(dataset.samples()[0].caption, "one, two\nsecond");
    assert_eq!(dataset.samples()[4].caption, "cls");
    assert_eq!((report.class_token_captions, report.missing_captions.count), (1, 0));

    config.subsets[0].caption_extension = ".caption".into();
    assert_eq!(open(&config).1.captions_from_files, 1);
    config.subsets[0].caption_extension = ".txt".into();
    config.on_broken_image = OnBrokenImage::Fail;
    assert!(Dataset::open(&config).unwrap_err().to_string().ends_with("d.txt` cannot be used: it is not UTF-8 (byte 3)"));
}

/// Width and height come from the oriented picture already when only headers are read.
#[test]
fn exif_orientation_decides_the_bucket() {
    let bytes = std::fs::read(super::own_golden("exif-6.jpg")).unwrap();
    let dir = super::folder(&[("a.jpg", &bytes)]);
    let (dataset, report) = open(&super::small_config(dir.path()));
    let sample = dataset.sample(0).unwrap();
    assert_eq!((sample.size, sample.placement.bucket, report.oriented), ((16, 24), (96, 160), 1));
    let loaded = dataset.load_pixels(0, 0, 0, 0).unwrap();
    assert_eq!((loaded.pixels.original_size, loaded.pixels.target_size), ((16, 24), (96, 160)));
    assert_eq!(loaded.pixels.time_ids(), loaded.view.time_ids);
    assert_eq!(loaded.pixels.data.len(), 3 * 96 * 160);
}

#[test]
fn no_upscale_leaves_out_what_is_too_small() {
    let dir = super::folder(&[("a.png", &super::png(20, 200, 0)), ("b.png", &super::png(100, 70, 0))]);
    let config = DatasetConfig { bucket_no_upscale: true, ..super::small_config(dir.path()) };
    let (dataset, report) = open(&config);
    assert_eq!((dataset.len(), dataset.sample(0).unwrap().placement.bucket), (1, (96, 64)));
    assert!(report.broken_images.first[0].contains("bucket_reso_steps = 32"), "{report}");
}

#[test]
fn without_buckets_everything_is_cropped_to_one_size() {
    let dir = super::folder(&[("a.png", &super::png(50, 200, 0)), ("b.png", &super::png(300, 70, 0))]);
    let (dataset, report) = open(&DatasetConfig { enable_bucket: false, ..super::small_config(dir.path()) });
    assert_eq!((report.buckets.len(), report.buckets[0].size, report.buckets[0].enlarged), (1, (128, 128), 2));
    // 50x200 becomes 128x512 and keeps a quarter, 300x70 becomes 549x128.
    let loss = (0.75 + (1.0 - 128.0 / 549.0)) / 2.0;
    assert!((report.buckets[0].crop_loss - loss).abs() < 1e-9);
    assert_eq!(dataset.view(0, 0, 0, 0).unwrap().time_ids, [200, 50, 192, 0, 128, 128]);
}

#[test]
fn flips_and_random_crops_follow_the_key() {
    let dir = super::folder(&[("a.png", &super::png(400, 128, 0))]);
    let mut config = DatasetConfig { enable_bucket: false, ..super::small_config(dir.path()) };
    config.subsets[0] = SubsetConfig { flip_aug: true, random_crop: true, ..config.subsets[0].clone() };
    let (dataset, _) = open(&config);
    let view = |position| dataset.view(0, 3, 1, position).unwrap();
    assert_eq!(view(5), view(5));
    assert_ne!(view(5), dataset.view(0, 3, 2, 5).unwrap());
    // 400 flips of a fair coin: 200 +- 5 standard deviations of 10.
    let flips = (0..400).filter(|&p| view(p).flipped).count();
    assert!((150..=250).contains(&flips), "{flips}");
    let lefts: std::collections::BTreeSet<u32> = (0..4000).map(|p| view(p).pixel_crop.0).collect();
    assert_eq!((lefts.first(), lefts.last()), (Some(&0), Some(&272)), "all of 400 - 128 is used");
    let v = (0..).map(view).find(|v| v.flipped).unwrap();
    assert_eq!(v.crop_left_top, (272 - v.pixel_crop.0, 0));
    let loaded = (0..40).map(|p| dataset.load_pixels(0, 3, 1, p).unwrap()).find(|l| l.view.flipped).unwrap();
    // The gradient grows to the right; mirrored, it falls.
    assert!(loaded.pixels.data[0] > loaded.pixels.data[127]);
    assert!(dataset.latent_keys().err().unwrap().to_string().contains("random_crop = true excludes cache_latents"));
}

#[test]
fn sd_scripts_crop_condition_reaches_the_view() {
    let dir = super::folder(&[("a.png", &super::png(100, 150, 0))]);
    let config = DatasetConfig { enable_bucket: false, crop_condition: CropCondition::SdScripts, ..super::small_config(dir.path()) };
    // Fitted inside 128x128 it is 85.33x128: 21 pixels are left at the left.
    assert_eq!(open(&config).0.view(0, 0, 0, 0).unwrap().crop_left_top, (21, 0));
}

#[test]
fn the_fingerprint_tells_datasets_apart_but_not_places() {
    let png = super::png(128, 128, 0);
    let make = |caption: &str| super::folder(&[("a.png", &png), ("a.txt", caption.as_bytes())]);
    let (one, same, other) = (make("x"), make("x"), make("y"));
    let print = |dir: &tempfile::TempDir| open(&super::small_config(dir.path())).0.fingerprint();
    assert_eq!(print(&one), print(&same));
    assert_ne!(print(&one), print(&other));
    let mut config = super::small_config(one.path());
    config.subsets[0].shuffle_caption = true;
    assert_ne!(print(&one), open(&config).0.fingerprint());
}

#[test]
fn captions_of_visits() {
    let png = super::png(128, 128, 0);
    let dir = super::folder(&[("a.png", &png), ("a.txt", b"k, a, b, c, d, e")]);
    let mut config = super::small_config(dir.path());
    config.subsets[0].keep_tokens = 1;
    config.subsets[0].shuffle_caption = true;
    let (dataset, _) = open(&config);
    let context = |position| CaptionContext { seed: 1, epoch: 0, position, step: 0, max_train_steps: 1 };
    let captions: std::collections::HashSet<String> = (0..20).map(|p| dataset.caption(0, context(p)).unwrap()).collect();
    assert!(captions.len() > 10 && captions.iter().all(|c| c.starts_with("k, ")));
}
