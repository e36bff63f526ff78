//! The recipe: reading, faults with their places, rules, overrides, and the pages made from the declarations.
#![allow(clippy::disallowed_methods)]

use super::*;

const SMALL: &str = "[model]\nbase = \"base.safetensors\"\n\n[train]\nmax_train_steps = 10\n\n[output]\ndir = \"out\"\n\n[[dataset.subsets]]\nimage_dir = \"images\"\n";

fn parse(text: &str) -> Result<RunConfig, ConfigError> {
    RunConfig::parse(text, Path::new("recipe.toml"), &[])
}

fn with(overrides: &[&str]) -> Result<RunConfig, ConfigError> {
    RunConfig::parse(SMALL, Path::new("recipe.toml"), &overrides.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>())
}

/// The faults of SMALL with `lines` appended, as "place: what" and the hint.
fn faults(text: &str) -> Vec<(String, String)> {
    match parse(text) {
        Err(ConfigError::Faults(list)) => list.iter().map(|f| (f.to_string(), f.hint.clone().unwrap_or_default())).collect(),
        other => panic!("{other:?}"),
    }
}

fn fault(text: &str) -> (String, String) {
    let mut list = faults(text);
    assert_eq!(list.len(), 1, "{list:?}");
    list.remove(0)
}

fn problems(overrides: &[&str]) -> Vec<Problem> {
    with(overrides).unwrap().check().expect_err("a problem")
}

#[test]
fn a_small_recipe_gets_the_defaults() {
    let config = parse(SMALL).unwrap();
    config.check().unwrap();
    assert_eq!(config.model.base, Path::new("base.safetensors"));
    assert_eq!(config.train.betas, Some([0.9, 0.99]));
    assert_eq!(config.network.conv_dim, Some(config.network.dim));
    assert_eq!(config.dataset.subsets.len(), 1);
    assert_eq!(with(&["train.optimizer=AdamW"]).unwrap().train.weight_decay, Some(0.01));
}

#[test]
fn the_adapter_has_lycoris_defaults() {
    let preset = || lokr::Preset::load("full").unwrap();
    let mut ours = RunConfig { network: NetworkConfig { alpha: 1.0, ..Default::default() }, ..Default::default() }.adapter(preset());
    ours.seed = 0;
    assert_eq!(format!("{ours:?}"), format!("{:?}", lokr::NetworkConfig::new(preset())));
}

#[test]
fn a_complete_recipe_reads_back_as_itself() {
    let rich = [
        "train.lr_scheduler=cosine_with_restarts",
        "train.lr_warmup_steps=0.05",
        "train.text_encoder_lr=[5e-6, 0]",
        "train.unet_lr=0.00012345678901234567",
        "train.loss_type=huber",
        "train.noise_offset=0.0357",
        "train.compat=sd-scripts",
        "train.min_snr_gamma=5",
        "dataset.resolution=[1024, 768]",
        "dataset.keep_tokens_separator=|||",
        "dataset.cache_latents_to_disk=true",
        "dataset.subsets[1].image_dir=a \"quoted\" name",
        "dataset.subsets[1].num_repeats=3",
        "sample.prompts=[\"one\", {prompt = \"two\", width = 512, guidance_scale = 4.5}]",
        "sample.sample_every_n_steps=5",
        "output.resume=runs/old/checkpoint",
        "output.metadata_title=Käse\tund ☃",
        "validation.image_dir=held-out",
        "validation.every_n_steps=100",
    ];
    for config in [parse(SMALL).unwrap(), with(&rich).unwrap()] {
        let text = config.to_toml();
        let back = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(back, config, "{text}");
        assert_eq!(back.to_toml(), text);
        // Complete: every key of every section is there, with a value or as not set.
        for section in catalog().iter().filter(|s| s.name != "sample.prompts") {
            for key in &section.keys {
                let found = text.lines().any(|l| l.starts_with(&format!("{} = ", key.name)) || l == format!("# {} is not set", key.name));
                assert!(found, "{}.{} is missing in\n{text}", section.name, key.name);
            }
        }
    }
    let config = with(&rich).unwrap();
    config.check().unwrap();
    assert_eq!(config.train.lr_warmup_steps, StepCount::Ratio(0.05));
    assert_eq!(config.train.text_encoder_lr, TextEncoderLr { te1: 5e-6, te2: 0.0 });
    assert_eq!(config.train.huber_c, Some(0.1));
    assert_eq!(config.sample.prompts[1].guidance_scale, Some(4.5));
    assert_eq!(config.dataset.crop_condition, ::dataset::CropCondition::SdScripts);
    assert!(config.cache.cache_latents);
    // A subset key in [dataset] holds for every subset.
    assert!(config.dataset.subsets.iter().all(|s| s.keep_tokens_separator.as_deref() == Some("|||")));
    assert_eq!((config.dataset.subsets[0].num_repeats, config.dataset.subsets[1].num_repeats), (1, 3));
}

#[test]
fn unknown_keys_name_the_nearest_one_and_their_line() {
    let (what, hint) = fault(&SMALL.replace("max_train_steps = 10", "max_train_steps = 10\nbatchsize = 4"));
    assert_eq!(what, "recipe.toml:6: unknown key `train.batchsize`");
    assert_eq!(hint, "did you mean `batch_size`?");
    let (what, hint) = fault(&format!("{SMALL}shufle_caption = true\n"));
    assert_eq!(what, "recipe.toml:12: unknown key `dataset.subsets.shufle_caption`");
    assert_eq!(hint, "did you mean `shuffle_caption`?");
    let (what, hint) = fault(&format!("{SMALL}[trian]\nx = 1\n"));
    assert_eq!((what.as_str(), hint.as_str()), ("recipe.toml:12: unknown section [trian]", "did you mean [train]?"));
    let (_, hint) = fault(&format!("{SMALL}[sample]\nprompts = [{{ prompt = \"x\", hight = 512 }}]\n"));
    assert_eq!(hint, "did you mean `height`?");
    let (what, hint) = fault(&SMALL.replace("[train]", "[train]\nqqqqqqqq = 1"));
    assert_eq!((what.as_str(), hint.as_str()), ("recipe.toml:5: unknown key `train.qqqqqqqq`", ""));
}

#[test]
fn known_keys_in_the_wrong_section_say_which_one() {
    let (what, hint) = fault(&SMALL.replace("[train]", "[train]\nfactor = 8"));
    assert_eq!(what, "recipe.toml:5: `factor` is not a key of [train]");
    assert_eq!(hint, "it belongs in [network]");
    let (what, hint) = fault(&format!("unet_lr = 1e-5\n{SMALL}"));
    assert_eq!(what, "recipe.toml:1: `unet_lr` is not a key of the top level");
    assert_eq!(hint, "it belongs in [train]");
    let (_, hint) = fault(&format!("{SMALL}resolution = 512\n"));
    assert_eq!(hint, "it belongs in [dataset]");
    let (_, hint) = fault(&format!("{SMALL}[dataset]\nimage_dir = \"x\"\n").replace("[[dataset.subsets]]\nimage_dir = \"images\"\n", ""));
    assert_eq!(hint, "it belongs in [[dataset.subsets]] or [validation]");
}

#[test]
fn names_of_sd_scripts_are_recognised() {
    let list = faults(
        "[model_arguments]\npretrained_model_name_or_path = \"x\"\n[training]\ntrain_batch_size = 4\nxformers = true\n[train]\noptimizer_args = [\"weight_decay=0.1\"]\nlearning_rate = 1.0\n",
    );
    let all: String = list.iter().map(|(what, hint)| format!("{what} -> {hint}\n")).collect();
    for wanted in [
        "recipe.toml:1: unknown section [model_arguments]",
        "recipe.toml:2: unknown key `pretrained_model_name_or_path`: sd-scripts' `pretrained_model_name_or_path` is called model.base here -> write model.base",
        "recipe.toml:4: unknown key `train_batch_size`: sd-scripts' `train_batch_size` is called train.batch_size here",
        "recipe.toml:5: unknown key `xformers`: sd-scripts' `xformers` has no key of its own here -> remove it",
        "recipe.toml:7: unknown key `train.optimizer_args`: sd-scripts' `optimizer_args` is called train.betas or train.weight_decay here",
        "recipe.toml:8: unknown key `train.learning_rate`: sd-scripts' `learning_rate` has no key of its own here -> each part",
        "recipe.toml: model.base is missing",
        "recipe.toml: output.dir is missing -> add to [output]: dir = ",
    ] {
        assert!(all.contains(wanted), "no `{wanted}` in\n{all}");
    }
    // In the order of the text.
    assert!(all.find(":2:").unwrap() < all.find(":7:").unwrap());
}

#[test]
fn an_option_of_sd_scripts_is_a_key_or_has_an_advice_but_not_both() {
    let sections = catalog();
    for (name, advice) in foreign::WITHOUT_COUNTERPART {
        assert!(!sections.iter().flat_map(|s| &s.keys).any(|k| k.name == *name), "{name} is a key");
        let renamed = |k: &Key| matches!(k.origin, Origin::Named(names) if names.contains(name));
        assert!(!sections.iter().flat_map(|s| &s.keys).any(renamed), "{name} is a key under another name");
        // What it sends to must exist.
        for word in advice.split(|c: char| c.is_whitespace() || ",;:=".contains(c)) {
            if let Some((section, key)) = word.split_once('.').filter(|(s, k)| !k.is_empty() && sections.iter().any(|d| d.name == *s)) {
                let key = key.trim_end_matches('*');
                let known = sections.iter().any(|d| d.name == section && d.keys.iter().any(|k| k.name.starts_with(key)));
                assert!(known || format!("{section}.{key}") == "dataset.subsets", "{name}: {word}");
            }
        }
    }
}

#[test]
fn wrong_types_say_what_was_expected() {
    for (line, what, hint) in [
        ("batch_size = \"4\"", "train.batch_size: expected whole number, found the text \"4\"", "write 4 without quotes"),
        ("batch_size = -1", "train.batch_size: expected whole number, found the number -1", ""),
        ("batch_size = 4.0", "train.batch_size: expected whole number, found the number 4.0", "write 4 without a decimal point"),
        ("unet_lr = true", "train.unet_lr: expected number, found true", ""),
        ("unet_lr = nan", "train.unet_lr: expected number, found the number nan", ""),
        (
            "gradient_checkpointing = \"False\"",
            "train.gradient_checkpointing: expected one of \"none\", \"block\", \"layer\", true or false, found the text \"False\"",
            "write false without quotes",
        ),
        (
            "optimizer = \"lion8bit\"",
            "train.optimizer: expected one of \"Lion\", \"Lion8bit\", \"AdamW\", found the text \"lion8bit\"",
            "did you mean \"Lion8bit\"?",
        ),
        ("betas = [0.9]", "train.betas: expected list of two numbers, found the list [0.9]", ""),
        (
            "lr_warmup_steps = 1000.0",
            "train.lr_warmup_steps: expected whole number of steps, or a part of all steps between 0 and 1, found the number 1000.0",
            "write 1000 without a decimal point",
        ),
        ("compat = {}", "train.compat: expected \"sd-scripts\", found a table", ""),
    ] {
        let (got, way_out) = fault(&SMALL.replace("[train]", &format!("[train]\n{line}")));
        assert_eq!(got, format!("recipe.toml:5: {what}"));
        assert_eq!(way_out, hint, "{line}");
    }
    let (got, _) = fault(&format!("{SMALL}flip_aug = 1\n"));
    assert_eq!(got, "recipe.toml:12: dataset.subsets[0].flip_aug: expected true or false, found the number 1");
    let (got, hint) = fault(&SMALL.replace("[[dataset.subsets]]", "[dataset.subsets]"));
    assert!(got.contains("expected a list of tables") && hint.contains("two brackets"), "{got} {hint}");
    let (got, _) = fault(&SMALL.replace("[[dataset.subsets]]", "[dataset]\nresolution = \"1024\"\n[[dataset.subsets]]"));
    assert!(got.contains("dataset.resolution: expected whole number, or [width, height]"), "{got}");
    let (got, hint) = fault(&format!("train = 5\n{}", SMALL.replace("[train]\nmax_train_steps = 10\n", "")));
    assert!(got.contains("`train` is a section") && hint.contains("[train]"), "{got}");
}

#[test]
fn broken_toml_has_line_and_column() {
    for (text, place) in [
        ("[model]\nbase = \n", "recipe.toml:2:"),
        ("[model]\nbase = \"a\"\nbase = \"b\"\n", "recipe.toml:3:1"),
        ("é = [1\n", "recipe.toml:1:"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(matches!(error, ConfigError::Syntax { .. }) && error.to_string().starts_with(place), "{error}");
    }
}

#[test]
fn overrides_are_read_as_toml_or_as_bare_text() {
    let config =
        with(&["train.seed=7", "output.name=2024", "train.unet_lr = 1", "train.mixed_precision=no", "dataset.flip_aug=true"]).unwrap();
    assert_eq!((config.train.seed, config.output.name.as_str(), config.train.unet_lr), (7, "2024", 1.0));
    assert!(config.dataset.subsets[0].flip_aug);
    assert_eq!(with(&["train.seed=7", "train.seed=8"]).unwrap().train.seed, 8);
    assert_eq!(with(&["dataset.subsets[0].image_dir=123"]).unwrap().dataset.subsets[0].image_dir, Path::new("123"));
    for (argument, what, hint) in [
        ("train.sed=7", "--set train.sed=7: unknown key `train.sed`", "did you mean `seed`?"),
        ("train.seed=x", "--set train.seed=x: train.seed: expected whole number, found the text \"x\"", ""),
        ("seed=7", "--set seed=7: no section", "section.key=value"),
        ("train.seed", "--set train.seed: no `=`", "section.key=value"),
        ("dataset.subsets[5].num_repeats=2", "--set dataset.subsets[5].num_repeats=2: no such place", "section.key=value"),
        ("train_batch_size.x=2", "unknown section [train_batch_size]", "the sections are [model]"),
    ] {
        match with(&[argument]) {
            Err(ConfigError::Faults(list)) => {
                assert!(list[0].to_string().contains(what), "{}", list[0]);
                assert!(list[0].hint.clone().unwrap_or_default().contains(hint), "{list:?}");
            }
            other => panic!("{argument}: {other:?}"),
        }
    }
}

#[test]
fn several_faults_are_told_together() {
    let error = parse("[train]\nsed = 1\nbatch_size = true\n").unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("the recipe has 4 faults\n  recipe.toml:2: unknown key `train.sed`\n  recipe.toml:3: "), "{text}");
    assert!(error.hint().unwrap().contains("recipe.toml:2: did you mean `seed`?"));
}

/// One line per rule: what breaks it, the keys that it must name, a piece of the way out.
#[test]
fn rules_between_keys_name_both_and_the_way_out() {
    let cases: &[(&[&str], &[&str], &str)] = &[
        (&["train.max_train_epochs=3"], &["train.max_train_steps", "train.max_train_epochs"], "remove one"),
        (&["train.max_train_steps=0"], &["train.max_train_steps"], "1 or more"),
        (&["train.lr_scheduler=cosine", "train.lr_warmup_steps=10"], &["train.lr_warmup_steps", "train.max_train_steps"], "lower"),
        (&["train.lr_warmup_steps=5"], &["train.lr_scheduler", "train.lr_warmup_steps"], "constant_with_warmup"),
        (&["train.lr_scheduler_power=2"], &["train.lr_scheduler_power", "train.lr_scheduler"], "polynomial"),
        (&["train.lr_scheduler=polynomial", "train.lr_scheduler_power=-1"], &["train.lr_scheduler_power"], "change"),
        (&["train.betas=[0.9, 1.5]"], &["train.betas"], "change"),
        (&["train.unet_lr=0"], &["train.unet_lr", "network.train_unet"], "network.train_unet = false"),
        (&["train.text_encoder_lr=0"], &["train.text_encoder_lr", "network.train_text_encoder"], "false"),
        (&["network.train_unet=false", "network.train_text_encoder=false"], &["network.train_unet", "network.train_text_encoder"], "true"),
        (&["train.initial_loss_scale=1024"], &["train.initial_loss_scale", "train.mixed_precision"], "\"fp16\""),
        (
            &["train.mixed_precision=bf16", "train.initial_loss_scale=1024"],
            &["train.initial_loss_scale", "train.mixed_precision"],
            "\"fp16\"",
        ),
        (&["train.mixed_precision=fp16", "train.initial_loss_scale=0.5"], &["train.initial_loss_scale"], "65536"),
        (&["train.fp8_base=true", "model.weight_dtype=fp16"], &["model.weight_dtype", "train.fp8_base"], "one of them"),
        (&["train.fp8_base=true", "train.fp8_base_unet=true"], &["train.fp8_base", "train.fp8_base_unet"], "UNet alone"),
        (&["train.max_token_length=77"], &["train.max_token_length"], "75, 150 or 225"),
        (&["network.full_matrix=true", "network.use_tucker=true"], &["network.use_tucker", "network.full_matrix"], "full_matrix = false"),
        (&["network.full_matrix=true", "network.decompose_both=true"], &["network.decompose_both", "network.full_matrix"], "false"),
        (&["network.factor=0"], &["network.factor"], "-1"),
        (&["network.dim=0"], &["network.dim", "network.conv_dim"], "1 or more"),
        (&["train.adaptive_noise_scale=0.1"], &["train.adaptive_noise_scale", "train.noise_offset"], "give train.noise_offset"),
        (&["train.multires_noise_discount=0.1"], &["train.multires_noise_discount", "train.multires_noise_iterations"], "give"),
        (&["train.ip_noise_gamma_random_strength=true"], &["train.ip_noise_gamma_random_strength", "train.ip_noise_gamma"], "give"),
        (
            &["train.scale_v_pred_loss_like_noise_pred=true"],
            &["train.scale_v_pred_loss_like_noise_pred", "model.v_parameterization"],
            "remove",
        ),
        (&["train.v_pred_like_loss=1", "model.v_parameterization=true"], &["train.v_pred_like_loss", "model.v_parameterization"], "remove"),
        (&["model.zero_terminal_snr=true"], &["model.zero_terminal_snr", "model.v_parameterization"], "predicts v"),
        (&["train.huber_c=0.2"], &["train.huber_c", "train.loss_type"], "huber"),
        (&["train.min_snr_gamma=0"], &["train.min_snr_gamma"], "remove"),
        (&["train.min_timestep=600", "train.max_timestep=600"], &["train.min_timestep", "train.max_timestep"], "<"),
        (&["dataset.cache_latents=true", "dataset.random_crop=true"], &["dataset.subsets[0].random_crop"], "cache_latents = false"),
        (&["dataset.bucket_reso_steps=60"], &["dataset.bucket_reso_steps"], "64"),
        (&["output.name=a/b"], &["output.name"], "output.dir"),
        (&["sample.sample_every_n_steps=5"], &["sample.sample_every_n_steps", "sample.prompts"], "add sample.prompts"),
        (&["sample.width=1023"], &["sample.width"], "1016"),
        (&["sample.prompts=[{prompt=\"x\", steps=2000}]"], &["sample.prompts[0].steps"], "20 to 40"),
        (&["validation.every_n_steps=5"], &["validation.image_dir", "validation.every_n_steps"], "both"),
        (&["validation.timesteps=[1000]"], &["validation.timesteps"], "800"),
    ];
    for (overrides, keys, way_out) in cases {
        let found = problems(overrides);
        assert_eq!(found.len(), 1, "{overrides:?}: {found:?}");
        assert_eq!(found[0].keys, *keys, "{overrides:?}");
        assert!(found[0].way_out.contains(way_out), "{overrides:?}: {}", found[0].way_out);
        // The message itself names each key by its last part and, so, can be read alone.
        for key in *keys {
            let name = key.rsplit('.').next().unwrap();
            assert!(found[0].what.contains(name), "{overrides:?}: {} is not in {}", name, found[0].what);
        }
    }
    let none = parse(&SMALL.replace("[[dataset.subsets]]\nimage_dir = \"images\"\n", "").replace("max_train_steps = 10", "")).unwrap();
    let error = ConfigError::from(none.check().unwrap_err());
    assert!(error.to_string().contains("there are no subsets") && error.to_string().contains("neither train.max_train_steps"), "{error}");
}

#[test]
fn odd_values_are_told() {
    assert_eq!(parse(SMALL).unwrap().warnings(), []);
    for (overrides, keys) in [
        (&["train.unet_lr=1e-3"][..], &["train.unet_lr", "train.optimizer"][..]),
        (&["network.full_matrix=true", "network.alpha=8"], &["network.alpha", "network.full_matrix"]),
        (&["network.full_matrix=true", "network.rs_lora=true"], &["network.rs_lora", "network.full_matrix"]),
        (&["network.use_tucker=true"], &["network.use_tucker"]),
        (&["train.min_snr_gamma=5", "train.debiased_estimation_loss=true"], &["train.min_snr_gamma", "train.debiased_estimation_loss"]),
        (&["sample.prompts=[\"x\"]"], &["sample.prompts", "sample.sample_every_n_steps"]),
        (&["train.max_train_steps=5000"], &["output.save_every_n_steps"]),
    ] {
        let found = with(overrides).unwrap().warnings();
        assert!(found.len() == 1 && found[0].keys == keys, "{overrides:?}: {found:?}");
    }
    assert_eq!(with(&["train.unet_lr=1e-3", "train.optimizer=AdamW"]).unwrap().warnings(), []);
}

#[test]
fn missing_paths_name_key_and_path() {
    let found = parse(SMALL).unwrap().check_paths().unwrap_err();
    let texts: Vec<String> = found.iter().map(|p| p.what.clone()).collect();
    assert_eq!(texts, ["model.base = \"base.safetensors\" does not exist", "dataset.subsets[0].image_dir = \"images\" does not exist"]);
    assert!(found[0].way_out.contains("current folder"), "{}", found[0].way_out);

    let dir = tempfile::tempdir().unwrap();
    let (base, images, preset) = (dir.path().join("base.safetensors"), dir.path().join("images"), dir.path().join("p.toml"));
    std::fs::write(&base, "x").unwrap();
    std::fs::create_dir(&images).unwrap();
    std::fs::write(&preset, "unet_target_mdule = []\n").unwrap();
    let set = |key: &str, path: &Path| format!("{key}={}", path.display());
    let mut overrides = vec![set("model.base", &base), set("dataset.subsets[0].image_dir", &images)];
    let check = |overrides: &[String]| RunConfig::parse(SMALL, Path::new("r"), overrides).unwrap().check_paths();
    check(&overrides).unwrap();
    overrides.push("network.preset=unet-only".into());
    let found = check(&overrides).unwrap_err();
    assert_eq!(found[0].keys, ["network.preset", "network.train_text_encoder"]);
    overrides.push("network.train_text_encoder=false".into());
    check(&overrides).unwrap();
    for (preset, what) in [("ful".to_owned(), "no preset named `ful`"), (preset.display().to_string(), "unknown key `unet_target_mdule`")] {
        let found = check(&[&overrides[..], &[format!("network.preset={preset}")]].concat()).unwrap_err();
        assert!(found[0].what.contains(what), "{}", found[0].what);
    }
    overrides.push(set("dataset.subsets[0].image_dir", &base));
    assert!(check(&overrides).unwrap_err()[0].what.ends_with("is not a folder"));
}

#[test]
fn an_unreadable_recipe_names_its_path() {
    let error = RunConfig::load(Path::new("no/such/recipe.toml"), &[]).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("no/such/recipe.toml"), "{cause}");
}

#[test]
fn the_template_is_a_recipe_once_it_is_filled_in() {
    let text = template();
    let config = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let mut default = parse(&SMALL.replace("base.safetensors", "").replace("\"out\"", "\"\"").replace("\"images\"", "\"\"")).unwrap();
    default.train.max_train_steps = None;
    assert_eq!(config, default);
}

#[test]
fn every_key_is_documented() {
    for section in catalog() {
        assert!(section.doc.len() > 10);
        for key in section.keys {
            assert!(key.doc.len() >= 5 && key.doc.ends_with('.'), "{}.{}: {}", section.name, key.name, key.doc);
        }
    }
}

/// `LOKR_UPDATE_DOCS=1` writes the page anew.
#[test]
fn the_reference_page_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/recipe-reference.md");
    if std::env::var_os("LOKR_UPDATE_DOCS").is_some() {
        storage::write_whole(&path, reference().as_bytes()).unwrap();
    }
    let page = storage::read_to_string(&path).unwrap();
    assert!(page == reference(), "docs/recipe-reference.md is stale: run the tests with LOKR_UPDATE_DOCS=1");
}
