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
    assert_snapshot!(refused(&World::new("pictures-missing"), "my pictures"), @r#"
    error: dataset.subsets[0].image_dir = "my pictures" does not exist
    hint: relative paths start at the current folder, [folder]: go to another one or correct dataset.subsets[0].image_dir
    "#);
}

#[test]
fn a_folder_without_pictures_is_named() {
    let world = World::new("pictures-none");
    std::fs::create_dir(world.path("empty")).expect("a folder");
    std::fs::write(world.path("empty/notes.txt"), "no picture").expect("written");
    assert_snapshot!(refused(&world, "empty"), @"error: subsets[0].image_dir = `empty` holds no image (png, jpg, jpeg, webp, bmp)");
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
    let [cached, uncached] = ["true", "false"].map(|cached| {
        let world = broken(&format!("pictures-broken-{cached}"));
        let ran = world.train(&["train.max_train_steps=3", &format!("dataset.cache_latents={cached}")]).ended_with(0);
        // That a picture is cut short shows when it is decoded.
        assert!(ran.warnings().iter().any(|w| w.contains("pictures/torn.png") && w.contains("cut short")), "{}", ran.all());
        assert_eq!(steps_in_metrics(&world.run()), [1, 2, 3]);
        // Ten visits in the three steps of the epoch, one of them of the torn picture.
        let told =
            "broken pictures: 1 left out at the start, 1 found later (pictures/torn.png); another one took their place at 1 of 10 visits";
        assert_eq!(ran.lines("broken pictures:"), [told]);
        assert_eq!(metrics(&world.run()).last().expect("a line")["replaced"], 1);
        ran.out.split("part ").next().unwrap_or_default().to_string()
    });
    assert_snapshot!(cached, @"
    images: 11 found, 10 used, 10 visits per epoch
    captions: 10 from files
    left out, image not usable: 1
      pictures/not-a-picture.png: the content is not png, jpeg, webp or bmp
    buckets: 2
        32x96         4 images        4 visits  crop loss 15.8 %
        64x64         6 images        6 visits  crop loss  0.0 %
    ");
    assert_eq!(cached, uncached);
}

#[test]
fn broken_pictures_end_the_run_if_asked() {
    let world = broken("pictures-broken-fail");
    let err = world.train(&["dataset.on_broken_image=fail"]).refusal();
    assert_snapshot!(err, @r#"
    error: image `pictures/not-a-picture.png` cannot be used
      because: the content is not png, jpeg, webp or bmp
    hint: repair or remove the file, or set on_broken_image = "skip" to leave such files out
    "#);
    std::fs::remove_file(world.path("pictures/not-a-picture.png")).expect("removed");
    // That a picture is cut short shows when it is decoded, which the dataset tells as well.
    let err = world.train(&["dataset.on_broken_image=fail"]).ended_with(1).err;
    assert_snapshot!(err, @r#"
     WARN image `pictures/torn.png` cannot be used: cut short: the png data ends before the picture does
    error: image `pictures/torn.png` cannot be used
      because: cut short: the png data ends before the picture does
    hint: repair or remove the file, or set on_broken_image = "skip" to leave such files out
    "#);
    assert!(!world.run().join("checkpoints").exists());
}

#[test]
fn empty_and_missing_captions_are_named_and_counted() {
    let world = World::new("captions-empty");
    std::fs::write(world.path("pictures/01.txt"), "").expect("written");
    std::fs::write(world.path("pictures/02.txt"), " \n").expect("written");
    std::fs::remove_file(world.path("pictures/03.txt")).expect("removed");
    let ran = world.train(&["train.max_train_steps=1"]).good();
    assert_snapshot!(ran.out.split("part ").next().unwrap_or_default(), @"
    images: 9 found, 9 used, 9 visits per epoch
    captions: 6 from files
    no caption file and no class_tokens, trained with an empty caption: 1
      pictures/03.png
    empty caption file: 2
      pictures/01.png
      pictures/02.png
    buckets: 2
        32x96         4 images        4 visits  crop loss 15.8 %
        64x64         5 images        5 visits  crop loss  0.0 %
    ");
}

#[test]
fn a_caption_that_is_no_text_is_named_with_the_byte_and_left_out_or_fatal() {
    let world = World::new("captions-bytes");
    std::fs::write(world.path("pictures/01.txt"), b"disk, caf\xe9").expect("written");
    let ran = world.train(&["train.max_train_steps=1"]).good();
    assert_snapshot!(ran.out.split("part ").next().unwrap_or_default(), @"
    images: 9 found, 8 used, 8 visits per epoch
    captions: 8 from files
    left out, caption not readable: 1
      pictures/01.txt: it is not UTF-8 (byte 9)
    buckets: 2
        32x96         3 images        3 visits  crop loss 15.8 %
        64x64         5 images        5 visits  crop loss  0.0 %
    ");
    assert_snapshot!(world.train(&["output.dir=other", "dataset.on_broken_image=fail"]).refusal(), @r#"
    error: caption `pictures/01.txt` cannot be used: it is not UTF-8 (byte 9)
    hint: repair or remove the file, or set on_broken_image = "skip" to leave such files out
    "#);
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

/// The header of a PNG of this size, with nothing behind it.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut chunk = b"IHDR".to_vec();
    chunk.extend([width.to_be_bytes(), height.to_be_bytes()].concat());
    chunk.extend([8, 2, 0, 0, 0]);
    let crc = !chunk
        .iter()
        .fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 }));
    [&b"\x89PNG\r\n\x1a\n\0\0\0\x0d"[..], &chunk, &crc.to_be_bytes()].concat()
}

#[test]
fn empty_huge_and_mislabelled_pictures_are_told_by_their_content() {
    let world = World::new("pictures-hostile");
    let put = |name: &str, content: &[u8]| {
        std::fs::write(world.path("pictures").join(name), content).expect("written");
        std::fs::write(world.path("pictures").join(name).with_extension("txt"), "disk").expect("written");
    };
    put("empty.png", b"");
    put("huge.png", &png_header(2_000_000_000, 2_000_000_000));
    put("large.png", &png_header(40_000, 40_000));
    put("text.jpg", b"not a picture at all, whatever its name says");
    // A PNG by content under a JPEG's name is a picture.
    put("png.jpg", &bytes(world.path("held-out/10.png")));
    let ran = world.train(&["train.max_train_steps=3"]).ended_with(0);
    assert!(ran.out.contains("images: 14 found, 10 used"), "{}", ran.all());
    for name in ["empty.png: ", "huge.png: ", "large.png: ", "text.jpg: "] {
        assert_eq!(ran.lines(&format!("pictures/{name}")).len(), 1, "{name} {}", ran.all());
    }
    assert!(!ran.out.contains("pictures/png.jpg: "), "{}", ran.all());
    assert_eq!(steps_in_metrics(&world.run()), [1, 2, 3]);
}
