//! The maps against key lists of the full-size SDXL, written down here module by module for both namings.

use std::collections::BTreeSet;

use super::*;

/// Channel changes and depths of SDXL, both namings at once.
struct Keys(Vec<(String, String)>);

impl Keys {
    fn pair(&mut self, a: &str, b: &str) {
        for leaf in ["weight", "bias"] {
            self.0.push((format!("{a}.{leaf}"), format!("{b}.{leaf}")));
        }
    }
    fn resnet(&mut self, a: &str, b: &str, shortcut: bool) {
        for (x, y) in [
            ("in_layers.0", "norm1"),
            ("in_layers.2", "conv1"),
            ("emb_layers.1", "time_emb_proj"),
            ("out_layers.0", "norm2"),
            ("out_layers.3", "conv2"),
        ] {
            self.pair(&format!("{a}.{x}"), &format!("{b}.{y}"));
        }
        if shortcut {
            self.pair(&format!("{a}.skip_connection"), &format!("{b}.conv_shortcut"));
        }
    }
    fn transformer(&mut self, a: &str, b: &str, depth: usize) {
        let mut leaves = Vec::new();
        for outer in ["norm", "proj_in", "proj_out"] {
            leaves.extend([format!("{outer}.weight"), format!("{outer}.bias")]);
        }
        for n in 0..depth {
            let block = format!("transformer_blocks.{n}");
            for attention in ["attn1", "attn2"] {
                leaves.extend(
                    ["to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"]
                        .map(|leaf| format!("{block}.{attention}.{leaf}")),
                );
            }
            for module in ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"] {
                leaves.extend(["weight", "bias"].map(|leaf| format!("{block}.{module}.{leaf}")));
            }
        }
        self.0.extend(leaves.into_iter().map(|leaf| (format!("{a}.{leaf}"), format!("{b}.{leaf}"))));
    }
}

fn unet_keys() -> Vec<(String, String)> {
    let mut keys = Keys(Vec::new());
    keys.pair("time_embed.0", "time_embedding.linear_1");
    keys.pair("time_embed.2", "time_embedding.linear_2");
    keys.pair("label_emb.0.0", "add_embedding.linear_1");
    keys.pair("label_emb.0.2", "add_embedding.linear_2");
    keys.pair("input_blocks.0.0", "conv_in");
    // (block, level, index, shortcut, depth) of the way down.
    for (n, i, j, shortcut, depth) in
        [(1, 0, 0, false, 0), (2, 0, 1, false, 0), (4, 1, 0, true, 2), (5, 1, 1, false, 2), (7, 2, 0, true, 10), (8, 2, 1, false, 10)]
    {
        keys.resnet(&format!("input_blocks.{n}.0"), &format!("down_blocks.{i}.resnets.{j}"), shortcut);
        if depth > 0 {
            keys.transformer(&format!("input_blocks.{n}.1"), &format!("down_blocks.{i}.attentions.{j}"), depth);
        }
    }
    keys.pair("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv");
    keys.pair("input_blocks.6.0.op", "down_blocks.1.downsamplers.0.conv");
    keys.resnet("middle_block.0", "mid_block.resnets.0", false);
    keys.transformer("middle_block.1", "mid_block.attentions.0", 10);
    keys.resnet("middle_block.2", "mid_block.resnets.1", false);
    for n in 0..9 {
        let (i, j) = (n / 3, n % 3);
        keys.resnet(&format!("output_blocks.{n}.0"), &format!("up_blocks.{i}.resnets.{j}"), true);
        let depth = [10, 2, 0][i];
        if depth > 0 {
            keys.transformer(&format!("output_blocks.{n}.1"), &format!("up_blocks.{i}.attentions.{j}"), depth);
        }
    }
    keys.pair("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv");
    keys.pair("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv");
    keys.pair("out.0", "conv_norm_out");
    keys.pair("out.2", "conv_out");
    keys.0
}

fn vae_keys() -> Vec<(String, String)> {
    let mut keys = Keys(Vec::new());
    fn resnet(keys: &mut Keys, a: &str, b: &str, shortcut: bool) {
        for leaf in ["norm1", "conv1", "norm2", "conv2"] {
            keys.pair(&format!("{a}.{leaf}"), &format!("{b}.{leaf}"));
        }
        if shortcut {
            keys.pair(&format!("{a}.nin_shortcut"), &format!("{b}.conv_shortcut"));
        }
    }
    for (level, shortcut) in [(0, false), (1, true), (2, true), (3, false)] {
        for j in 0..2 {
            resnet(
                &mut keys,
                &format!("encoder.down.{level}.block.{j}"),
                &format!("encoder.down_blocks.{level}.resnets.{j}"),
                shortcut && j == 0,
            );
        }
        if level < 3 {
            keys.pair(&format!("encoder.down.{level}.downsample.conv"), &format!("encoder.down_blocks.{level}.downsamplers.0.conv"));
        }
    }
    for (ours, theirs, shortcut) in [(3, 0, false), (2, 1, false), (1, 2, true), (0, 3, true)] {
        for j in 0..3 {
            resnet(
                &mut keys,
                &format!("decoder.up.{ours}.block.{j}"),
                &format!("decoder.up_blocks.{theirs}.resnets.{j}"),
                shortcut && j == 0,
            );
        }
        if ours > 0 {
            keys.pair(&format!("decoder.up.{ours}.upsample.conv"), &format!("decoder.up_blocks.{theirs}.upsamplers.0.conv"));
        }
    }
    for side in ["encoder", "decoder"] {
        keys.pair(&format!("{side}.conv_in"), &format!("{side}.conv_in"));
        keys.pair(&format!("{side}.conv_out"), &format!("{side}.conv_out"));
        keys.pair(&format!("{side}.norm_out"), &format!("{side}.conv_norm_out"));
        resnet(&mut keys, &format!("{side}.mid.block_1"), &format!("{side}.mid_block.resnets.0"), false);
        resnet(&mut keys, &format!("{side}.mid.block_2"), &format!("{side}.mid_block.resnets.1"), false);
        for (a, b) in [("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")] {
            keys.pair(&format!("{side}.mid.attn_1.{a}"), &format!("{side}.mid_block.attentions.0.{b}"));
        }
    }
    keys.pair("quant_conv", "quant_conv");
    keys.pair("post_quant_conv", "post_quant_conv");
    keys.0
}

#[test]
fn the_unet_map_is_a_bijection_on_the_full_size_sdxl() {
    let keys = unet_keys();
    // design facts 2.1: 1680 tensors.
    assert_eq!(keys.iter().map(|(a, _)| a).collect::<BTreeSet<_>>().len(), 1680);
    assert_eq!(keys.iter().map(|(_, b)| b).collect::<BTreeSet<_>>().len(), 1680);
    for (sgm, diffusers) in keys {
        assert_eq!(unet_to_diffusers(&sgm).as_deref(), Some(diffusers.as_str()), "{sgm}");
        assert_eq!(unet_from_diffusers(&diffusers).as_deref(), Some(sgm.as_str()), "{diffusers}");
    }
}

#[test]
fn the_vae_map_is_a_bijection_on_the_full_size_sdxl() {
    let keys = vae_keys();
    // The released VAE (sdxl_vae.safetensors) has 248 tensors.
    assert_eq!(keys.iter().map(|(a, _)| a).collect::<BTreeSet<_>>().len(), 248);
    for (ldm, diffusers) in keys {
        assert_eq!(vae_to_diffusers(&ldm).as_deref(), Some(diffusers.as_str()), "{ldm}");
        assert_eq!(vae_from_diffusers(&diffusers).as_deref(), Some(ldm.as_str()), "{diffusers}");
    }
}

#[test]
fn the_te2_map_is_a_bijection_on_the_full_size_sdxl() {
    let mut open_clip = vec!["token_embedding.weight", "positional_embedding", "text_projection", "ln_final.weight", "ln_final.bias"]
        .into_iter()
        .map(String::from)
        .collect::<Vec<_>>();
    for n in 0..32 {
        for leaf in ["ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"] {
            open_clip.extend(["weight", "bias"].map(|kind| format!("transformer.resblocks.{n}.{leaf}.{kind}")));
        }
        open_clip.extend(["weight", "bias"].map(|kind| format!("transformer.resblocks.{n}.attn.in_proj_{kind}")));
    }
    let mut canonical = BTreeSet::new();
    for name in &open_clip {
        let back = |c: &String, k| assert_eq!(te2_to_open_clip(c), Some((name.clone(), k)), "{c}");
        match te2_from_open_clip(name).expect(name) {
            OpenClip::Same(c) | OpenClip::Transposed(c) => {
                back(&c, None);
                canonical.insert(c);
            }
            OpenClip::Joined(thirds) => {
                for (k, c) in thirds.into_iter().enumerate() {
                    back(&c, Some(k));
                    canonical.insert(c);
                }
            }
        }
    }
    // 32 layers of 16 tensors, two embeddings, the final norm, the projection.
    assert_eq!(canonical.len(), 32 * 16 + 5);
    assert!(canonical.contains("text_model.encoder.layers.31.self_attn.k_proj.bias"));
}

#[test]
fn names_that_no_table_knows_have_no_translation() {
    for name in [
        "input_blocks.1.1.norm.weight",
        "input_blocks.3.0.in_layers.0.weight",
        "input_blocks.10.0.in_layers.0.weight",
        "v_pred",
        "out.1.weight",
    ] {
        assert_eq!(unet_to_diffusers(name), None, "{name}");
    }
    for name in ["down_blocks.0.attentions.0.norm.weight", "down_blocks.1.resnets.0.conv9.weight", "down_blocks.10.resnets.0.conv1.weight"]
    {
        assert_eq!(unet_from_diffusers(name), None, "{name}");
    }
    assert_eq!(te2_from_open_clip("transformer.resblocks.x.ln_1.weight"), None);
    assert_eq!(te2_from_open_clip("logit_scale"), None);
    assert_eq!(te2_to_open_clip("text_model.encoder.layers.0.self_attn.q_proj.lora"), None);
}

#[test]
fn attention_names_of_older_diffusers_are_read() {
    let old = "decoder.mid_block.attentions.0.proj_attn.weight";
    assert_eq!(vae_from_diffusers(old).as_deref(), Some("decoder.mid.attn_1.proj_out.weight"));
    assert_eq!(vae_from_diffusers("encoder.mid_block.attentions.0.query.bias").as_deref(), Some("encoder.mid.attn_1.q.bias"));
}
