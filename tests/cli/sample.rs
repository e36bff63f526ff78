//! `lokr sample`: pictures from a base model, with and without an adapter.

use insta::assert_snapshot;

use crate::support::*;

/// Draws one picture as the run's previews are drawn, and gives its bytes.
fn draw(world: &World, more: &[&str]) -> Vec<u8> {
    let base = tiny_base().display().to_string();
    let fixed = ["sample", "--base", &base, "--width", "64", "--height", "64", "--steps", "3", "--out", "out.png"];
    let ran = world.lokr(&[&fixed, more].concat()).good();
    assert_eq!(ran.out, "wrote picture out.png\n");
    bytes(world.path("out.png"))
}

const DISK: &[&str] = &["--prompt", "disk, red", "--seed", "5"];

#[test]
fn the_picture_has_the_size_asked_for_and_the_seed_decides_it() {
    let world = World::new("sample-seed");
    let first = draw(&world, DISK);
    assert_eq!(picture(world.path("out.png")).dimensions(), (64, 64));
    assert!(first == draw(&world, DISK), "the same seed, the same bytes");
    assert!(first != draw(&world, &["--prompt", "disk, red", "--seed", "6"]), "another seed");
    assert!(first != draw(&world, &["--prompt", "disk, blue", "--seed", "5"]), "another prompt");
    let base = tiny_base().display().to_string();
    let wide = ["sample", "--base", &base, "--width", "96", "--height", "40", "--steps", "2", "--prompt", "disk", "--out", "wide.png"];
    world.lokr(&wide).good();
    assert_eq!(picture(world.path("wide.png")).dimensions(), (96, 40));
}

#[test]
fn with_strength_0_it_is_the_base_models_and_with_1_the_runs_preview() {
    let (run, _) = finished();
    let world = World::new("sample-strength");
    let lokr = run.path("run/shapes.safetensors").display().to_string();
    let base = draw(&world, DISK);
    assert!(base == bytes(run.path("run/previews/step-00000000_00.png")), "the base model, as the run drew it before its first step");
    let with = |strength: &str| draw(&world, &[DISK, &["--lokr", &format!("{lokr}{strength}")]].concat());
    assert!(base == with(":0"), "strength 0");
    assert!(bytes(run.path("run/previews/step-00000007_00.png")) == with(""), "strength 1");
    assert!(with("") == with(":1.0"));
    assert!(with(":0.5") != base && with(":0.5") != with(""), "strength 0.5 is neither");
}

#[test]
fn negative_prompt_emphasis_and_guidance_change_the_picture_and_escapes_are_text() {
    let world = World::new("sample-prompt");
    let plain = draw(&world, DISK);
    assert!(plain != draw(&world, &[DISK, &["--negative-prompt", "dark"]].concat()), "a negative prompt");
    assert!(plain != draw(&world, &["--prompt", "disk, (red:1.4)", "--seed", "5"]), "emphasis");
    assert!(plain == draw(&world, &["--prompt", "disk, (red:1.0)", "--seed", "5"]), "emphasis of 1 is none");
    assert!(plain != draw(&world, &["--prompt", r"disk, \(red\)", "--seed", "5"]), "brackets that are text");
    assert!(plain != draw(&world, &[DISK, &["--guidance-scale", "3"]].concat()), "less guidance");
    let alone = draw(&world, &[DISK, &["--guidance-scale", "1"]].concat());
    assert!(alone == draw(&world, &[DISK, &["--guidance-scale", "1", "--negative-prompt", "dark"]].concat()), "without guidance");
    // More than 75 tokens: a second row of them.
    let long = "disk, ".repeat(60) + "red";
    assert!(plain != draw(&world, &["--prompt", &long, "--seed", "5"]));
}

#[test]
fn every_sampler_and_spacing_draws_a_picture_of_its_own() {
    let world = World::new("sample-samplers");
    let mut seen = vec![draw(&world, DISK)];
    for more in [["--sampler", "euler_ancestral"], ["--sampler", "dpmpp_2m"], ["--scheduler", "karras"], ["--scheduler", "leading"]] {
        let drawn = draw(&world, &[DISK, &more].concat());
        assert!(!seen.contains(&drawn), "{more:?}");
        seen.push(drawn);
    }
}

#[test]
fn several_prompts_and_seeds_fill_a_folder() {
    let world = World::new("sample-folder");
    let base = tiny_base().display().to_string();
    let args = ["sample", "--base", &base, "--width", "64", "--height", "64", "--steps", "3", "--count", "2", "--seed", "5"];
    let ran = world.lokr(&[&args[..], &["--prompt", "disk, blue", "--prompt", "disk, red", "--out", "drawn"]].concat()).good();
    assert_eq!(ran.out.lines().count(), 4);
    assert_eq!(listing(world.path("drawn")), ["00_5.png", "00_6.png", "01_5.png", "01_6.png"]);
    assert!(bytes(world.path("drawn/01_5.png")) == draw(&world, DISK), "as drawn alone");
}

#[test]
fn what_cannot_be_drawn_is_refused_with_the_way_out() {
    let world = World::new("sample-refused");
    let base = tiny_base().display().to_string();
    let refused = |more: &[&str]| {
        let err = world.lokr(&[&["sample", "--base", &base, "--prompt", "disk", "--out", "out.png"], more].concat()).refusal();
        assert!(!world.path("out.png").exists());
        masked(&err, &world.folder)
    };
    assert_snapshot!(refused(&["--width", "60", "--height", "64"]), @"
    error: a picture of 60x64 cannot be drawn: sides must be multiples of 8
    hint: take 64x64
    ");
    assert_snapshot!(refused(&["--width", "0", "--height", "64"]), @"
    error: a picture of 0x64 cannot be drawn: sides must be multiples of 8
    hint: take 8x64
    ");
    assert_snapshot!(refused(&["--steps", "0", "--width", "64", "--height", "64"]), @"
    error: 0 sampling steps cannot be spaced over 1000 timesteps
    hint: use between 1 and 999 steps; 20 to 40 are usual
    ");
    assert_snapshot!(refused(&["--sampler", "eular"]), @"
    error: there is no sampler named `eular`
    hint: choose one of euler, euler_ancestral, dpmpp_2m, ddim
    ");
    assert_snapshot!(refused(&["--count", "2"]), @"
    error: --out out.png is one file, for 2 pictures
    hint: give a folder
    ");
    assert_snapshot!(refused(&["--lokr", "none.safetensors:0.5"]), @"
    error: cannot read `none.safetensors`
      because: No such file or directory (os error 2)
    hint: the path is relative to the current folder `[folder]`
    ");
    assert_snapshot!(refused(&["--lokr", "none.safetensors:half"]), @"
    error: --lokr none.safetensors:half: there is no such file, and `half` is no strength
    hint: write the file alone, or a number behind the colon: file.safetensors:0.8
    ");
    let model = golden("tiny-sdxl.safetensors").display().to_string();
    assert_snapshot!(refused(&["--lokr", &model]), @"
    error: [golden]/tiny-sdxl.safetensors: no LoKr tensors among its 971 tensors
    hint: this looks like a whole model
    ");
}
