//! The commands about pictures: an index from shards and parquet, what a run takes of it, and training on it.

use insta::assert_snapshot;

use crate::support::*;

/// A file of crate `dataset`'s recorded data.
fn recorded(name: &str) -> String {
    repository().join("crates/dataset/tests/golden").join(name).display().to_string()
}

const FROM_INDEX: [&str; 3] = [
    "dataset.subsets=[{index='posts.sqlite', caption_rules='kohaku-epsilon', flip_aug=true}]",
    "train.max_train_steps=2",
    "train.batch_size=1",
];

/// Posts of a parquet file, of which three have a picture, are indexed, looked at and trained on.
#[test]
fn posts_of_a_parquet_file_become_captions() {
    let world = World::new("dataset-parquet");
    std::fs::create_dir(world.path("posts")).expect("a folder");
    for (from, id) in [("00", 103), ("02", 112), ("04", 133)] {
        std::fs::copy(world.path(&format!("pictures/{from}.png")), world.path(&format!("posts/{id}.png"))).expect("copied");
    }
    let ran = world.lokr(&["dataset", "index", "--out", "posts.sqlite", "posts", &recorded("posts-text.parquet")]).good();
    assert_snapshot!(ran.out, @"
    posts.sqlite: 60 images, 3 with a file, 57 without, 0 gone, 0 broken; 6 deleted posts, 60 tagged (22 tags), 0 captioned
    this time: 3 files added, 0 read again, 0 gone, 60 posts read
    ");
    let config = |command: &'static str, more: &[&'static str]| {
        let set: Vec<&str> = FROM_INDEX.iter().flat_map(|s| ["--set", s]).collect();
        world.lokr(&[&["dataset", command, "--config", "recipe.toml"], &set[..], more].concat())
    };
    assert_snapshot!(config("buckets", &[]).good().out, @"
    images: 2 found, 2 used, 2 visits per epoch
    index posts.sqlite: 2 of 60 images taken, 57 without a file, 1 deleted
    captions: 2 from the index, 0 from files
         bucket     images    visits  last batch  crop loss  enlarged
       64x64             2         2           -      0.0 %         0  ########################################
    1 buckets, 2 images, 2 visits in 2 batches of 1, 0 of them short; mean crop loss 0.0 %; every image is used
    ");
    let told = config("caption", &["--id", "103"]).good().out;
    assert!(
        told.contains("posts/103.png\n")
            && told.contains("  written: someone (series), series, artist 1, |||o_o, highres, early, sensitive, worst quality\n"),
        "{told}"
    );
    assert!(told.contains("  left out: commentary\n") && told.contains("worst quality: its 1 favourites exceed no threshold"), "{told}");
    assert_snapshot!(config("caption", &["--id", "106"]).refusal(), @"error: image 106 is not among those that the recipe takes: its post has no file");
    let ran = world.train(&FROM_INDEX).good();
    assert_eq!(steps_in_metrics(&world.run()), [1, 2], "{}", ran.all());
    // A second look finds nothing new; a file that is no source changes nothing.
    let again = world.lokr(&["dataset", "index", "--out", "posts.sqlite"]).good();
    assert_snapshot!(again.out, @"
    posts.sqlite: 60 images, 3 with a file, 57 without, 0 gone, 0 broken; 6 deleted posts, 60 tagged (22 tags), 0 captioned
    this time: 0 files added, 0 read again, 0 gone, 0 posts read
    ");
    assert_snapshot!(masked(&world.lokr(&["dataset", "index", "--out", "none.sqlite"]).refusal(), &world.folder), @"
    error: `[folder]/none.sqlite` cannot be used as an index: there is nothing to build it from
    hint: name a folder of images, tar shards, or a file of metadata
    ");
    assert!(!world.path("none.sqlite").exists());
}

#[test]
fn rules_are_printed_whole_and_can_be_read_again() {
    let world = World::new("dataset-rules");
    assert_snapshot!(world.lokr(&["dataset", "rules"]).good().out, @"
    caption rules: kohaku-epsilon, kohaku-delta, model-card, plain
    selections: all, kohaku-epsilon, kohaku-delta
    ");
    for (kind, name) in [("--captions", "kohaku-delta"), ("--selection", "kohaku-epsilon")] {
        let printed = world.lokr(&["dataset", "rules", kind, name]).good().out;
        std::fs::write(world.path("mine.toml"), &printed).expect("written");
        assert_eq!(world.lokr(&["dataset", "rules", kind, "mine.toml"]).good().out, printed);
    }
    world.lokr(&["dataset", "index", "--out", "posts.sqlite", &recorded("posts-text.parquet")]).good();
    let own = world.lokr(&["dataset", "rules", "--captions", "kohaku-epsilon", "--index", "posts.sqlite"]).good().out;
    let thresholds: Vec<&str> = own.lines().filter(|l| l.starts_with("general = [2") || l.starts_with("explicit = [2")).collect();
    assert_snapshot!(thresholds.join("\n"), @"
    general = [204, 144, 136, 100, 96, 4]
    explicit = [201, 129, 109, 61, 49, 21]
    ");
    std::fs::write(world.path("own.toml"), &own).expect("written");
    world.lokr(&["dataset", "rules", "--captions", "own.toml"]).good();
}
