//! A folder to work in: pictures with captions, and a recipe that trains for a second.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use image::{Rgb, RgbImage};

use super::{Ran, Running, lokr, start, with_metadata};

/// The recipe of the tests. Nine pictures in two buckets make five batches of two, two of them short, and three steps of two batches,
/// one of them short: an epoch that divides by nothing. Everything random is on.
const RECIPE: &str = r#"
[model]
base = "{base}"
head_dim = 8
norm_num_groups = 8
te1_heads = 2
te2_heads = 4
vae_norm_num_groups = 16

[network]
preset = "full"
factor = 2
full_matrix = true

[train]
max_train_steps = 7
batch_size = 2
gradient_accumulation_steps = 2
seed = 1
optimizer = "Lion"
unet_lr = 2e-4
text_encoder_lr = 1e-4
min_snr_gamma = 5.0
noise_offset = 0.0357
threads = 1

[dataset]
resolution = 64
min_bucket_reso = 32
max_bucket_reso = 96
bucket_reso_steps = 32
cache_latents = true

[[dataset.subsets]]
image_dir = "pictures"
shuffle_caption = true
keep_tokens = 1
caption_tag_dropout_rate = 0.2
caption_dropout_rate = 0.1
flip_aug = true

[output]
dir = "run"
name = "shapes"
save_every_n_steps = 2
"#;

/// Previews and validation, which most tests do without.
pub const PREVIEWS: &[&str] = &[
    "sample.prompts=['disk, red', 'disk, (blue:1.2)']",
    "sample.sample_at_first=true",
    "sample.sample_every_n_steps=3",
    "sample.width=64",
    "sample.height=64",
    "sample.steps=3",
    "sample.seed=5",
    "validation.image_dir=held-out",
    "validation.every_n_steps=3",
];

/// Values of SDXL's that the tiny model has not, as its file would carry them.
const TINY: &str = r#"{"head_dim":8,"norm_num_groups":8,"te1_heads":2,"te2_heads":4,"vae_norm_num_groups":16}"#;

/// The repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests lie in the repository").to_path_buf()
}

/// A file of the golden data.
pub fn golden(name: &str) -> PathBuf {
    let folder = std::env::var_os("LOKR_GOLDEN").map_or_else(|| repository().join("tests/golden"), PathBuf::from);
    folder.join(name)
}

/// Folder of this process's tests; those that earlier processes left are removed.
fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
        for entry in std::fs::read_dir(tmp).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.strip_prefix("end-to-end-").is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                // Another process may be doing the same.
                _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let root = tmp.join(format!("end-to-end-{}", std::process::id()));
        std::fs::create_dir_all(&root).expect("a folder");
        root
    })
}

/// A folder with pictures, held-out pictures and `recipe.toml`. It is removed with the value, unless the test failed.
pub struct World {
    /// The folder.
    pub folder: PathBuf,
    keep: bool,
}

impl World {
    /// A new one; the name is the test's.
    pub fn new(name: &str) -> Self {
        let folder = root().join(name);
        for (place, numbers) in [("pictures", 0..9), ("held-out", 9..11)] {
            std::fs::create_dir_all(folder.join(place)).expect("a folder");
            for n in numbers {
                draw(&folder.join(place), n);
            }
        }
        let recipe = RECIPE.replace("{base}", &golden("tiny-sdxl.safetensors").display().to_string());
        std::fs::write(folder.join("recipe.toml"), recipe).expect("written");
        Self { folder, keep: false }
    }

    /// Keeps the folder for other tests of this process.
    pub fn kept(mut self) -> Self {
        self.keep = true;
        self
    }

    /// The run's folder.
    pub fn run(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Trains the recipe with these keys replaced.
    pub fn train(&self, set: &[&str]) -> Ran {
        self.train_with(set, &[])
    }

    /// Trains the recipe with these keys replaced and these further arguments.
    pub fn train_with(&self, set: &[&str], more: &[&str]) -> Ran {
        self.lokr(&[&arguments(set), more].concat())
    }

    /// Starts training.
    pub fn start(&self, set: &[&str]) -> Running {
        start(&self.folder, &arguments(set))
    }

    /// Runs `lokr` in the folder.
    pub fn lokr(&self, args: &[&str]) -> Ran {
        lokr(&self.folder, args)
    }

    /// Changes the recipe's text; what is replaced must be there.
    pub fn edit_recipe(&self, from: &str, to: &str) {
        let path = self.path("recipe.toml");
        let recipe = super::text(&path);
        assert!(recipe.contains(from), "the recipe has no {from}");
        std::fs::write(path, recipe.replace(from, to)).expect("written");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !self.keep && !std::thread::panicking() {
            _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}

/// The arguments that train the recipe with these keys replaced.
pub fn arguments<'a>(set: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["train", "--config", "recipe.toml"];
    set.iter().for_each(|s| args.extend(["--set", s]));
    args
}

/// A disk on a plain ground, with its caption; upright pictures and square ones.
fn draw(folder: &Path, n: u32) {
    let names = ["red", "green", "blue", "white"];
    let colours = [[220, 40, 40], [40, 200, 60], [40, 60, 220], [240, 240, 240]];
    let (disk, ground) = (n as usize % 4, (n as usize / 4 + 1) % 4);
    let (width, height) = if n.is_multiple_of(2) { (64, 64) } else { (40, 100) };
    let picture = RgbImage::from_fn(width, height, |x, y| {
        let (dx, dy) = (x as i32 - width as i32 / 2 - n as i32, y as i32 - height as i32 / 2);
        Rgb(if dx * dx + dy * dy < 200 { colours[disk] } else { colours[ground].map(|c: u8| c / 2 + 20) })
    });
    picture.save(folder.join(format!("{n:02}.png"))).expect("written");
    let caption = format!("disk, {}, {} ground, number {n}\n", names[disk], names[ground]);
    std::fs::write(folder.join(format!("{n:02}.txt")), caption).expect("written");
}

/// The library `shim.c`; `None` where there is no compiler for it.
pub fn shim() -> Option<&'static Path> {
    static SHIM: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        let (source, library) = (repository().join("tests/cli/support/shim.c"), root().join("shim.so"));
        let mut cc = std::process::Command::new("cc");
        cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).arg("-ldl");
        let built = cfg!(target_os = "linux") && cc.output().is_ok_and(|o| o.status.success());
        if !built {
            eprintln!("skipped: no C compiler that makes a library for LD_PRELOAD here");
        }
        built.then_some(library)
    };
    SHIM.get_or_init(build).as_deref()
}

/// A finished run of the recipe with previews and validation, for tests that only look at it, and what it printed.
pub fn finished() -> &'static (World, Ran) {
    static FINISHED: OnceLock<(World, Ran)> = OnceLock::new();
    FINISHED.get_or_init(|| {
        let world = World::new("finished").kept();
        let ran = world.train(PREVIEWS).good();
        (world, ran)
    })
}

/// The tiny model as a file that says itself what its tensors do not, for the commands without a recipe.
pub fn tiny_base() -> &'static Path {
    static BASE: OnceLock<PathBuf> = OnceLock::new();
    BASE.get_or_init(|| {
        let path = root().join("tiny.safetensors");
        with_metadata(&golden("tiny-sdxl.safetensors"), &path, "lokr.config", TINY);
        path
    })
}
