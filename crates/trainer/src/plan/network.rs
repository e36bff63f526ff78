//! The networks' forward passes over values without numbers ([`super::tape`]): the ops of the crate `sdxl` in their order, with what
//! each keeps for its backward pass and needs beside it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use candle_core::DType;
use lokr::functional::Path;
use sdxl::GradientCheckpointing;
use sdxl::config::{ClipConfig, UNetConfig, VaeConfig};

use super::tape::{Back, Meter, V, Work, constant, op, segment};

/// Scores that the form by candle's ops has in memory at a time.
const SCORES: u64 = 1 << 26;

/// An adapter in a layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Adapted {
    /// a, b, c, d.
    pub sides: [usize; 4],
    /// Always by this path.
    pub path: Option<Path>,
    /// Trained numbers.
    pub parameters: u64,
    /// Its number among the modules.
    pub id: usize,
}

/// A linear layer, convolution or norm.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layer {
    pub out: u64,
    pub inp: u64,
    pub area: u64,
    pub stored: DType,
    pub adapted: Option<Adapted>,
}

/// The layers of a network by path, and how it runs.
pub(super) struct Net {
    pub meter: Rc<Meter>,
    pub layers: HashMap<String, Layer>,
    /// The type of the activations.
    pub compute: DType,
    pub checkpointing: GradientCheckpointing,
    /// The path that each adapted layer takes, with its rows.
    pub taken: RefCell<HashMap<String, (u64, Path)>>,
}

impl Net {
    fn layer(&self, path: &str) -> Layer {
        self.layers.get(path).copied().unwrap_or(Layer { out: 1, inp: 1, area: 1, stored: DType::F32, adapted: None })
    }

    /// A convolution with `rows` output pixels, or a linear layer over `rows` rows.
    fn conv(&self, path: &str, x: &V, rows: u64) -> V {
        let (l, m) = (self.layer(path), &self.meter);
        let weight = l.out * l.inp * l.area;
        // In f32 on the CPU a weight of f32, f16 or bf16 is widened and merged line by line, and nothing is flipped; codes of 8 bits are widened
        // whole. Elsewhere W + delta is formed in f32, and a weight of another type converted.
        let (fused, codes) = (self.compute == DType::F32 && !m.composed, l.stored == DType::U8);
        let (wide, converted) = match (fused, codes) {
            (true, false) => (0, 0),
            (true, true) => (4 * weight, 4 * weight),
            (false, _) => (4 * weight, if l.stored == self.compute { 0 } else { m.element * weight }),
        };
        let (out, macs) = (rows * l.out, (rows * weight) as f64);
        // The flipped copy that a convolution's input gradient takes; cuDNN takes none.
        let flipped = if l.area > 1 && m.half_on_cpu { m.element * weight } else { 0 };
        // The patches that candle's convolution gathers on a CPU.
        let patches = if m.half_on_cpu && l.area > 1 { m.element * rows * l.inp.max(l.out) * l.area } else { 0 };
        let plain = Work { macs, elements: (x.elements + out) as f64, weights: (weight * l.stored.size_in_bytes() as u64) as f64 };
        let Some(a) = l.adapted else {
            let _beside = m.buffer(converted + patches);
            m.work(plain);
            return op(m, &[x], out, false, false, Back { scratch: converted + patches + flipped, work: plain, ..Back::default() });
        };
        let chosen = a.path.unwrap_or_else(|| Path::choose(rows as usize, a.sides, l.area as usize, self.compute, l.stored));
        self.taken.borrow_mut().insert(path.to_owned(), (rows, chosen));
        let [ga, gb, gc, gd] = a.sides.map(|v| v as u64);
        // Elements of the tensor between the two factors, and multiply-adds of each half of the chain.
        let small = ga.min(gb);
        let between = if gb <= ga { rows * gb * gc } else { x.elements / gb.max(1) * ga };
        let through_w2 = (rows * small * gc * gd * l.area) as f64;
        let through_w1 = (if gb <= ga { rows * ga * gb * gc } else { x.elements / gb.max(1) * ga * gb }) as f64;
        let chain = Work { macs: through_w2 + through_w1, elements: 2.0 * between as f64, weights: 4.0 * a.parameters as f64 };
        let forward_scratch = match chosen {
            Path::Merged => wide + patches,
            Path::Factored => (converted + patches).max((between + out) * m.element),
        };
        let (forward, mut backward) = (plain, plain);
        m.work(forward);
        if chosen == Path::Factored {
            m.work(chain);
        }
        let beside = m.buffer(forward_scratch);
        // Both factors' gradients: two products with w2's shape, two mixes with w1's.
        backward.macs += 2.0 * (through_w2 + through_w1) + if chosen == Path::Factored { through_w2 } else { 0.0 };
        backward.elements += 4.0 * between as f64;
        let weights = match chosen {
            Path::Merged => wide + flipped + patches,
            Path::Factored => converted + flipped + patches,
        };
        let back = Back {
            saved: vec![x.buffer.clone()],
            scratch: between * m.element + weights.max(between * m.element),
            work: backward,
            parameters: vec![(a.id, 4 * a.parameters)],
            ..Back::default()
        };
        let result = op(m, &[x], out, false, true, back);
        drop(beside);
        result
    }

    fn linear(&self, path: &str, x: &V) -> V {
        self.conv(path, x, x.elements / self.layer(path).inp.max(1))
    }

    fn norm(&self, path: &str, x: &V) -> V {
        let l = self.layer(path);
        self.meter.work(Work { elements: 2.0 * x.elements as f64, ..Work::default() });
        let work = Work { elements: 3.0 * x.elements as f64, ..Work::default() };
        let parameters = l.adapted.iter().map(|a| (a.id, 4 * a.parameters)).collect();
        let wide = 4 * x.elements;
        // Composed, the standardised input is kept in f32, and three more such tensors stand beside it for a moment.
        let (saved, scratch) = if self.meter.half_on_cpu { (self.meter.buffer(wide), 3 * wide) } else { (x.buffer.clone(), 0) };
        let beside = self.meter.buffer(scratch);
        let back = Back { saved: vec![saved], scratch, work, parameters, ..Back::default() };
        let result = op(&self.meter, &[x], x.elements, false, l.adapted.is_some(), back);
        drop(beside);
        result
    }

    fn add(&self, x: &V, y: &V) -> V {
        self.meter.work(Work { elements: 3.0 * x.elements as f64, ..Work::default() });
        op(&self.meter, &[x, y], x.elements, false, false, Back { shares: true, ..Back::default() })
    }

    /// An op that keeps its input: an activation.
    fn activation(&self, x: &V, elements: u64) -> V {
        let work = Work { elements: (x.elements + elements) as f64, ..Work::default() };
        self.meter.work(work);
        // Composed, function and derivative are formed in f32.
        let scratch = if self.meter.half_on_cpu { 4 * 4 * elements } else { 0 };
        let beside = self.meter.buffer(scratch);
        let result =
            op(&self.meter, &[x], elements, false, false, Back { saved: vec![x.buffer.clone()], scratch, work, ..Back::default() });
        drop(beside);
        result
    }

    /// An op that keeps nothing: a transposition, an enlargement, a concatenation.
    fn moved(&self, inputs: &[&V], elements: u64) -> V {
        let work = Work { elements: 2.0 * elements as f64, ..Work::default() };
        self.meter.work(work);
        op(&self.meter, inputs, elements, false, false, Back { work, ..Back::default() })
    }

    /// Attention of `n` items with `heads` heads, `tq` queries and `tk` keys.
    fn attention(&self, [q, k, v]: [&V; 3], [n, heads, tq, tk]: [u64; 4]) -> V {
        let m = &self.meter;
        let scores = n * heads * tq * tk;
        let product = (scores * (q.elements / (n * heads * tq).max(1))) as f64;
        let elements = (2 * q.elements + k.elements + v.elements) as f64;
        let forward = Work { macs: 2.0 * product, elements: elements + if m.composed { 6.0 * scores as f64 } else { 0.0 }, weights: 0.0 };
        let backward = Work { macs: 5.0 * product, elements: 2.0 * forward.elements, weights: 0.0 };
        m.work(forward);
        if !m.composed {
            m.attends(tk);
        }
        let (mut saved, mut scratch) = (vec![q.buffer.clone(), k.buffer.clone(), v.buffer.clone()], 0);
        if m.composed {
            // Copies by head, and the scores of some queries in f32.
            saved = vec![m.buffer((q.elements + k.elements + v.elements) * m.element)];
            let some = scores.min(SCORES);
            scratch = 4 * 4 * some;
            let _scores = m.buffer(3 * 4 * some);
        }
        saved.push(m.buffer(4 * n * heads * tq));
        let out = m.buffer(q.elements * m.element);
        if !m.composed {
            saved.push(out.clone());
        }
        let mut result = op(m, &[q, k, v], q.elements, true, false, Back { saved, scratch, work: backward, ..Back::default() });
        // Its memory is its own, not the query's.
        result.buffer = out;
        result
    }

    fn block(self: &Rc<Self>, inputs: &[&V], f: impl Fn(&[V]) -> V + 'static) -> V {
        segment(&self.meter, self.checkpointing != GradientCheckpointing::None, inputs, Rc::new(f))
    }

    fn part(self: &Rc<Self>, inputs: &[&V], f: impl Fn(&[V]) -> V + 'static) -> V {
        segment(&self.meter, self.checkpointing == GradientCheckpointing::Layer, inputs, Rc::new(f))
    }

    fn resnet(self: &Rc<Self>, at: String, x: &V, emb: &V, n: u64, pixels: u64) -> V {
        let net = self.clone();
        self.block(&[x, emb], move |v| {
            let (first, second, place) = (net.clone(), net.clone(), at.clone());
            let h = net.part(&v[..2].iter().collect::<Vec<_>>(), move |v| {
                let h = first.conv(&format!("{place}.in_layers.2"), &first.norm(&format!("{place}.in_layers.0"), &v[0]), pixels);
                let e = first.conv(&format!("{place}.emb_layers.1"), &v[1], n);
                first.moved_pair(&h, &e)
            });
            let place = at.clone();
            let h = net.part(&[&h], move |v| {
                second.conv(&format!("{place}.out_layers.3"), &second.norm(&format!("{place}.out_layers.0"), &v[0]), pixels)
            });
            let skip = format!("{at}.skip_connection");
            if net.layers.contains_key(&skip) { net.add(&net.conv(&skip, &v[0], pixels), &h) } else { net.add(&v[0], &h) }
        })
    }

    /// A value for each channel added to an image.
    fn moved_pair(&self, h: &V, e: &V) -> V {
        self.meter.work(Work { elements: 2.0 * h.elements as f64, ..Work::default() });
        op(&self.meter, &[h, e], h.elements, false, false, Back { shares: true, ..Back::default() })
    }

    fn attend(&self, at: &str, x: &V, context: &V, [n, heads, tq, tk]: [u64; 4]) -> V {
        let q = self.linear(&format!("{at}.to_q"), x);
        let k = self.linear(&format!("{at}.to_k"), context);
        let v = self.linear(&format!("{at}.to_v"), context);
        self.linear(&format!("{at}.to_out.0"), &self.attention([&q, &k, &v], [n, heads, tq, tk]))
    }

    fn transformer(self: &Rc<Self>, at: &str, x: &V, context: &V, [n, heads, t, tk]: [u64; 4], depth: usize) -> V {
        let tokens = self.moved(&[&self.norm(&format!("{at}.norm"), x)], x.elements);
        let mut tokens = self.linear(&format!("{at}.proj_in"), &tokens);
        for k in 0..depth {
            let (net, at) = (self.clone(), format!("{at}.transformer_blocks.{k}"));
            tokens = self.block(&[&tokens, context], move |v| {
                let (first, second, third) = (net.clone(), net.clone(), net.clone());
                let (one, two, three) = (at.clone(), at.clone(), at.clone());
                let x = net.part(&[&v[0]], move |v| {
                    let h = first.norm(&format!("{one}.norm1"), &v[0]);
                    first.add(&first.attend(&format!("{one}.attn1"), &h, &h, [n, heads, t, t]), &v[0])
                });
                let x = net.part(&[&x, &v[1]], move |v| {
                    let h = second.norm(&format!("{two}.norm2"), &v[0]);
                    second.add(&second.attend(&format!("{two}.attn2"), &h, &v[1], [n, heads, t, tk]), &v[0])
                });
                net.part(&[&x], move |v| {
                    let h = third.linear(&format!("{three}.ff.net.0.proj"), &third.norm(&format!("{three}.norm3"), &v[0]));
                    let h = third.activation(&h, h.elements / 2);
                    third.add(&third.linear(&format!("{three}.ff.net.2"), &h), &v[0])
                })
            });
        }
        let tokens = self.linear(&format!("{at}.proj_out"), &tokens);
        self.add(&self.moved(&[&tokens], tokens.elements), x)
    }

    /// The UNet: `n` items of `h` by `w` latent pixels, `tokens` tokens of context.
    pub fn unet(self: &Rc<Self>, c: &UNetConfig, context: &V, vector: &V, [n, h, w, tokens]: [u64; 4]) -> V {
        let time = constant(&self.meter, n * c.block_out_channels[0] as u64);
        let mlp = |at: &str, x: &V| {
            let y = self.linear(&format!("{at}.0"), x);
            let y = self.activation(&y, y.elements);
            self.linear(&format!("{at}.2"), &y)
        };
        let emb = self.add(&mlp("time_embed", &time), &mlp("label_emb.0", vector));
        let emb = self.activation(&emb, emb.elements);
        let latents = constant(&self.meter, n * c.in_channels as u64 * h * w);
        let heads = |width: usize| (width / c.head_dim.max(1)) as u64;
        let levels = c.block_out_channels.len();
        let (mut sizes, mut x) = (vec![(h, w)], self.conv("input_blocks.0.0", &latents, n * h * w));
        let mut skips = vec![(x.clone(), (h, w))];
        let mut block = 1;
        for (level, (&width, &depth)) in c.block_out_channels.iter().zip(&c.transformer_depth).enumerate() {
            let (h, w) = sizes[level];
            for _ in 0..c.layers_per_block {
                x = self.resnet(format!("input_blocks.{block}.0"), &x, &emb, n, n * h * w);
                if depth > 0 {
                    x = self.transformer(&format!("input_blocks.{block}.1"), &x, context, [n, heads(width), h * w, tokens], depth);
                }
                skips.push((x.clone(), (h, w)));
                block += 1;
            }
            if level + 1 < levels {
                let half = (h.div_ceil(2), w.div_ceil(2));
                x = self.conv(&format!("input_blocks.{block}.0.op"), &x, n * half.0 * half.1);
                sizes.push(half);
                skips.push((x.clone(), half));
                block += 1;
            }
        }
        let (h, w) = sizes[levels - 1];
        let last = c.block_out_channels[levels - 1];
        x = self.resnet("middle_block.0".into(), &x, &emb, n, n * h * w);
        x = self.transformer("middle_block.1", &x, context, [n, heads(last), h * w, tokens], c.mid_depth);
        x = self.resnet("middle_block.2".into(), &x, &emb, n, n * h * w);
        let mut block = 0;
        for level in (0..levels).rev() {
            let (width, depth) = (c.block_out_channels[level], c.transformer_depth[level]);
            for j in 0..=c.layers_per_block {
                let Some((skip, (h, w))) = skips.pop() else { return x };
                let joined = self.moved(&[&x, &skip], x.elements + skip.elements);
                drop(skip);
                x = self.resnet(format!("output_blocks.{block}.0"), &joined, &emb, n, n * h * w);
                drop(joined);
                let mut next = 1;
                if depth > 0 {
                    x = self.transformer(&format!("output_blocks.{block}.1"), &x, context, [n, heads(width), h * w, tokens], depth);
                    next = 2;
                }
                if j == c.layers_per_block && level > 0 {
                    let (oh, ow) = sizes[level - 1];
                    let large = self.moved(&[&x], n * width as u64 * oh * ow);
                    x = self.conv(&format!("output_blocks.{block}.{next}.conv"), &large, n * oh * ow);
                }
                block += 1;
            }
        }
        let (h, w) = sizes[0];
        self.conv("out.2", &self.norm("out.0", &x), n * h * w)
    }

    /// A text encoder over `rows` rows of 77 tokens: the last layer's input, and the last layer's output of `first` rows.
    pub fn clip(self: &Rc<Self>, c: &ClipConfig, rows: u64, first: Option<u64>) -> (V, Option<V>) {
        let (t, width) = (c.positions as u64, c.width as u64);
        let mut x = constant(&self.meter, rows * t * width);
        let last = c.layers.saturating_sub(1);
        for i in 0..last {
            x = self.clip_layer(i, &x, c, rows);
        }
        let Some(first) = first else { return (x, None) };
        let y = if first == rows { x.clone() } else { self.moved(&[&x], first * t * width) };
        let y = self.norm("text_model.final_layer_norm", &self.clip_layer(last, &y, c, first));
        let pooled = self.linear("text_projection", &self.moved(&[&y], first * width));
        (x, Some(pooled))
    }

    fn clip_layer(self: &Rc<Self>, i: usize, x: &V, c: &ClipConfig, rows: u64) -> V {
        let (net, at) = (self.clone(), format!("text_model.encoder.layers.{i}"));
        let (t, heads) = (c.positions as u64, c.heads as u64);
        self.block(&[x], move |v| {
            let (first, second, one, two) = (net.clone(), net.clone(), at.clone(), at.clone());
            let x = net.part(&[&v[0]], move |v| {
                let h = first.norm(&format!("{one}.layer_norm1"), &v[0]);
                let [q, k, u] = ["q_proj", "k_proj", "v_proj"].map(|p| first.linear(&format!("{one}.self_attn.{p}"), &h));
                let y = first.attention([&q, &k, &u], [rows, heads, t, t]);
                first.add(&v[0], &first.linear(&format!("{one}.self_attn.out_proj"), &y))
            });
            net.part(&[&x], move |v| {
                let h = second.linear(&format!("{two}.mlp.fc1"), &second.norm(&format!("{two}.layer_norm2"), &v[0]));
                let h = second.activation(&h, h.elements);
                second.add(&v[0], &second.linear(&format!("{two}.mlp.fc2"), &h))
            })
        })
    }

    /// Context and added condition of `n` prompts of `chunks` rows each.
    pub fn text(self: &Rc<Self>, te: [(&Rc<Self>, &ClipConfig); 2], n: u64, chunks: u64, adm: u64) -> (V, V, u64) {
        let (h1, _) = te[0].0.clip(te[0].1, n * chunks, None);
        let (h2, pooled) = te[1].0.clip(te[1].1, n * chunks, Some(n));
        let tokens = 75 * chunks + 2;
        let context = self.moved(&[&h1, &h2], n * tokens * (te[0].1.width + te[1].1.width) as u64);
        let vector = pooled.map_or_else(|| constant(&self.meter, n * adm), |p| self.moved(&[&p], n * adm));
        (context, vector, tokens)
    }

    /// Peak of encoding `n` pictures of `h` by `w` pixels: nothing is recorded.
    pub fn encode(self: &Rc<Self>, c: &VaeConfig, [n, h, w]: [u64; 3]) {
        let m = &self.meter;
        m.without_recording(|| {
            let pixels = constant(m, n * 3 * h * w);
            let (mut h, mut w) = (h, w);
            let mut x = self.conv("encoder.conv_in", &pixels, n * h * w);
            let resnet = |at: &str, x: &V, pixels: u64| {
                let y = self.conv(&format!("{at}.conv1"), &self.norm(&format!("{at}.norm1"), x), pixels);
                let y = self.conv(&format!("{at}.conv2"), &self.norm(&format!("{at}.norm2"), &y), pixels);
                let shortcut = format!("{at}.nin_shortcut");
                if self.layers.contains_key(&shortcut) { self.add(&self.conv(&shortcut, x, pixels), &y) } else { self.add(x, &y) }
            };
            for i in 0..c.block_out_channels.len() {
                for j in 0..c.layers_per_block {
                    x = resnet(&format!("encoder.down.{i}.block.{j}"), &x, n * h * w);
                }
                if i + 1 < c.block_out_channels.len() {
                    let padded = self.moved(&[&x], x.elements / (h * w).max(1) * (h + 1) * (w + 1));
                    (h, w) = (h.div_ceil(2), w.div_ceil(2));
                    x = self.conv(&format!("encoder.down.{i}.downsample.conv"), &padded, n * h * w);
                }
            }
            x = resnet("encoder.mid.block_1", &x, n * h * w);
            let t = self.moved(&[&self.norm("encoder.mid.attn_1.norm", &x)], x.elements);
            let [q, k, v] = ["q", "k", "v"].map(|p| self.linear(&format!("encoder.mid.attn_1.{p}"), &t));
            let y = self.attention([&q, &k, &v], [n, 1, h * w, h * w]);
            x = self.add(&x, &self.linear("encoder.mid.attn_1.proj_out", &y));
            x = resnet("encoder.mid.block_2", &x, n * h * w);
            self.conv("encoder.conv_out", &self.norm("encoder.norm_out", &x), n * h * w);
        });
    }
}
