//! Descriptions of SDXL's trees, built from its published shape (sd-scripts, library/sdxl_original_unet.py), without a single weight.

use crate::shape::LayerShape;
use crate::walk::{Node, NodeKind};

/// A tree under construction: path, class, kind.
#[derive(Default)]
pub(super) struct Tree(Vec<(String, &'static str, NodeKind)>);

impl Tree {
    fn other(&mut self, path: String, class: &'static str) {
        self.0.push((path, class, NodeKind::Other));
    }

    fn linear(&mut self, path: String, out: usize, inp: usize) {
        self.0.push((path, "Linear", NodeKind::Layer(LayerShape::linear(out, inp))));
    }

    fn conv(&mut self, path: String, out: usize, inp: usize, k: usize) {
        self.0.push((path, "Conv2d", NodeKind::Layer(LayerShape::conv(out, inp, (k, k)))));
    }

    fn norm(&mut self, path: String, class: &'static str, channels: usize) {
        self.0.push((path, class, NodeKind::Norm(channels)));
    }

    pub(super) fn nodes(&self) -> Vec<Node<'_>> {
        self.0.iter().map(|(path, class, kind)| Node { path, class, kind: *kind }).collect()
    }

    fn resnet(&mut self, p: &str, out: usize, inp: usize) {
        self.other(p.into(), "ResnetBlock2D");
        self.other(format!("{p}.in_layers"), "Sequential");
        self.norm(format!("{p}.in_layers.0"), "GroupNorm32", inp);
        self.other(format!("{p}.in_layers.1"), "SiLU");
        self.conv(format!("{p}.in_layers.2"), out, inp, 3);
        self.other(format!("{p}.emb_layers"), "Sequential");
        self.linear(format!("{p}.emb_layers.1"), out, 1280);
        self.other(format!("{p}.out_layers"), "Sequential");
        self.norm(format!("{p}.out_layers.0"), "GroupNorm32", out);
        self.conv(format!("{p}.out_layers.3"), out, out, 3);
        if out != inp {
            self.conv(format!("{p}.skip_connection"), out, inp, 1);
        }
    }

    fn transformer(&mut self, p: &str, width: usize, depth: usize) {
        self.other(p.into(), "Transformer2DModel");
        self.norm(format!("{p}.norm"), "GroupNorm", width);
        self.linear(format!("{p}.proj_in"), width, width);
        self.other(format!("{p}.transformer_blocks"), "ModuleList");
        for i in 0..depth {
            let b = format!("{p}.transformer_blocks.{i}");
            self.other(b.clone(), "BasicTransformerBlock");
            let attention = |tree: &mut Self, name: &str, context: usize| {
                let a = format!("{b}.{name}");
                tree.other(a.clone(), "CrossAttention");
                tree.linear(format!("{a}.to_q"), width, width);
                tree.linear(format!("{a}.to_k"), width, context);
                tree.linear(format!("{a}.to_v"), width, context);
                tree.other(format!("{a}.to_out"), "ModuleList");
                tree.linear(format!("{a}.to_out.0"), width, width);
            };
            attention(self, "attn1", width);
            self.other(format!("{b}.ff"), "FeedForward");
            self.other(format!("{b}.ff.net"), "ModuleList");
            self.other(format!("{b}.ff.net.0"), "GEGLU");
            self.linear(format!("{b}.ff.net.0.proj"), 8 * width, width);
            self.linear(format!("{b}.ff.net.2"), width, 4 * width);
            attention(self, "attn2", 2048);
            for n in 1..4 {
                self.norm(format!("{b}.norm{n}"), "LayerNorm", width);
            }
        }
        self.linear(format!("{p}.proj_out"), width, width);
    }
}

pub(super) fn unet() -> Tree {
    let mut t = Tree::default();
    t.other(String::new(), "SdxlUNet2DConditionModel");
    t.other("time_embed".into(), "Sequential");
    t.linear("time_embed.0".into(), 1280, 320);
    t.linear("time_embed.2".into(), 1280, 1280);
    t.other("label_emb".into(), "Sequential");
    t.other("label_emb.0".into(), "Sequential");
    t.linear("label_emb.0.0".into(), 1280, 2816);
    t.linear("label_emb.0.2".into(), 1280, 1280);
    t.other("input_blocks".into(), "ModuleList");
    let (widths, depths) = ([320, 640, 1280], [0, 2, 10]);
    t.other("input_blocks.0".into(), "Sequential");
    t.conv("input_blocks.0.0".into(), 320, 4, 3);
    let (mut n, mut width, mut skips) = (1, 320, vec![320]);
    for level in 0..3 {
        for _ in 0..2 {
            t.other(format!("input_blocks.{n}"), "ModuleList");
            t.resnet(&format!("input_blocks.{n}.0"), widths[level], width);
            width = widths[level];
            if depths[level] > 0 {
                t.transformer(&format!("input_blocks.{n}.1"), width, depths[level]);
            }
            skips.push(width);
            n += 1;
        }
        if level < 2 {
            t.other(format!("input_blocks.{n}"), "Sequential");
            t.other(format!("input_blocks.{n}.0"), "Downsample2D");
            t.conv(format!("input_blocks.{n}.0.op"), width, width, 3);
            skips.push(width);
            n += 1;
        }
    }
    t.other("middle_block".into(), "ModuleList");
    t.resnet("middle_block.0", 1280, 1280);
    t.transformer("middle_block.1", 1280, 10);
    t.resnet("middle_block.2", 1280, 1280);
    t.other("output_blocks".into(), "ModuleList");
    let mut n = 0;
    for level in (0..3).rev() {
        for i in 0..3 {
            t.other(format!("output_blocks.{n}"), "ModuleList");
            let skip = skips.pop().expect("as many as on the way down");
            t.resnet(&format!("output_blocks.{n}.0"), widths[level], width + skip);
            width = widths[level];
            if depths[level] > 0 {
                t.transformer(&format!("output_blocks.{n}.1"), width, depths[level]);
            }
            if i == 2 && level > 0 {
                t.other(format!("output_blocks.{n}.2"), "Upsample2D");
                t.conv(format!("output_blocks.{n}.2.conv"), width, width, 3);
            }
            n += 1;
        }
    }
    t.other("out".into(), "ModuleList");
    t.norm("out.0".into(), "GroupNorm32", 320);
    t.conv("out.2".into(), 4, 320, 3);
    t
}

pub(super) fn clip(width: usize, layers: usize) -> Tree {
    let mut t = Tree::default();
    t.other(String::new(), "CLIPTextModel");
    t.other("text_model".into(), "CLIPTextTransformer");
    t.other("text_model.encoder".into(), "CLIPEncoder");
    t.other("text_model.encoder.layers".into(), "ModuleList");
    for i in 0..layers {
        let p = format!("text_model.encoder.layers.{i}");
        t.other(p.clone(), "CLIPEncoderLayer");
        t.other(format!("{p}.self_attn"), "CLIPAttention");
        for name in ["k_proj", "v_proj", "q_proj", "out_proj"] {
            t.linear(format!("{p}.self_attn.{name}"), width, width);
        }
        t.norm(format!("{p}.layer_norm1"), "LayerNorm", width);
        t.other(format!("{p}.mlp"), "CLIPMLP");
        t.linear(format!("{p}.mlp.fc1"), 4 * width, width);
        t.linear(format!("{p}.mlp.fc2"), width, 4 * width);
        t.norm(format!("{p}.layer_norm2"), "LayerNorm", width);
    }
    t.norm("text_model.final_layer_norm".into(), "LayerNorm", width);
    t
}
