//! Picture folders with something wrong in them.

use insta::assert_snapshot;

use crate::support::*;

/// What the program says to this folder.
fn refused(world: &World, folder: &str) -> String {
    let err = world.train(&[&format!("dataset.subsets[0].image_dir={folder}")]).refusal();
    assert!(!world.run().join("checkpoints").exists());
    masked(&err, &world.folder)
}

#[test]
fn a_missing_folder_is_named() {
    assert_snapshot!(refused(&World::new("pictures-missing"), "my pictures"), @"");
}

#[test]
fn a_folder_without_pictures_is_named() {
    let world = World::new("pictures-none");
    std::fs::create_dir(world.path("empty")).expect("a folder");
    std::fs::write(world.path("empty/notes.txt"), "no picture").expect("written");
    assert_snapshot!(refused(&world, "empty"), @"");
}

/// A folder with two broken pictures among nine good ones: one that is no picture, and one that is cut short.
fn broken(name: &str) -> World {
    let world = World::new(name);
    std::fs::write(world.path("pictures/not-a-picture.png"), "hello").expect("written");
    std::fs::write(world.path("pictures/not-a-picture.txt"), "disk").expect("written");
    std::fs::copy(world.path("held-out/10.png"), world.path("pictures/torn.png")).expect("copied");
    damage(&world.path("pictures/torn.png"), Damage::Cut);
    damage(&world.path("pictures/torn.png"), Damage::Cut);
    std::fs::write(world.path("pictures/torn.txt"), "disk").expect("written");
    world
}

#[test]
fn broken_pictures_are_named_counted_and_left_out() {
    for cached in ["true", "false"] {
        let world = broken(&format!("pictures-broken-{cached}"));
        let ran = world.train(&["train.max_train_steps=3", &format!("dataset.cache_latents={cached}")]).ended_with(0);
        let start = ran.out.split("part ").next().unwrap_or_default();
        assert_snapshot!(format!("cached_{cached}"), start);
        assert!(ran.warnings().iter().any(|w| w.contains("pictures/torn.png") && w.contains("cut short")), "{}", ran.all());
        assert_eq!(steps_in_metrics(&world.run()), [1, 2, 3]);
    }
}

#[test]
fn broken_pictures_end_the_run_if_asked() {
    let world = broken("pictures-broken-fail");
    let err = world.train(&["dataset.on_broken_image=fail"]).refusal();
    assert_snapshot!(err, @"");
    std::fs::remove_file(world.path("pictures/not-a-picture.png")).expect("removed");
    let err = world.train(&["dataset.on_broken_image=fail"]).refusal();
    assert_snapshot!(err, @"");
    assert!(!world.run().join("checkpoints").exists());
}

#[test]
fn empty_and_missing_captions_are_named_and_counted() {
    let world = World::new("captions-empty");
    std::fs::write(world.path("pictures/01.txt"), "").expect("written");
    std::fs::write(world.path("pictures/02.txt"), " \n").expect("written");
    std::fs::remove_file(world.path("pictures/03.txt")).expect("removed");
    let ran = world.train(&["train.max_train_steps=1"]).good();
    assert_snapshot!(ran.out.split("part ").next().unwrap_or_default(), @"");
}

#[test]
fn a_caption_that_is_no_text_is_named_with_the_byte() {
    let world = World::new("captions-bytes");
    std::fs::write(world.path("pictures/01.txt"), b"disk, caf\xe9").expect("written");
    assert_snapshot!(masked(&world.train(&[]).refusal(), &world.folder), @"");
}

#[test]
fn odd_captions_are_trained_on() {
    let world = World::new("captions-odd");
    std::fs::write(world.path("pictures/01.txt"), "tag, ".repeat(20_000)).expect("written");
    std::fs::write(world.path("pictures/02.txt"), "a\0b, \u{1f600}, (((, \\(, <|endoftext|>").expect("written");
    std::fs::write(world.path("pictures/03.txt"), "\u{feff}disk\r\nsecond line\r\n").expect("written");
    let ran = world.train(&["train.max_train_steps=3"]).ended_with(0);
    assert_eq!(steps_in_metrics(&world.run()), [1, 2, 3], "{}", ran.all());
}
