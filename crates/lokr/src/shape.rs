//! Which tensors a module has, their shapes, its scale and its alpha: one decision for linear layers and convolutions,
//! made from the layer's size and the options, before anything is allocated (LyCORIS, lycoris/modules/lokr.py).
//! Values are left to `init.rs`, files to `file.rs` and `load.rs`.
//!
//! Letters: w1 is (a, b), w2 is (c, d, kh, kw); the layer has a*c outputs and b*d inputs; r is the rank.

use crate::factorization::factorization;

/// The layer that is adapted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Output features or channels.
    pub out: usize,
    /// Input features or channels.
    pub inp: usize,
    /// Height and width of a convolution's kernel; `None` for a linear layer.
    pub kernel: Option<(usize, usize)>,
}

impl LayerShape {
    /// A linear layer.
    pub fn linear(out: usize, inp: usize) -> Self {
        Self { out, inp, kernel: None }
    }

    /// A convolution.
    pub fn conv(out: usize, inp: usize, kernel: (usize, usize)) -> Self {
        Self { out, inp, kernel: Some(kernel) }
    }

    /// The layer's weight: (out, in) or (out, in, kh, kw).
    pub fn weight_dims(&self) -> Vec<usize> {
        let mut dims = vec![self.out, self.inp];
        dims.extend(self.kernel.iter().flat_map(|&(h, w)| [h, w]));
        dims
    }

    /// Elements of the kernel; 1 for a linear layer.
    pub fn kernel_area(&self) -> usize {
        self.kernel.map_or(1, |(h, w)| h * w)
    }

    /// Whether LyCORIS treats it as a convolution with `conv_dim`: it asks for the first side of the kernel only.
    pub fn is_spatial(&self) -> bool {
        self.kernel.is_some_and(|(h, _)| h != 1)
    }
}

/// The options of one module, with the meaning that LyCORIS gives them.
#[derive(Clone, Debug, PartialEq)]
pub struct LokrOptions {
    /// The rank r. A rank that is not smaller than half of the larger side makes the factor full.
    pub dim: usize,
    /// Strength; `None` or 0 means `dim`. Without effect where both factors are full.
    pub alpha: Option<f64>,
    /// See [`factorization`].
    pub factor: i64,
    /// Both factors full, whatever the rank.
    pub full_matrix: bool,
    /// w1 may be low-rank too.
    pub decompose_both: bool,
    /// Low-rank kernels larger than 1x1 get a core tensor `lokr_t2`.
    pub use_tucker: bool,
    /// Scale by sqrt(dim) in place of dim.
    pub rs_lora: bool,
    /// Swaps the two sides of the output split, so that w1 is tall.
    pub unbalanced_factorization: bool,
}

impl Default for LokrOptions {
    /// LyCORIS's defaults: dim 4, alpha 1, factor -1, the rest off.
    fn default() -> Self {
        Self {
            dim: 4,
            alpha: Some(1.0),
            factor: -1,
            full_matrix: false,
            decompose_both: false,
            use_tucker: false,
            rs_lora: false,
            unbalanced_factorization: false,
        }
    }
}

/// How one of the two factors is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As it is.
    Full,
    /// A product of two matrices with `rank` between them.
    LowRank {
        /// r.
        rank: usize,
    },
    /// A core (r, r, kh, kw) between two matrices; w2 only.
    Tucker {
        /// r.
        rank: usize,
    },
}

/// A tensor of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Factor {
    /// (a, b)
    W1,
    /// (a, r)
    W1A,
    /// (r, b)
    W1B,
    /// (c, d) or (c, d, kh, kw)
    W2,
    /// (c, r); in the tucker form (r, c)
    W2A,
    /// (r, d*kh*kw); in the tucker form (r, d)
    W2B,
    /// (r, r, kh, kw)
    T2,
}

impl Factor {
    /// All of them, in the order in which LyCORIS puts them into its state dict.
    pub const ALL: [Self; 7] = [Self::W1, Self::W1A, Self::W1B, Self::W2, Self::W2A, Self::W2B, Self::T2];

    /// The tensor's key in a file, after the module's name and a dot.
    pub fn key(self) -> &'static str {
        match self {
            Self::W1 => "lokr_w1",
            Self::W1A => "lokr_w1_a",
            Self::W1B => "lokr_w1_b",
            Self::W2 => "lokr_w2",
            Self::W2A => "lokr_w2_a",
            Self::W2B => "lokr_w2_b",
            Self::T2 => "lokr_t2",
        }
    }
}

/// Everything that follows from a layer's size and the options.
#[derive(Clone, Debug, PartialEq)]
pub struct LokrShape {
    /// The layer.
    pub layer: LayerShape,
    /// Rows of w1.
    pub a: usize,
    /// Columns of w1.
    pub b: usize,
    /// Rows of w2.
    pub c: usize,
    /// Columns of w2.
    pub d: usize,
    /// How w1 is stored.
    pub w1: Form,
    /// How w2 is stored.
    pub w2: Form,
    /// The rank as the user gave it, not capped by the layer. It is saved as alpha where both factors are full.
    pub dim: usize,
    /// Factor in front of the Kronecker product.
    pub scale: f64,
    /// Alpha as it is saved: for low-rank modules `scale` times the rank. May be larger than a file's type can hold
    /// (dim 100000 in f16); [`LokrShape::alpha_for`] gives what to write.
    pub alpha: f64,
}

impl LokrShape {
    /// The decision. `options.dim` must not be 0.
    pub fn new(layer: LayerShape, options: &LokrOptions) -> Self {
        let rank = options.dim;
        let (b, d) = factorization(layer.inp, options.factor);
        let (mut a, mut c) = factorization(layer.out, options.factor);
        if options.unbalanced_factorization {
            std::mem::swap(&mut a, &mut c);
        }
        // "r < side/2" by real division.
        let fits = |side: usize| 2 * rank < side && !options.full_matrix;
        let w1 = if options.decompose_both && fits(a.max(b)) { Form::LowRank { rank } } else { Form::Full };
        let w2 = match (fits(c.max(d)), options.use_tucker && layer.kernel.is_some_and(|k| k != (1, 1))) {
            (false, _) => Form::Full,
            (true, true) => Form::Tucker { rank },
            (true, false) => Form::LowRank { rank },
        };
        let dim = rank as f64;
        let alpha = match options.alpha {
            _ if w1 == Form::Full && w2 == Form::Full => dim,
            None | Some(0.0) => dim,
            Some(alpha) => alpha,
        };
        let divisor = if options.rs_lora { dim.sqrt() } else { dim };
        Self { layer, a, b, c, d, w1, w2, dim: rank, scale: alpha / divisor, alpha: alpha * (dim / divisor) }
    }

    /// Whether both factors are full. Then readers take the scale as 1 and ignore alpha.
    pub fn is_full(&self) -> bool {
        self.w1 == Form::Full && self.w2 == Form::Full
    }

    /// The rank by which readers divide alpha: w2's, or w1's where w2 is full.
    pub fn rank(&self) -> Option<usize> {
        [self.w2, self.w1].iter().find_map(|form| match form {
            Form::Full => None,
            Form::LowRank { rank } | Form::Tucker { rank } => Some(*rank),
        })
    }

    /// w2 in full: (c, d) or (c, d, kh, kw).
    pub fn w2_dims(&self) -> Vec<usize> {
        LayerShape { out: self.c, inp: self.d, kernel: self.layer.kernel }.weight_dims()
    }

    /// The module's tensors with their shapes, in the order of the state dict.
    pub fn tensors(&self) -> Vec<(Factor, Vec<usize>)> {
        let mut list = match self.w1 {
            Form::LowRank { rank } | Form::Tucker { rank } => {
                vec![(Factor::W1A, vec![self.a, rank]), (Factor::W1B, vec![rank, self.b])]
            }
            Form::Full => vec![(Factor::W1, vec![self.a, self.b])],
        };
        match self.w2 {
            Form::Full => list.push((Factor::W2, self.w2_dims())),
            Form::LowRank { rank } => {
                list.push((Factor::W2A, vec![self.c, rank]));
                list.push((Factor::W2B, vec![rank, self.d * self.layer.kernel_area()]));
            }
            Form::Tucker { rank } => {
                let (h, w) = self.layer.kernel.unwrap_or((1, 1));
                list.push((Factor::W2A, vec![rank, self.c]));
                list.push((Factor::W2B, vec![rank, self.d]));
                list.push((Factor::T2, vec![rank, rank, h, w]));
            }
        }
        list
    }

    /// Trainable numbers in the module's tensors (without the scalar of `use_scalar`).
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, dims)| dims.iter().product::<usize>()).sum()
    }

    /// Alpha for a file whose type holds values up to `max`, or `None` if the module's strength would change. With both
    /// factors full and scale 1 the value means nothing to any reader and is clamped, never infinite (LyCORIS writes
    /// infinity for dim 100000 in f16). Reading alpha back gives the scale only for low-rank modules: alpha over rank.
    pub fn alpha_for(&self, max: f64) -> Option<f64> {
        if self.alpha.abs() <= max {
            return Some(self.alpha);
        }
        (self.is_full() && self.scale == 1.0).then_some(max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::golden;

    #[test]
    fn every_recorded_case_has_our_shapes_scale_and_alpha() {
        let cases = golden::cases();
        assert_eq!(cases.len(), 26);
        for case in cases {
            let shape = LokrShape::new(case.layer, &case.options);
            let ours: Vec<_> = shape.tensors().into_iter().map(|(f, dims)| (f.key().to_string(), dims)).collect();
            let mut theirs: Vec<_> = case.shapes.clone();
            theirs.sort_by_key(|(key, _)| Factor::ALL.iter().position(|f| f.key() == key));
            assert_eq!(ours, theirs, "case {}", case.id);
            assert_eq!(shape.scale, case.scale, "case {}", case.id);
            assert_eq!(shape.alpha as f32, case.alpha_saved as f32, "case {}", case.id);
        }
    }

    #[test]
    fn alpha_is_never_infinite_and_never_changes_the_strength() {
        let full = LokrOptions { dim: 100_000, alpha: Some(100_000.0), factor: 8, ..Default::default() };
        let shape = LokrShape::new(LayerShape::linear(640, 640), &full);
        assert_eq!((shape.scale, shape.alpha), (1.0, 100_000.0));
        assert_eq!(shape.alpha_for(65504.0), Some(65504.0));
        let strong = LokrOptions { dim: 4, alpha: Some(1e6), factor: 8, ..Default::default() };
        let shape = LokrShape::new(LayerShape::linear(640, 640), &strong);
        assert!(!shape.is_full());
        assert_eq!(shape.alpha_for(65504.0), None);
    }

    #[test]
    fn alpha_of_nought_or_none_is_the_rank() {
        for alpha in [None, Some(0.0)] {
            let options = LokrOptions { dim: 4, alpha, factor: 8, ..Default::default() };
            assert_eq!(LokrShape::new(LayerShape::linear(640, 640), &options).scale, 1.0);
        }
    }

    #[test]
    fn half_of_the_larger_side_is_the_border() {
        let shape = |dim| LokrShape::new(LayerShape::linear(64, 64), &LokrOptions { dim, factor: 4, ..Default::default() });
        assert_eq!(shape(7).w2, Form::LowRank { rank: 7 });
        assert_eq!(shape(8).w2, Form::Full);
    }
}
