//! The latent cache: what is put in comes out, across runs; nothing stale is ever taken.

use std::path::Path;

use dataset::{CacheDtype, CachePlace, Dataset, DatasetConfig, ItemKey, Latent, LatentCache, LatentItem, LatentSource};

fn images() -> tempfile::TempDir {
    super::folder(&[("a.png", &super::png(128, 128, 1)), ("b.png", &super::png(96, 160, 2)), ("c.png", &super::png(128, 128, 1))])
}

/// A cache with the dataset that wants its latents.
struct Cached {
    dataset: Dataset,
    cache: LatentCache,
}

impl Cached {
    fn item(&self, key: ItemKey) -> LatentItem {
        self.dataset.latent_item(key).unwrap()
    }

    fn missing(&self) -> Vec<ItemKey> {
        let keys: Vec<_> = self.dataset.latent_keys().unwrap().collect();
        self.dataset.missing_latents(&self.cache, &keys).unwrap().iter().map(|item| item.key).collect()
    }

    fn contains(&self, key: ItemKey) -> bool {
        self.cache.contains(&self.item(key)).unwrap()
    }

    fn get(&self, key: ItemKey) -> Option<Latent> {
        self.cache.get(&self.item(key)).unwrap()
    }

    fn insert(&self, key: ItemKey, shape: [usize; 3], data: Vec<f32>) -> dataset::Result<Latent> {
        self.cache.insert(&self.item(key), shape, &data)
    }

    /// Fills what is missing; returns how many that were.
    fn fill(&self) -> usize {
        let missing = self.missing();
        for &k in &missing {
            let shape = if k.sample == 1 { [4, 20, 12] } else { [4, 16, 16] };
            let start = if k.flipped { -9.0 } else { k.sample as f32 };
            self.insert(k, shape, latent(shape.iter().product(), start)).unwrap();
        }
        self.cache.flush().unwrap();
        missing.len()
    }
}

fn open(config: &DatasetConfig, place: CachePlace, vae: &str, dtype: CacheDtype) -> Cached {
    let (dataset, _) = Dataset::open(config).unwrap();
    Cached { dataset, cache: LatentCache::open(place, vae, dtype).unwrap() }
}

fn disk(config: &DatasetConfig, folder: &Path) -> Cached {
    open(config, CachePlace::Folder(folder.into()), "vae-1", CacheDtype::F16)
}

fn key(sample: u32) -> ItemKey {
    ItemKey { sample, flipped: false }
}

/// Values that f16 holds exactly.
fn latent(n: usize, start: f32) -> Vec<f32> {
    (0..n).map(|i| start + i as f32 / 8.0).collect()
}

fn shards(folder: &Path) -> Vec<std::path::PathBuf> {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut shards: Vec<_> = files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    shards.sort();
    shards
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
            assert_eq!(cache.cache.count().unwrap(), 0);
            assert_eq!(cache.fill(), 2);
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
    assert_eq!(shards(folder.path()).len(), 0);
    assert_eq!(disk(&config, folder.path()).missing().len(), 2);
    cache.cache.flush().unwrap();
    assert_eq!(disk(&config, folder.path()).missing(), [key(1)]);
    // What waits is written at the end of a run too.
    let cache = disk(&config, folder.path());
    cache.insert(key(1), [4, 20, 12], latent(960, 0.0)).unwrap();
    drop(cache);
    assert_eq!(disk(&config, folder.path()).missing(), []);
}

#[test]
fn two_processes_fill_one_folder() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    let (one, two) = (disk(&config, folder.path()), disk(&config, folder.path()));
    one.insert(key(0), [4, 16, 16], latent(1024, 0.0)).unwrap();
    two.insert(key(1), [4, 20, 12], latent(960, 1.0)).unwrap();
    assert!(!one.contains(key(1)));
    one.cache.flush().unwrap();
    two.cache.flush().unwrap();
    // Each sees the other's without being told, however the two came to the folder.
    assert!(one.missing().is_empty() && two.missing().is_empty());
    assert_eq!(two.get(key(0)).unwrap().data, latent(1024, 0.0));
    assert_eq!(shards(folder.path()).len(), 2);
}

#[test]
fn many_processes_open_and_fill_at_once() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let cache = disk(&config, folder.path());
                for start in 0..5 {
                    cache
                        .insert(
                            key(start % 2),
                            [[4, 16, 16], [4, 20, 12]][start as usize % 2],
                            latent([1024, 960][start as usize % 2], 2.0),
                        )
                        .unwrap();
                    cache.cache.flush().unwrap();
                }
                assert_eq!(cache.missing(), []);
            });
        }
    });
    assert_eq!(disk(&config, folder.path()).cache.count().unwrap(), 2);
}

/// The catalogue is made of the shards: without it, with a damaged one, or with one that tells of shards that are gone or
/// others, the same latents are found.
#[test]
fn the_catalogue_can_be_lost() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    disk(&config, folder.path()).fill();
    let catalogue = folder.path().join("latents.sqlite");
    for content in [None, Some(&b"no database, but long enough to be looked at as one"[..]), Some(b"")] {
        match content {
            None => std::fs::remove_file(&catalogue).unwrap(),
            Some(bytes) => std::fs::write(&catalogue, bytes).unwrap(),
        }
        let cache = disk(&config, folder.path());
        assert_eq!((cache.missing(), cache.get(key(1)).unwrap().data), (vec![], latent(960, 1.0)));
    }
    // A shard that was replaced is read anew, one that is gone is missed, by open caches too.
    let open_before = disk(&config, folder.path());
    std::fs::remove_file(&shards(folder.path())[0]).unwrap();
    assert_eq!(open_before.get(key(0)), None);
    let cache = disk(&config, folder.path());
    assert_eq!((cache.missing(), cache.cache.count().unwrap()), (vec![key(0), key(1)], 0));
}

/// The value is that of the cache's type from the first moment on, so that it does not matter who made it and when.
#[test]
fn what_is_new_is_rounded_as_what_is_read() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let cache = disk(&super::small_config(images.path()), folder.path());
    let third: Vec<f32> = (0..1024).map(|i| i as f32 / 3.0).collect();
    let kept = cache.insert(key(0), [4, 16, 16], third.clone()).unwrap();
    assert_eq!(cache.get(key(0)).unwrap(), kept);
    assert_ne!(kept.data, third);
    cache.cache.flush().unwrap();
    assert_eq!(cache.get(key(0)).unwrap(), kept);
}

/// A visit gets the latent where it is, the pixels where it is not; a broken picture's place is taken as without a cache.
#[test]
fn visits_find_latents_or_pixels() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    let cache = disk(&config, folder.path());
    let visit = |sample| cache.dataset.load_latent(&cache.cache, sample, 1, 0, 9).unwrap();
    let first = visit(1);
    assert_eq!((first.item, first.view), (cache.item(key(1)), cache.dataset.view(1, 1, 0, 9).unwrap()));
    assert_eq!(first.source, LatentSource::Pixels(cache.dataset.load_for_cache(key(1)).unwrap()));
    let kept = cache.cache.insert(&first.item, [4, 20, 12], &latent(960, 3.0)).unwrap();
    assert_eq!(visit(1).source, LatentSource::Latent(kept));
    std::fs::write(images.path().join("a.png"), b"no picture").unwrap();
    let taken = cache.dataset.load_latent(&cache.cache, 0, 1, 0, 9).unwrap();
    assert_eq!(taken.item.key.sample, cache.dataset.load_pixels(0, 1, 0, 9).unwrap().sample);
    assert_eq!((taken.item.key.sample, cache.dataset.broken().len()), (2, 1));
}

#[test]
fn a_changed_image_is_encoded_anew() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    disk(&config, folder.path()).fill();
    std::fs::write(images.path().join("a.png"), super::png(128, 128, 77)).unwrap();
    assert_eq!(disk(&config, folder.path()).missing(), [key(0)]);
}

#[test]
fn another_bucket_crop_or_interpolation_is_encoded_anew() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    disk(&config, folder.path()).fill();
    assert_eq!(disk(&config, folder.path()).missing(), []);
    let larger = DatasetConfig { resolution: (160, 160), ..config.clone() };
    assert_eq!(disk(&larger, folder.path()).missing().len(), 2);
    let other = DatasetConfig { resize_interpolation: Some(dataset::Interpolation::Lanczos), ..config.clone() };
    assert_eq!(disk(&other, folder.path()).missing().len(), 2);
    let mut flipped = config;
    flipped.subsets[0].flip_aug = true;
    let cache = disk(&flipped, folder.path());
    assert_eq!(cache.missing(), [0, 1].map(|sample| ItemKey { sample, flipped: true }));
    cache.fill();
    assert_ne!(cache.get(ItemKey { sample: 0, flipped: true }), cache.get(key(0)));
}

#[test]
fn another_vae_or_type_is_not_read() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    disk(&config, folder.path()).fill();
    let place = || CachePlace::Folder(folder.path().into());
    let others = [("vae-2", CacheDtype::F16, "another VAE", 1), ("vae-1", CacheDtype::F32, "not F32", 2)];
    for (vae, dtype, why, shards) in others {
        let cache = open(&config, place(), vae, dtype);
        let ignored = cache.cache.ignored_shards().unwrap();
        assert_eq!((cache.cache.count().unwrap(), ignored.count, cache.missing().len()), (0, shards, 2));
        assert!(ignored.first.iter().any(|line| line.contains(why)), "{ignored:?}");
        cache.fill();
    }
    // Each has its own shard now, and the first is untouched.
    assert_eq!(disk(&config, folder.path()).get(key(0)).unwrap().data, latent(1024, 0.0));
}

#[test]
fn a_broken_shard_costs_its_latents_only() {
    let (images, folder) = (images(), tempfile::tempdir().unwrap());
    let config = super::small_config(images.path());
    disk(&config, folder.path()).fill();
    let shard = shards(folder.path()).remove(0);
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 5]).unwrap();
    std::fs::write(folder.path().join("latents-torn.safetensors"), b"").unwrap();
    std::fs::write(folder.path().join("notes.txt"), b"not ours").unwrap();
    let cache = disk(&config, folder.path());
    assert_eq!((cache.missing().len(), cache.cache.ignored_shards().unwrap().count), (2, 2));
    cache.fill();
    assert!(disk(&config, folder.path()).missing().is_empty());
}

#[test]
fn what_does_not_belong_is_refused() {
    let images = images();
    let cache = open(&super::small_config(images.path()), CachePlace::Memory, "vae", CacheDtype::F16);
    let fails = |key, shape, data| cache.insert(key, shape, data).unwrap_err().to_string();
    let good = || latent(1024, 0.0);
    assert!(cache.dataset.latent_item(key(9)).unwrap_err().to_string().contains("there is no number 9"));
    assert!(fails(key(0), [4, 8, 32], good()).contains("[4, 16, 16]"));
    assert!(fails(key(0), [4, 16, 16], vec![0.0; 5]).contains("5 values"));
    let with = |v: f32| good().into_iter().enumerate().map(|(i, x)| if i == 7 { v } else { x }).collect();
    assert_eq!(fails(key(0), [4, 16, 16], with(f32::NAN)), "latent of sample 0: value 7 is NaN, which F16 cannot hold");
    assert!(fails(key(0), [4, 16, 16], with(70000.0)).contains("value 7 is 70000"));
    assert!(cache.get(key(0)).is_none());
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
    let keys: Vec<_> = dataset.latent_keys().unwrap().collect();
    let cache = LatentCache::open(CachePlace::Memory, "vae", CacheDtype::F32).unwrap();
    let missing = dataset.missing_latents(&cache, &keys).unwrap();
    assert_eq!((keys.len(), missing.len()), (6, 2), "b is left out, c is a");
}

/// An archive as numpy's `savez` writes it: members not compressed.
fn npz(arrays: &[(&str, &str, &str, &[u8])]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, descr, shape, data) in arrays {
        let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}").into_bytes();
        header.resize((header.len() + 11).next_multiple_of(64) - 11, b' ');
        header.push(b'\n');
        archive.start_file(format!("{name}.npy"), stored).unwrap();
        let head = [b"\x93NUMPY\x01\0".as_slice(), &(header.len() as u16).to_le_bytes(), &header].concat();
        std::io::Write::write_all(&mut archive, &[&head, *data].concat()).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

/// sd-scripts' files are taken where they fit, and only where they do; never unasked.
#[test]
fn latents_of_sd_scripts() {
    let images = images();
    let mut config = super::small_config(images.path());
    config.subsets[0].flip_aug = true;
    let bytes = |start: f32, n: usize| latent(n, start).iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let size = |w: i64, h: i64| [w.to_le_bytes(), h.to_le_bytes()].concat();
    let write = |name: &str, arrays: &[(&str, &str, &str, &[u8])]| std::fs::write(images.path().join(name), npz(arrays)).unwrap();
    let (straight, mirrored, other) = (bytes(0.5, 1024), bytes(2.0, 1024), bytes(3.0, 960));
    let of_a: &[(&str, &str, &str, &[u8])] = &[
        ("latents", "<f4", "4, 16, 16", &straight),
        ("latents_flipped", "<f4", "4, 16, 16", &mirrored),
        ("original_size", "<i8", "2,", &size(128, 128)),
    ];
    write("a_0128x0128_sdxl.npz", of_a);
    // Of another picture's size, of a shape that is not the bucket's, and none at all.
    write("b_0096x0160_sdxl.npz", &[("latents", "<f4", "4, 20, 12", &other), ("original_size", "<i8", "2,", &size(96, 161))]);
    std::fs::write(images.path().join("c.npz"), b"nothing").unwrap();
    let (dataset, _) = Dataset::open(&config).unwrap();
    let open = |npz: bool| LatentCache::open(CachePlace::Memory, "vae", CacheDtype::F16).unwrap().with_npz(npz);
    let keys: Vec<_> = dataset.latent_keys().unwrap().collect();
    let missing =
        |npz: bool| dataset.missing_latents(&open(npz), &keys).unwrap().iter().map(|i| (i.key.sample, i.key.flipped)).collect::<Vec<_>>();
    assert_eq!(missing(false), [(0, false), (0, true), (1, false), (1, true)]);
    // c is the same picture as a, and has an archive that cannot be read.
    assert_eq!(missing(true), [(1, false), (1, true), (2, false), (2, true)]);
    for (flipped, want) in [(false, latent(1024, 0.5)), (true, latent(1024, 2.0))] {
        let position = (0..).find(|&p| dataset.view(0, 0, 0, p).unwrap().flipped == flipped).unwrap();
        let visit = dataset.load_latent(&open(true), 0, 0, 0, position).unwrap();
        assert_eq!(visit.source, LatentSource::Latent(Latent { shape: [4, 16, 16], data: want }));
    }
    write("a_0128x0128_sdxl.npz", &[("latents", "<f4", "4, 20, 12", &other)]);
    assert_eq!(missing(true).len(), 4, "a's has the shape of another bucket");
    write("a_0128x0128_sdxl.npz", of_a);
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(100);
    std::fs::File::options().write(true).open(images.path().join("a.png")).unwrap().set_modified(later).unwrap();
    assert_eq!(missing(true).len(), 4, "a was changed since");
}

/// Too many broken pictures end a run, a few do not; at the start as later.
#[test]
fn a_share_of_broken_pictures_is_borne() {
    let good = super::png(128, 128, 1);
    let names: Vec<String> = (0..40).map(|i| format!("{i:02}.png")).collect();
    let files: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), good.as_slice())).collect();
    let dir = super::folder(&files);
    let config = DatasetConfig { max_broken_share: 0.05, ..super::small_config(dir.path()) };
    let (dataset, _) = Dataset::open(&config).unwrap();
    // Five of a hundred are borne, however few were asked for.
    for (n, name) in names.iter().enumerate().take(6) {
        std::fs::write(dir.path().join(name), &good[..good.len() / 2]).unwrap();
        let loaded = dataset.load_pixels(n as u32, 1, 0, 0);
        match n {
            5 => assert_eq!(
                loaded.unwrap_err().to_string(),
                format!(
                    "6 of 6 images cannot be used, more than max_broken_share = 0.05; one of them is {}",
                    dir.path().join(name).display()
                )
            ),
            _ => assert_eq!(loaded.unwrap().sample, n as u32 + 1),
        }
    }
    assert_eq!(dataset.broken().len(), 6);
    for name in &names[..6] {
        std::fs::write(dir.path().join(name), b"no picture").unwrap();
    }
    assert!(matches!(Dataset::open(&config), Err(dataset::Error::TooManyBroken { broken: 6, of: 40, .. })));
    assert_eq!(Dataset::open(&DatasetConfig { max_broken_share: 0.06, ..config }).unwrap().0.len(), 34);
}
