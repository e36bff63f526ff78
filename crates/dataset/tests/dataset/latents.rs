//! The latent cache: what is put in comes out, across runs; nothing stale is ever taken.

use std::path::Path;

use dataset::{CacheDtype, CachePlace, Dataset, DatasetConfig, ItemKey, LatentCache};

fn images() -> tempfile::TempDir {
    super::folder(&[("a.png", &super::png(128, 128, 1)), ("b.png", &super::png(96, 160, 2)), ("c.png", &super::png(128, 128, 1))])
}

fn open(config: &DatasetConfig, place: CachePlace, vae: &str, dtype: CacheDtype) -> LatentCache {
    let (dataset, _) = Dataset::open(config).unwrap();
    LatentCache::open(place, vae, dtype, dataset.latent_items().unwrap()).unwrap()
}

fn disk(config: &DatasetConfig, folder: &Path) -> LatentCache {
    open(config, CachePlace::Folder(folder.into()), "vae-1", CacheDtype::F16)
}

fn key(sample: u32) -> ItemKey {
    ItemKey { sample, flipped: false }
}

/// Values that f16 holds exactly.
fn latent(n: usize, start: f32) -> Vec<f32> {
    (0..n).map(|i| start + i as f32 / 8.0).collect()
}

/// Fills what is missing; returns how many that were.
fn fill(cache: &LatentCache) -> usize {
    let missing = cache.missing();
    for &k in &missing {
        let shape = if k.sample == 1 { [4, 20, 12] } else { [4, 16, 16] };
        let start = if k.flipped { -9.0 } else { k.sample as f32 };
        cache.insert(k, shape, latent(shape.iter().product(), start)).unwrap();
    }
    cache.flush().unwrap();
    missing.len()
}

#[test]
fn kept_in_memory_and_on_disk() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    for dtype in [CacheDtype::F16, CacheDtype::F32] {
        for place in [CachePlace::Memory, CachePlace::Folder(folder.path().join(format!("{dtype:?}/deep")))] {
            let cache = open(&config, place.clone(), "vae", dtype);
            // a and c are the same file: one latent serves both.
            assert_eq!(cache.missing(), [key(0), key(1)]);
            assert_eq!((cache.report().wanted, cache.report().present), (2, 0));
            assert_eq!(fill(&cache), 2);
            let again = open(&config, place.clone(), "vae", dtype);
            let cache = if place == CachePlace::Memory { cache } else { again };
            assert!(cache.missing().is_empty() && cache.contains(key(2)));
            let got = cache.get(key(1)).unwrap();
            assert_eq!((got.shape, got.data), ([4, 20, 12], latent(960, 1.0)));
            assert_eq!(cache.get(key(2)), cache.get(key(0)));
        }
    }
}

#[test]
fn unflushed_latents_are_there_and_are_not_on_disk() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    let cache = disk(&config, folder.path());
    cache.insert(key(0), [4, 16, 16], latent(1024, 0.0)).unwrap();
    assert!(cache.contains(key(0)));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    assert_eq!(disk(&config, folder.path()).missing().len(), 2);
    cache.flush().unwrap();
    assert_eq!(disk(&config, folder.path()).missing(), [key(1)]);
}

#[test]
fn two_processes_fill_one_folder() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    let (one, two) = (disk(&config, folder.path()), disk(&config, folder.path()));
    one.insert(key(0), [4, 16, 16], latent(1024, 0.0)).unwrap();
    two.insert(key(1), [4, 20, 12], latent(960, 1.0)).unwrap();
    one.flush().unwrap();
    two.flush().unwrap();
    assert!(!one.contains(key(1)));
    one.reload().unwrap();
    assert!(one.contains(key(1)) && one.missing().is_empty());
}

#[test]
fn a_changed_image_is_encoded_anew() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    fill(&disk(&config, folder.path()));
    std::fs::write(images.path().join("a.png"), super::png(128, 128, 77)).unwrap();
    assert_eq!(disk(&config, folder.path()).missing(), [key(0)]);
}

#[test]
fn another_bucket_crop_or_interpolation_is_encoded_anew() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    fill(&disk(&config, folder.path()));
    assert_eq!(disk(&config, folder.path()).missing(), []);
    let larger = DatasetConfig { resolution: (160, 160), ..config.clone() };
    assert_eq!(disk(&larger, folder.path()).missing().len(), 2);
    let other = DatasetConfig { resize_interpolation: Some(dataset::Interpolation::Lanczos), ..config.clone() };
    assert_eq!(disk(&other, folder.path()).missing().len(), 2);
    let mut flipped = config;
    flipped.subsets[0].flip_aug = true;
    let cache = disk(&flipped, folder.path());
    assert_eq!(cache.missing(), [0, 1].map(|sample| ItemKey { sample, flipped: true }));
    fill(&cache);
    assert_ne!(cache.get(ItemKey { sample: 0, flipped: true }), cache.get(key(0)));
}

#[test]
fn another_vae_or_type_is_not_read() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    fill(&disk(&config, folder.path()));
    let place = || CachePlace::Folder(folder.path().into());
    let others = [("vae-2", CacheDtype::F16, "another VAE", 1), ("vae-1", CacheDtype::F32, "not F32", 2)];
    for (vae, dtype, why, shards) in others {
        let cache = open(&config, place(), vae, dtype);
        let report = cache.report();
        assert_eq!((report.present, report.ignored_shards.count, cache.missing().len()), (0, shards, 2));
        assert!(report.ignored_shards.first.iter().any(|line| line.contains(why)), "{report:?}");
        fill(&cache);
    }
    // Each has its own shard now, and the first is untouched.
    assert_eq!(disk(&config, folder.path()).get(key(0)).unwrap().data, latent(1024, 0.0));
}

#[test]
fn a_broken_shard_costs_its_latents_only() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    fill(&disk(&config, folder.path()));
    let shard = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 5]).unwrap();
    std::fs::write(folder.path().join("latents-torn.safetensors"), b"").unwrap();
    std::fs::write(folder.path().join("notes.txt"), b"not ours").unwrap();
    let cache = disk(&config, folder.path());
    assert_eq!((cache.missing().len(), cache.report().ignored_shards.count), (2, 2));
    fill(&cache);
    assert!(disk(&config, folder.path()).missing().is_empty());
}

#[test]
fn what_does_not_belong_is_refused() {
    let images = images();
    let cache = open(&super::small_config(images.path()), CachePlace::Memory, "vae", CacheDtype::F16);
    let fails = |key, shape, data| cache.insert(key, shape, data).unwrap_err().to_string();
    let good = || latent(1024, 0.0);
    assert_eq!(fails(key(9), [4, 16, 16], good()), "latent of sample 9: it is not one that the dataset wants");
    assert!(fails(key(0), [4, 8, 32], good()).contains("[4, 16, 16]"));
    assert!(fails(key(0), [4, 16, 16], vec![0.0; 5]).contains("5 values"));
    let with = |v: f32| good().into_iter().enumerate().map(|(i, x)| if i == 7 { v } else { x }).collect();
    assert_eq!(fails(key(0), [4, 16, 16], with(f32::NAN)), "latent of sample 0: value 7 is NaN, which F16 cannot hold");
    assert!(fails(key(0), [4, 16, 16], with(70000.0)).contains("value 7 is 70000"));
    assert!(cache.get(key(0)).is_none() && cache.get(key(9)).is_none());
}

/// The pixels for the cache are those that a visit with the same view would load.
#[test]
fn pixels_for_the_cache_are_those_of_a_visit() {
    let images = images();
    let mut config = super::small_config(images.path());
    config.subsets[0].flip_aug = true;
    let (dataset, _) = Dataset::open(&config).unwrap();
    for flipped in [false, true] {
        let position = (0..).find(|&p| dataset.view(1, 0, 0, p).unwrap().flipped == flipped).unwrap();
        let visit = dataset.load_pixels(1, 0, 0, position).unwrap();
        assert_eq!(visit.pixels, dataset.load_for_cache(ItemKey { sample: 1, flipped }).unwrap());
    }
    std::fs::remove_file(images.path().join("b.png")).unwrap();
    assert!(dataset.load_for_cache(key(1)).is_err() && dataset.is_broken(1));
    let items = dataset.latent_items().unwrap();
    assert_eq!(items.len(), 4, "b is left out");
}
