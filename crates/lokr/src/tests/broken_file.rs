//! Every way in which a file can be broken, and what the message says.

use super::file::{F32, Small, folder, rewrite};
use crate::{Error, Factor, LokrNetwork, Module, inspect};
use std::path::{Path, PathBuf};

/// Left out: the tensors that `drop` names.
fn without(path: &Path, drop: &str) -> PathBuf {
    rewrite(path, |name, dtype, shape, bytes| (!name.ends_with(drop)).then(|| (name.into(), dtype, shape, bytes)))
}

#[test]
fn half_of_a_pair_is_missed_by_name() {
    let (small, folder) = (Small::new(), folder());
    let (_, path) = small.saved(folder.path(), F32, |c| (c.decompose_both, c.dim) = (true, 1));
    for (drop, present) in [
        ("lin.lokr_w2_b", "lokr_w2_a"),
        ("lin.lokr_w2_a", "lokr_w2_b"),
        ("lin.lokr_w1_b", "lokr_w1_a"),
        ("lin.lokr_w1_a", "lokr_w1_b"),
        ("norm.b_norm", "w_norm"),
        ("norm.w_norm", "b_norm"),
    ] {
        let error = LokrNetwork::from_file(&without(&path, drop), small.trees()).err().expect("half a pair");
        let missing = drop.rsplit('.').next().expect("a key");
        let want = format!("has `{present}` and no `{missing}`");
        assert!(error.to_string().ends_with(&want) && error.to_string().contains("edited.safetensors"), "{error}");
    }
    let full = small.saved(folder.path(), F32, |c| c.full_matrix = true).1;
    let error = LokrNetwork::from_file(&without(&full, "conv.lokr_w2"), small.trees()).err().expect("half a pair");
    assert!(error.to_string().ends_with("module `lora_unet_block_conv` has `lokr_w1` and no `lokr_w2`"), "{error}");
}

#[test]
fn a_wrong_shape_is_named_with_what_was_expected() {
    let (small, folder) = (Small::new(), folder());
    let (_, path) = small.saved(folder.path(), F32, |c| c.full_matrix = true);
    let cut = |name: &str, to: Vec<usize>| {
        rewrite(&path, |key, dtype, shape, bytes| {
            let (shape, bytes) =
                if key.ends_with(name) { (to.clone(), bytes[..4 * to.iter().product::<usize>()].to_vec()) } else { (shape, bytes) };
            Some((key.into(), dtype, shape, bytes))
        })
    };
    let fails = |path: &Path| LokrNetwork::from_file(path, small.trees()).err().expect("a wrong shape").to_string();
    let error = fails(&cut("lin.lokr_w2", vec![8, 24]));
    assert!(
        error.ends_with(
            "`lora_unet_block_lin.lokr_w2` has shape [8, 24]: with w1 (4, 4) it makes a layer of 32 by 96, which is 64 by 96 here"
        ),
        "{error}"
    );
    let error = fails(&cut("lin.lokr_w1", vec![16]));
    assert!(error.ends_with("`lora_unet_block_lin.lokr_w1` has shape [16]: a matrix was expected"), "{error}");
    let error = fails(&cut("conv.lokr_w2", vec![16, 16, 1, 3]));
    assert!(error.ends_with("has shape [16, 16, 1, 3]: the layer's kernel is (3, 3)"), "{error}");
    let error = fails(&cut("norm.w_norm", vec![32]));
    assert!(error.ends_with("`lora_unet_block_norm.w_norm` has shape [32]: the norm has 64 channels"), "{error}");
    let error = fails(&cut("conv.lokr_w1", vec![0, 4]));
    assert!(error.contains("`lora_unet_block_conv.lokr_w1` has shape [0, 4]"), "{error}");
    let low = small.saved(folder.path(), F32, |_| {}).1;
    let error = fails(&rewrite(&low, |key, dtype, shape, bytes| {
        let (shape, bytes) = if key.ends_with("lin.lokr_w2_b") { (vec![1, 24], bytes[..96].to_vec()) } else { (shape, bytes) };
        Some((key.into(), dtype, shape, bytes))
    }));
    assert!(error.ends_with("`lora_unet_block_lin.lokr_w2_b` has shape [1, 24]: its partner has rank 2"), "{error}");
}

#[test]
fn a_truncated_or_foreign_file_is_named() {
    let (small, folder) = (Small::new(), folder());
    let (_, path) = small.saved(folder.path(), F32, |_| {});
    let bytes = storage::read(&path).expect("reads");
    for cut in [0, 4, 40, bytes.len() - 1] {
        storage::write_whole(&path, &bytes[..cut]).expect("writes");
        let error = LokrNetwork::from_file(&path, small.trees()).err().expect("truncated");
        assert!(matches!(error, Error::Storage(_)) && error.to_string().contains("a.safetensors"), "{cut}: {error}");
        assert!(inspect(&path).is_err());
    }
    storage::write_whole(&path, &bytes).expect("writes");
    let lora = rewrite(&path, |key, dtype, shape, bytes| {
        Some((key.replace("lokr_w", "lora_down.weight").replace("_norm", "_x"), dtype, shape, bytes))
    });
    let error = LokrNetwork::from_file(&lora, small.trees()).err().expect("a LoRA");
    assert!(matches!(error, Error::NotLokr { .. }) && error.hint().as_deref() == Some("this looks like a LoRA"), "{error}");
    let foreign = rewrite(&path, |key, dtype, shape, bytes| Some((key.replace("block", "double_block"), dtype, shape, bytes)));
    let error = LokrNetwork::from_file(&foreign, small.trees()).err().expect("another model");
    assert!(
        error.to_string().ends_with("none of its 4 modules has a layer in this model (the first is `lora_unet_double_block_conv`)"),
        "{error}"
    );
}

#[test]
fn keys_without_a_layer_are_listed_and_the_rest_is_read() {
    let (small, folder) = (Small::new(), folder());
    let (_, path) = small.saved(folder.path(), F32, |c| c.full_matrix = true);
    let strange = rewrite(&path, |key, dtype, shape, bytes| {
        Some((key.replace("unet_block_one", "unet_elsewhere").replace("lin.alpha", "lin.gamma"), dtype, shape, bytes))
    });
    let network = LokrNetwork::from_file(&strange, small.trees()).expect("reads");
    assert_eq!(network.entries().len(), 3);
    assert_eq!(
        network.unmatched(),
        ["lora_unet_block_lin.gamma", "lora_unet_elsewhere.alpha", "lora_unet_elsewhere.lokr_w1", "lora_unet_elsewhere.lokr_w2"]
    );
}

#[test]
fn dora_is_refused_and_an_infinite_alpha_only_where_it_matters() {
    let (small, folder) = (Small::new(), folder());
    let infinite = |path: &Path| {
        rewrite(path, |key, dtype, shape, bytes| {
            let bytes = if key.ends_with("alpha") { f32::INFINITY.to_le_bytes().to_vec() } else { bytes };
            Some((key.into(), dtype, shape, bytes))
        })
    };
    let full = small.saved(folder.path(), F32, |c| c.full_matrix = true).1;
    let read = infinite(&full);
    LokrNetwork::from_file(&read, small.trees()).expect("alpha means nothing with two full factors");
    assert_eq!(inspect(&read).expect("reads").suspicious.len(), 3);
    let low = small.saved(folder.path(), F32, |_| {}).1;
    let error = LokrNetwork::from_file(&infinite(&low), small.trees()).err().expect("no scale follows");
    assert!(error.to_string().ends_with("`lora_unet_block_lin.alpha` is inf, so the strength of this module is unknown"), "{error}");
    let dora = rewrite(&low, |key, dtype, shape, bytes| Some((key.replace("lin.alpha", "lin.dora_scale"), dtype, shape, bytes)));
    let error = LokrNetwork::from_file(&dora, small.trees()).err().expect("DoRA");
    assert!(error.to_string().ends_with("module `lora_unet_block_lin` has `dora_scale`: DoRA is not supported yet"), "{error}");
    let no_alpha = without(&low, "lin.alpha");
    let network = LokrNetwork::from_file(&no_alpha, small.trees()).expect("reads");
    assert!(matches!(&network.entries()[0].module, Module::Lokr(m) if m.shape().scale == 1.0), "no alpha: scale 1");
}

#[test]
fn a_look_into_a_broken_file_says_what_is_suspicious() {
    let (small, folder) = (Small::new(), folder());
    let (_, path) = small.saved(folder.path(), F32, |_| {});
    let broken = rewrite(&path, |key, dtype, shape, mut bytes| {
        if key.ends_with("lin.lokr_w2_b") {
            return None;
        }
        if key.ends_with(&format!("conv.{}", Factor::W1.key())) {
            bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        }
        Some((key.replace("one.alpha", "one.gamma"), dtype, shape, bytes))
    });
    assert_eq!(
        inspect(&broken).expect("reads").suspicious,
        [
            "lora_unet_block_conv.lokr_w1: 1 of 16 values are infinite or not numbers",
            "lora_unet_block_lin: lokr_w2_a without lokr_w2_b",
            "lora_unet_block_one.gamma: no tensor of a LoKr",
        ]
    );
}
