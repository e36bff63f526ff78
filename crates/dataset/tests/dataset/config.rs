//! The keys: defaults, TOML, and the message for each broken rule.

use dataset::{DatasetConfig, Interpolation, SubsetConfig};

fn parse(text: &str) -> Result<DatasetConfig, toml::de::Error> {
    toml::from_str(text)
}

#[test]
fn from_toml_and_back() {
    let text = r#"
        resolution = 128
        min_bucket_reso = 64
        max_bucket_reso = 256
        bucket_reso_steps = 32
        resize_interpolation = "lanczos"
        crop_condition = "sd-scripts"
        [[subsets]]
        image_dir = "images"
        keep_tokens = 2
        caption_tag_dropout_rate = 0.15
    "#;
    let config = parse(text).unwrap();
    config.check().unwrap();
    assert_eq!((config.resolution, config.resize_interpolation), ((128, 128), Some(Interpolation::Lanczos)));
    let expected = SubsetConfig { image_dir: "images".into(), keep_tokens: 2, caption_tag_dropout_rate: 0.15, ..Default::default() };
    assert_eq!(config.subsets, [expected]);
    assert_eq!(parse(&toml::to_string(&config).unwrap()).unwrap(), config);
    assert_eq!(parse("resolution = [1024, 768]").unwrap().resolution, (1024, 768));
}

#[test]
fn unknown_keys_and_values_are_errors() {
    for (text, part) in [
        ("resolutoin = 3", "resolutoin"),
        ("[[subsets]]\nimage_dir = 'x'\nshufle_caption = true", "shufle_caption"),
        ("on_broken_image = 'ignore'", "skip"),
        ("resolution = [1, 2, 3]", "resolution is a number of pixels or [width, height]"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

/// Every rule between keys: the message names both, with their values, and the hint says what to change.
#[test]
fn rules() {
    let base = || DatasetConfig { max_bucket_reso: 2048, ..with_subset(SubsetConfig::default()) };
    let subset = |s: SubsetConfig| with_subset(s);
    let cases: Vec<(DatasetConfig, &[&str])> = vec![
        (DatasetConfig { subsets: vec![], ..base() }, &["there are no subsets", "[[subsets]]"]),
        (DatasetConfig { resolution: (128, 128), ..base() }, &["min_bucket_reso = 256", "resolution = [128, 128]", "128 or less"]),
        (DatasetConfig { max_bucket_reso: 512, ..base() }, &["max_bucket_reso = 512", "resolution = [1024, 1024]", "1024 or more"]),
        (DatasetConfig { bucket_reso_steps: 0, ..base() }, &["bucket_reso_steps = 0"]),
        (DatasetConfig { bucket_reso_steps: 12, ..base() }, &["bucket_reso_steps = 12", "multiple of 8", "64"]),
        (DatasetConfig { min_bucket_reso: 63, ..base() }, &["min_bucket_reso = 63", "bucket_reso_steps = 64"]),
        (DatasetConfig { resolution: (32, 32), ..base() }, &["resolution = [32, 32]", "bucket_reso_steps = 64"]),
        (DatasetConfig { resolution: (0, 64), ..base() }, &["resolution = [0, 64]"]),
        (DatasetConfig { enable_bucket: false, bucket_no_upscale: true, ..base() }, &["bucket_no_upscale", "enable_bucket = false"]),
        (DatasetConfig { enable_bucket: false, resolution: (100, 64), ..base() }, &["resolution = [100, 64]", "[96, 64]"]),
        (subset(SubsetConfig { image_dir: "".into(), keep_tokens: 1, ..Default::default() }), &["subsets[0].image_dir is missing"]),
        (subset(SubsetConfig { num_repeats: 0, image_dir: "x".into(), ..Default::default() }), &["subsets[0].num_repeats = 0"]),
        (
            subset(SubsetConfig { caption_dropout_rate: 1.5, image_dir: "x".into(), ..Default::default() }),
            &["subsets[0].caption_dropout_rate = 1.5", "0 to 1"],
        ),
        (
            subset(SubsetConfig { caption_tag_dropout_rate: f64::NAN, image_dir: "x".into(), ..Default::default() }),
            &["caption_tag_dropout_rate = NaN"],
        ),
        (subset(SubsetConfig { token_warmup_step: -1.0, image_dir: "x".into(), ..Default::default() }), &["token_warmup_step = -1"]),
        (subset(SubsetConfig { caption_separator: "".into(), image_dir: "x".into(), ..Default::default() }), &["caption_separator"]),
        (
            subset(SubsetConfig { caption_extension: "txt".into(), image_dir: "x".into(), ..Default::default() }),
            &["caption_extension = \"txt\"", "write \".txt\""],
        ),
        (
            DatasetConfig { subsets: [base().subsets, base().subsets].concat(), ..base() },
            &["subsets[0] and subsets[1] have the same image_dir", "num_repeats"],
        ),
    ];
    base().check().unwrap();
    for (config, parts) in cases {
        let error = config.check().unwrap_err();
        let text = format!("{error} / {}", error.hint().unwrap());
        parts.iter().for_each(|part| assert!(text.contains(part), "{part:?} is missing in {text:?}"));
    }
}

fn with_subset(subset: SubsetConfig) -> DatasetConfig {
    let image_dir = if subset == SubsetConfig::default() { "x".into() } else { subset.image_dir.clone() };
    DatasetConfig { subsets: vec![SubsetConfig { image_dir, ..subset }], ..Default::default() }
}

#[test]
fn min_and_max_mean_nothing_without_upscaling() {
    let config = DatasetConfig { bucket_no_upscale: true, resolution: (128, 128), ..with_subset(SubsetConfig::default()) };
    config.check().unwrap();
}
