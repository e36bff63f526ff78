//! Buckets against sd-scripts' own, recorded in golden/buckets.json: exact.

use dataset::bucket::letterbox_left_top;
use dataset::image::{crop_condition, time_ids};
use dataset::{Buckets, CropCondition, DatasetConfig, Placement};
use serde_json::Value;

fn pair(value: &Value) -> (u32, u32) {
    let at = |i: usize| value[i].as_u64().unwrap() as u32;
    (at(0), at(1))
}

fn kohaku(no_upscale: bool) -> DatasetConfig {
    DatasetConfig {
        resolution: (1024, 1024),
        bucket_no_upscale: no_upscale,
        min_bucket_reso: 256,
        max_bucket_reso: 4096,
        bucket_reso_steps: 64,
        ..Default::default()
    }
}

fn recorded() -> Value {
    let path = super::golden("buckets.json");
    serde_json::from_slice(&std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

#[test]
fn the_set_is_sd_scripts() {
    let expected: Vec<_> = recorded()["buckets"].as_array().unwrap().iter().map(pair).collect();
    assert_eq!(Buckets::new(&kohaku(false)).sizes(), expected);
}

fn compare(case: &Value, size: (u32, u32), placement: Placement) {
    assert_eq!(placement.bucket, pair(&case["bucket"]), "bucket of {size:?}");
    assert_eq!(placement.resized, pair(&case["resized"]), "resized of {size:?}");
    assert_eq!(placement.centre_crop(), pair(&case["pixel_crop_left_top"]), "crop of {size:?}");
    let condition = &case["crop_condition_left_top"];
    let expected = (condition[0].as_f64().unwrap(), condition[1].as_f64().unwrap());
    assert_eq!(letterbox_left_top(placement.bucket, size, false), expected, "condition of {size:?}");
}

#[test]
fn every_recorded_image_gets_its_bucket() {
    let (buckets, no_upscale) = (Buckets::new(&kohaku(false)), Buckets::new(&kohaku(true)));
    let recorded = recorded();
    let images = recorded["images"].as_array().unwrap();
    assert_eq!(images.len(), 200);
    let mut empty = 0;
    for image in images {
        let size = (image["width"].as_u64().unwrap() as u32, image["height"].as_u64().unwrap() as u32);
        compare(image, size, buckets.place(size).unwrap());
        match (&image["no_upscale"], no_upscale.place(size)) {
            (Value::Null, None) => empty += 1,
            (case, Some(placement)) => compare(case, size, placement),
            (case, None) => panic!("{size:?} has no place, recorded: {case}"),
        }
    }
    assert!(empty > 0, "no recorded image is too small for no_upscale: the case is not tested");
}

/// Facts 5.4's example.
#[test]
fn crop_conditions_of_both_rules() {
    let one = DatasetConfig { enable_bucket: false, ..kohaku(false) };
    let size = (1000, 1500);
    let placement = Buckets::new(&one).place(size).unwrap();
    assert_eq!(placement, Placement { bucket: (1024, 1024), resized: (1024, 1536) });
    let crop = placement.centre_crop();
    assert_eq!(crop, (0, 256));
    let condition = |rule, flipped| crop_condition(rule, placement, size, crop, flipped);
    assert_eq!(condition(CropCondition::Pixel, false), (0, 256));
    assert_eq!(condition(CropCondition::SdScripts, false), (170, 0));
    // 1024 - (170 + 682.67), cut.
    assert_eq!(condition(CropCondition::SdScripts, true), (171, 0));
    assert_eq!(time_ids(size, (0, 256), placement.bucket), [1500, 1000, 256, 0, 1024, 1024]);
}

#[test]
fn a_mirrored_crop_lies_mirrored() {
    let placement = Placement { bucket: (64, 64), resized: (100, 64) };
    let at = |flipped| crop_condition(CropCondition::Pixel, placement, (100, 64), (10, 0), flipped);
    assert_eq!((at(false), at(true)), ((10, 0), (26, 0)));
}

#[test]
fn resized_covers_the_bucket_for_any_size() {
    let buckets = Buckets::new(&kohaku(false));
    // All small sizes, and a sweep of larger ones whose ratios do not repeat.
    let small = (1..100u32).flat_map(|w| (1..100u32).map(move |h| (w, h)));
    let large = (0..20_000u32).map(|i| (17 + i * 7919 % 9001, 13 + i * 104_729 % 7919));
    for size in small.chain(large) {
        let p = buckets.place(size).unwrap();
        assert!(p.resized.0 >= p.bucket.0 && p.resized.1 >= p.bucket.1, "{size:?}: {p:?}");
        assert!(p.resized.0 == p.bucket.0 || p.resized.1 == p.bucket.1, "{size:?}: {p:?}");
    }
}

/// The buckets that the quickstart's model was made for.
#[test]
fn quickstart_buckets() {
    let config = super::small_config(std::path::Path::new("x"));
    config.check().unwrap();
    let buckets = Buckets::new(&config);
    for (size, bucket) in [((256, 256), (128, 128)), ((192, 320), (96, 160)), ((320, 192), (160, 96))] {
        assert_eq!(buckets.place(size).unwrap().bucket, bucket);
    }
}
