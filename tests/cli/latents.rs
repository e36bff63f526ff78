//! The cache of latents over processes, runs and places: none of them changes a number.

use std::collections::BTreeSet;

use crate::distributed::{assert_same_training, launched};
use crate::support::*;

const ON_DISK: &str = "dataset.cache_latents_to_disk=true";
const FOLDER: &str = "dataset.cache_latents_dir=latents";
/// The metadata of an adapter names the run by a hash of its recipe, which differs.
const BARE: &str = "output.no_metadata=true";

/// The shards of a cache: their names, and all latents in them.
fn shards(world: &World) -> (BTreeSet<String>, Vec<String>) {
    let names: BTreeSet<String> = listing(world.path("latents")).into_iter().filter(|n| n.ends_with(".safetensors")).collect();
    let latents = names.iter().flat_map(|name| tensors(world.path("latents").join(name)).into_keys()).collect();
    (names, latents)
}

/// Two processes fill one folder, each its half, and train what one process trains; a later run finds everything.
#[test]
fn two_processes_share_the_encoding_and_nothing_is_encoded_twice() {
    let set = [ON_DISK, FOLDER, BARE, "train.optimizer=AdamW", "train.unet_lr=1e-4", "train.max_train_steps=6"];
    let alone = World::new("latents-alone");
    alone.train(&[&set[..], &["train.gradient_accumulation_steps=2"]].concat()).good();
    let (_, want) = shards(&alone);
    assert_eq!(want.len(), 18, "nine pictures and their mirror images");

    let both = World::new("latents-two");
    let set = [&set[..], &["train.gradient_accumulation_steps=1"]].concat();
    both.lokr(&launched("2", &[], &set)).ended_with(0);
    assert_same_training(&alone, &both, 6);
    let (files, latents) = shards(&both);
    assert_eq!(files.len(), 2, "each process writes a shard of its own: {files:?}");
    assert_eq!(latents.len(), 18, "no latent was made twice");
    assert_eq!(latents.iter().collect::<BTreeSet<_>>(), want.iter().collect());
    // Each latent is the one that a process alone makes, bit for bit.
    let all = |world: &World| {
        let (names, _) = shards(world);
        names.iter().flat_map(|name| tensors(world.path("latents").join(name))).collect::<std::collections::BTreeMap<_, _>>()
    };
    assert!(all(&alone) == all(&both), "other latents");

    // Again, over what is there: nothing is encoded, and the adapter is the same file.
    let adapter = contents(both.run()).remove("shapes.safetensors").expect("the adapter");
    std::fs::remove_dir_all(both.run()).expect("removed");
    let ran = both.lokr(&launched("2", &[], &set)).ended_with(0);
    assert!(ran.lines("latents:").is_empty(), "{}", ran.all());
    assert!(contents(both.run())["shapes.safetensors"] == adapter, "another adapter");
    assert_eq!(shards(&both).0, files);

    // One shard is lost: the processes share what was in it.
    let lost = both.path("latents").join(files.first().expect("a shard"));
    std::fs::remove_file(lost).expect("removed");
    std::fs::remove_dir_all(both.run()).expect("removed");
    both.lokr(&launched("2", &[], &set)).ended_with(0);
    assert!(contents(both.run())["shapes.safetensors"] == adapter, "another adapter");
    assert_eq!(shards(&both).1.len(), 18);
}

/// Encoded while training, each process the pictures of its own batches; and stopped on the way.
#[test]
fn two_processes_that_encode_while_they_train_end_the_same() {
    let set = [ON_DISK, FOLDER, BARE, "train.gradient_accumulation_steps=1", "train.max_train_steps=6"];
    let ahead = World::new("latents-two-ahead");
    ahead.lokr(&launched("2", &[], &set)).ended_with(0);
    let want = contents(ahead.run()).remove("shapes.safetensors").expect("the adapter");
    let lazily = World::new("latents-two-lazily");
    let set = [&set[..], &["dataset.cache_latents_lazily=true"]].concat();
    lazily.lokr(&launched("2", &[], &[&set[..], &["train.max_train_steps=2"]].concat())).ended_with(0);
    let first = shards(&lazily).1.len();
    assert!(first > 0 && first < 18, "{first}");
    lazily.lokr(&launched("2", &[], &set)).ended_with(0);
    assert!(contents(lazily.run())["shapes.safetensors"] == want, "another adapter");
}

/// A broken picture is replaced by the same other one on both processes, and counted once.
#[test]
fn two_processes_count_a_broken_picture_once() {
    let world = World::new("latents-broken");
    damage(&world.path("pictures/04.png"), Damage::Cut);
    damage(&world.path("pictures/04.png"), Damage::Cut);
    let set = [ON_DISK, FOLDER, "train.gradient_accumulation_steps=1", "train.max_train_steps=6"];
    let ran = world.lokr(&launched("2", &[], &set)).ended_with(0);
    let told = ran.lines("broken pictures: 0 left out at the start, 1 found later (pictures/04.png); another one took their place at ");
    assert_eq!(told.len(), 1, "{}", ran.all());
    // Two epochs of nine visits, and one of the picture in each.
    assert!(told[0].ends_with("at 2 of 18 visits"), "{}", told[0]);
    assert_eq!(metrics(&world.run()).iter().rfind(|l| l.get("loss").is_some()).expect("a line")["replaced"], 2);
}

/// Kept in memory or in files, latents have the same numbers: a run may move them on the way.
#[test]
fn a_cache_moves_between_memory_and_files_at_a_resume() {
    let [whole, moved] = ["latents-whole", "latents-moved"].map(World::new);
    whole.train(&["train.max_train_steps=5"]).good();
    moved.train(&["train.max_train_steps=2"]).good();
    moved.train(&["train.max_train_steps=4", ON_DISK, FOLDER]).good();
    moved.train(&["train.max_train_steps=5"]).good();
    for file in ["adapter.safetensors", "optimizer.safetensors"] {
        assert_same_file(checkpoint(&whole.run(), 5).join(file), checkpoint(&moved.run(), 5).join(file));
    }
    // Without a cache each visit draws anew from the VAE's posterior: that is another training.
    let err = moved.train(&["train.max_train_steps=7", "dataset.cache_latents=false"]).refusal();
    assert!(err.contains("dataset.cache_latents: true -> false"), "{err}");
}
