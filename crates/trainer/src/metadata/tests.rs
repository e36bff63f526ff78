//! Metadata against what Python prints and sd-scripts writes.

use super::*;

/// Values as Python 3 prints them: `print(repr(x))`.
#[test]
fn numbers_are_written_as_python_writes_them() {
    for (x, text) in [
        (2e-5, "2e-05"),
        (0.0357, "0.0357"),
        (0.0001, "0.0001"),
        (0.00001234, "1.234e-05"),
        (1.0, "1.0"),
        (-0.0, "-0.0"),
        (100000.0, "100000.0"),
        (1e15, "1000000000000000.0"),
        (1e16, "1e+16"),
        (1.5e300, "1.5e+300"),
        (1e-300, "1e-300"),
        (0.1 + 0.2, "0.30000000000000004"),
        (1716082225.123, "1716082225.123"),
        (f64::INFINITY, "inf"),
        (f64::NAN, "nan"),
    ] {
        assert_eq!(x.py(), text);
    }
    assert_eq!(
        (true.py(), false.py(), None::<f64>.py(), Some(5.0).py(), (-1i64).py()),
        ("True".into(), "False".into(), "None".into(), "5.0".into(), "-1".into())
    );
}

#[test]
fn json_is_written_as_python_writes_it() {
    let value = json!({ "a": [1, 2.0, 1e-5, null, true], "é\n\"\\": "☃😀\u{7f}\u{1}" });
    // json.dumps({"a": [1, 2.0, 1e-05, None, True], "é\n\"\\": "☃😀\x7f\x01"})
    assert_eq!(dumps(&value), r#"{"a": [1, 2.0, 1e-05, null, true], "\u00e9\n\"\\": "\u2603\ud83d\ude00\u007f\u0001"}"#);
}

fn config(overrides: &[&str]) -> RunConfig {
    let text = "[model]\nbase = \"models/base.safetensors\"\n[output]\ndir = \"out\"\nname = \"test\"\n[train]\nmax_train_steps = 10\n\
                [[dataset.subsets]]\nimage_dir = \"data/a\"\nnum_repeats = 2\n[[dataset.subsets]]\nimage_dir = \"more/a\"\n";
    let overrides: Vec<String> = overrides.iter().map(|o| (*o).to_owned()).collect();
    RunConfig::parse(text, Path::new("recipe.toml"), &overrides).unwrap()
}

fn facts() -> RunFacts {
    RunFacts {
        session_id: 42,
        started_at: 1716082225.5,
        steps: 7,
        subsets: vec![
            SubsetFacts { img_count: 3, tag_frequency: [("1girl".to_owned(), 3)].into() },
            SubsetFacts { img_count: 1, ..Default::default() },
        ],
        buckets: vec![(1024, 1024, 4), (832, 1216, 3)],
        mean_img_ar_error: 0.025,
        model: Some(ModelHashes { short: "31e35c80".into(), whole: "31e35c80fc".into() }),
        ..Default::default()
    }
}

#[test]
fn values_are_those_that_sd_scripts_writes() {
    let overrides = [
        "train.unet_lr=2e-5",
        "train.text_encoder_lr=5e-6",
        "train.betas=[0.9, 0.95]",
        "train.weight_decay=0.1",
        "train.noise_offset=0.0357",
        "train.min_snr_gamma=5",
        "network.full_matrix=true",
        "network.factor=8",
        "train.max_token_length=225",
        "dataset.caption_tag_dropout_rate=0.15",
    ];
    let map = metadata(&config(&overrides), &facts());
    for (key, value) in [
        ("ss_unet_lr", "2e-05"),
        ("ss_text_encoder_lr", "5e-06"),
        ("ss_optimizer", "lokr.Lion8bit(weight_decay=0.1,betas=(0.9, 0.95))"),
        ("ss_noise_offset", "0.0357"),
        ("ss_min_snr_gamma", "5.0"),
        ("ss_adaptive_noise_scale", "None"),
        ("ss_multires_noise_discount", "0.3"),
        ("ss_huber_schedule", "snr"),
        ("ss_huber_c", "0.1"),
        ("ss_lowram", "False"),
        ("ss_gradient_checkpointing", "False"),
        ("ss_network_dim", "4"),
        ("ss_network_alpha", "1.0"),
        ("ss_network_module", "lycoris.kohya"),
        (
            "ss_network_args",
            r#"{"algo": "lokr", "conv_alpha": "1.0", "conv_dim": "4", "dropout": null, "factor": "8", "full_matrix": "True", "preset": "full"}"#,
        ),
        ("ss_base_model_version", "sdxl_base_v1-0"),
        ("ss_max_token_length", "225"),
        ("ss_sd_model_name", "base.safetensors"),
        ("ss_sd_model_hash", "31e35c80"),
        ("ss_training_started_at", "1716082225.5"),
        ("ss_steps", "7"),
        ("ss_lr_warmup_steps", "0"),
        ("ss_training_comment", "None"),
        ("ss_caption_tag_dropout_rate", "0.15"),
        ("ss_caption_dropout_every_n_epochs", "0"),
        ("ss_dataset_dirs", r#"{"a": {"img_count": 3, "n_repeats": 2}, "a (2)": {"img_count": 1, "n_repeats": 1}}"#),
        ("ss_tag_frequency", r#"{"a": {"1girl": 3}, "a (2)": {}}"#),
        ("modelspec.title", "test"),
        ("modelspec.resolution", "1024x1024"),
        ("modelspec.prediction_type", "epsilon"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"),
    ] {
        assert_eq!(map.get(key).map(String::as_str), Some(value), "{key}");
    }
    assert!(!map.contains_key("modelspec.timestep_range") && !map.contains_key("ss_vae_name"));
    let datasets: Value = serde_json::from_str(&map["ss_datasets"]).unwrap();
    assert_eq!(datasets[0]["bucket_info"]["buckets"]["1"], json!({ "resolution": [832, 1216], "count": 3 }));
    assert_eq!(datasets[0]["subsets"][1]["caption_prefix"], Value::Null);
    assert!(map["ss_datasets"].contains("\"mean_img_ar_error\": 0.025"));
}

#[test]
fn parts_and_subsets_that_differ_show_it() {
    let map = metadata(
        &config(&["train.text_encoder_lr=[1e-5, 0.0]", "dataset.subsets[1].caption_dropout_rate=0.1", "train.max_timestep=900"]),
        &facts(),
    );
    assert_eq!(map["ss_text_encoder_lr"], "[1e-05, 0.0]");
    assert_eq!(map["ss_caption_dropout_rate"], "None");
    assert_eq!(map["modelspec.timestep_range"], "0,900");
    let map = metadata(&config(&["network.train_text_encoder=false", "model.vae=x/vae.safetensors"]), &facts());
    assert_eq!((map["ss_text_encoder_lr"].as_str(), map["ss_vae_name"].as_str()), ("None", "vae.safetensors"));
}

#[test]
fn no_metadata_keeps_what_readers_need() {
    let map = metadata(&config(&["output.no_metadata=true", "output.metadata_author=me"]), &facts());
    let ss: Vec<&str> = map.keys().map(String::as_str).filter(|k| k.starts_with("ss_")).collect();
    assert_eq!(ss, ["ss_base_model_version", "ss_network_alpha", "ss_network_args", "ss_network_dim", "ss_network_module", "ss_v2"]);
    assert_eq!(map["modelspec.author"], "me");
}

/// Every key that sd-scripts writes with a dataset config is written, but for the one named in the module's head.
#[test]
fn the_keys_are_complete() {
    let map = metadata(&config(&["model.vae=v.safetensors"]), &RunFacts { vae: Some(ModelHashes::default()), ..facts() });
    let wanted = "session_id training_started_at training_finished_at output_name training_comment seed steps epoch lowram \
        num_train_images num_validation_images num_reg_images num_batches_per_epoch num_epochs max_train_steps \
        gradient_accumulation_steps gradient_checkpointing learning_rate text_encoder_lr unet_lr lr_warmup_steps lr_scheduler optimizer \
        max_grad_norm network_module network_dim network_alpha network_dropout network_args scale_weight_norms mixed_precision full_fp16 \
        fp8_base fp8_base_unet v2 base_model_version clip_skip max_token_length sd_model_name sd_model_hash new_sd_model_hash vae_name \
        vae_hash new_vae_hash noise_offset noise_offset_random_strength multires_noise_iterations multires_noise_discount \
        adaptive_noise_scale ip_noise_gamma ip_noise_gamma_random_strength zero_terminal_snr min_snr_gamma debiased_estimation loss_type \
        huber_schedule huber_scale huber_c prior_loss_weight caption_dropout_rate caption_dropout_every_n_epochs \
        caption_tag_dropout_rate cache_latents face_crop_aug_range resize_interpolation validation_seed validation_split \
        max_validation_steps validate_every_n_epochs validate_every_n_steps datasets tag_frequency dataset_dirs";
    let missing: Vec<&str> = wanted.split_whitespace().filter(|k| !map.contains_key(&format!("ss_{k}"))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
