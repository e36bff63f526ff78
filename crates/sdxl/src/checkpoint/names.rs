//! Tensor names: canonical ones against those of the single-file layout and of diffusers. Each map is one table of modules
//! that is read in both directions (design facts 2.2 to 2.4; sd-scripts, library/sdxl_model_util.py and model_util.py).
//!
//! Canonical are: the SGM names for the UNet, those of transformers for the text encoders, the LDM names for the VAE, all
//! without the single file's prefixes. A name that no table knows has no translation; callers keep it as it is.

use std::sync::LazyLock;

/// A module under both names, and the names of what is in it.
struct Module {
    canonical: String,
    other: String,
    /// Empty: what is in the module has the same names on both sides.
    inner: &'static [(&'static str, &'static str)],
}

const UNET_RESNET: &[(&str, &str)] = &[
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
];
const VAE_RESNET: &[(&str, &str)] =
    &[("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"), ("nin_shortcut", "conv_shortcut")];
const VAE_ATTENTION: &[(&str, &str)] = &[("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")];
/// What diffusers called the same before 0.15; read, never written.
const VAE_OLD_ATTENTION: &[(&str, &str)] = &[("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "proj_attn")];
const TEXT_LAYER: &[(&str, &str)] = &[
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
];
const TEXT_OUTER: &[(&str, &str)] = &[
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.weight", "ln_final.weight"),
    ("text_model.final_layer_norm.bias", "ln_final.bias"),
];
/// Canonical name of te2's projection, a Linear weight.
pub(super) const TEXT_PROJECTION: &str = "text_projection.weight";
/// OpenCLIP's name of it, a bare matrix: the transposed Linear weight.
pub(super) const OPEN_CLIP_PROJECTION: &str = "text_projection";
const THIRDS: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

static UNET: LazyLock<Vec<Module>> = LazyLock::new(|| {
    let mut table = Vec::new();
    let mut add = |canonical: String, other: String, inner| table.push(Module { canonical, other, inner });
    for (canonical, other) in [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb.0.0", "add_embedding.linear_1"),
        ("label_emb.0.2", "add_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ] {
        add(canonical.into(), other.into(), &[]);
    }
    for i in 0..3 {
        for j in 0..2 {
            let n = 3 * i + j + 1;
            add(format!("input_blocks.{n}.0"), format!("down_blocks.{i}.resnets.{j}"), UNET_RESNET);
            if i > 0 {
                add(format!("input_blocks.{n}.1"), format!("down_blocks.{i}.attentions.{j}"), &[]);
            }
        }
        for j in 0..3 {
            let n = 3 * i + j;
            add(format!("output_blocks.{n}.0"), format!("up_blocks.{i}.resnets.{j}"), UNET_RESNET);
            if i < 2 {
                add(format!("output_blocks.{n}.1"), format!("up_blocks.{i}.attentions.{j}"), &[]);
            }
        }
    }
    for i in 0..2 {
        add(format!("input_blocks.{}.0.op", 3 * (i + 1)), format!("down_blocks.{i}.downsamplers.0.conv"), &[]);
        add(format!("output_blocks.{}.2", 3 * i + 2), format!("up_blocks.{i}.upsamplers.0"), &[]);
    }
    add("middle_block.0".into(), "mid_block.resnets.0".into(), UNET_RESNET);
    add("middle_block.1".into(), "mid_block.attentions.0".into(), &[]);
    add("middle_block.2".into(), "mid_block.resnets.1".into(), UNET_RESNET);
    table
});

static VAE: LazyLock<Vec<Module>> = LazyLock::new(|| {
    let mut table = Vec::new();
    let mut add = |canonical: String, other: String, inner| table.push(Module { canonical, other, inner });
    for side in ["encoder", "decoder"] {
        for (canonical, other) in [("conv_in", "conv_in"), ("conv_out", "conv_out"), ("norm_out", "conv_norm_out")] {
            add(format!("{side}.{canonical}"), format!("{side}.{other}"), &[]);
        }
        add(format!("{side}.mid.block_1"), format!("{side}.mid_block.resnets.0"), VAE_RESNET);
        add(format!("{side}.mid.block_2"), format!("{side}.mid_block.resnets.1"), VAE_RESNET);
        add(format!("{side}.mid.attn_1"), format!("{side}.mid_block.attentions.0"), VAE_ATTENTION);
    }
    for i in 0..4 {
        for j in 0..2 {
            add(format!("encoder.down.{i}.block.{j}"), format!("encoder.down_blocks.{i}.resnets.{j}"), VAE_RESNET);
        }
        // The LDM decoder counts its levels from the picture, diffusers from the latent.
        for j in 0..3 {
            add(format!("decoder.up.{}.block.{j}", 3 - i), format!("decoder.up_blocks.{i}.resnets.{j}"), VAE_RESNET);
        }
    }
    for i in 0..3 {
        add(format!("encoder.down.{i}.downsample.conv"), format!("encoder.down_blocks.{i}.downsamplers.0.conv"), &[]);
        add(format!("decoder.up.{}.upsample.conv", 3 - i), format!("decoder.up_blocks.{i}.upsamplers.0.conv"), &[]);
    }
    add("quant_conv".into(), "quant_conv".into(), &[]);
    add("post_quant_conv".into(), "post_quant_conv".into(), &[]);
    table
});

/// diffusers name of a canonical UNet tensor.
pub(super) fn unet_to_diffusers(name: &str) -> Option<String> {
    UNET.iter().find_map(|m| translate(name, &m.canonical, &m.other, m.inner.iter().copied()))
}

/// Canonical name of a diffusers UNet tensor.
pub(super) fn unet_from_diffusers(name: &str) -> Option<String> {
    UNET.iter().find_map(|m| translate(name, &m.other, &m.canonical, m.inner.iter().map(swap)))
}

/// diffusers name of a canonical VAE tensor.
pub(super) fn vae_to_diffusers(name: &str) -> Option<String> {
    VAE.iter().find_map(|m| translate(name, &m.canonical, &m.other, m.inner.iter().copied()))
}

/// Canonical name of a diffusers VAE tensor, also of older releases.
pub(super) fn vae_from_diffusers(name: &str) -> Option<String> {
    VAE.iter().find_map(|m| {
        let old = if m.inner == VAE_ATTENTION { VAE_OLD_ATTENTION } else { &[] };
        translate(name, &m.other, &m.canonical, m.inner.iter().chain(old).map(swap))
    })
}

fn swap(&(a, b): &(&'static str, &'static str)) -> (&'static str, &'static str) {
    (b, a)
}

/// Moves `name` from the module `from` to the module `to`, by the names of what is in it.
fn translate(name: &str, from: &str, to: &str, inner: impl Iterator<Item = (&'static str, &'static str)>) -> Option<String> {
    let rest = name.strip_prefix(from)?.strip_prefix('.')?;
    let mut same_inside = true;
    for (a, b) in inner {
        same_inside = false;
        if let Some(leaf) = rest.strip_prefix(a).and_then(|leaf| leaf.strip_prefix('.')) {
            return Some(format!("{to}.{b}.{leaf}"));
        }
    }
    same_inside.then(|| format!("{to}.{rest}"))
}

/// What an OpenCLIP tensor of te2 is in canonical names.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum OpenClip {
    /// The same tensor.
    Same(String),
    /// The transposed tensor.
    Transposed(String),
    /// Three tensors, one under the other.
    Joined([String; 3]),
}

/// Canonical name or names of an OpenCLIP tensor.
pub(super) fn te2_from_open_clip(name: &str) -> Option<OpenClip> {
    match name {
        OPEN_CLIP_PROJECTION => return Some(OpenClip::Transposed(TEXT_PROJECTION.into())),
        // Playground v2 stores the Linear weight itself.
        TEXT_PROJECTION => return Some(OpenClip::Same(TEXT_PROJECTION.into())),
        _ => {}
    }
    if let Some((canonical, _)) = TEXT_OUTER.iter().find(|(_, other)| *other == name) {
        return Some(OpenClip::Same((*canonical).into()));
    }
    let (n, rest) = layer(name.strip_prefix("transformer.resblocks.")?)?;
    let layer = format!("text_model.encoder.layers.{n}");
    if let Some(leaf) = rest.strip_prefix("attn.in_proj_").filter(|leaf| matches!(*leaf, "weight" | "bias")) {
        return Some(OpenClip::Joined(THIRDS.map(|third| format!("{layer}.self_attn.{third}.{leaf}"))));
    }
    TEXT_LAYER.iter().find_map(|(canonical, other)| {
        let leaf = rest.strip_prefix(other)?.strip_prefix('.')?;
        Some(OpenClip::Same(format!("{layer}.{canonical}.{leaf}")))
    })
}

/// OpenCLIP name of a canonical te2 tensor, and which third of that tensor it is where three share one.
pub(super) fn te2_to_open_clip(name: &str) -> Option<(String, Option<usize>)> {
    if name == TEXT_PROJECTION {
        return Some((OPEN_CLIP_PROJECTION.into(), None));
    }
    if let Some((_, other)) = TEXT_OUTER.iter().find(|(canonical, _)| *canonical == name) {
        return Some(((*other).into(), None));
    }
    let (n, rest) = layer(name.strip_prefix("text_model.encoder.layers.")?)?;
    let layer = format!("transformer.resblocks.{n}");
    for (k, third) in THIRDS.iter().enumerate() {
        if let Some(leaf @ ("weight" | "bias")) =
            rest.strip_prefix("self_attn.").and_then(|rest| rest.strip_prefix(third)).and_then(|leaf| leaf.strip_prefix('.'))
        {
            return Some((format!("{layer}.attn.in_proj_{leaf}"), Some(k)));
        }
    }
    TEXT_LAYER.iter().find_map(|(canonical, other)| {
        let leaf = rest.strip_prefix(canonical)?.strip_prefix('.')?;
        Some((format!("{layer}.{other}.{leaf}"), None))
    })
}

/// Splits "12.rest".
fn layer(name: &str) -> Option<(&str, &str)> {
    name.split_once('.').filter(|(n, _)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether a canonical VAE tensor is a matrix here and in diffusers, but a 1x1 convolution in the single file.
pub(super) fn is_vae_attention_matrix(canonical: &str) -> bool {
    let leaf = ["encoder.mid.attn_1.", "decoder.mid.attn_1."].iter().find_map(|side| canonical.strip_prefix(side));
    matches!(leaf, Some("q.weight" | "k.weight" | "v.weight" | "proj_out.weight"))
}

#[cfg(test)]
#[path = "names_tests.rs"]
mod tests;
