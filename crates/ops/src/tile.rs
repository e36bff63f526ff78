//! Micro-kernels: a tile of a matrix product whose sums stay in registers. One for AVX-512 (`avx512.rs`), one for AVX2 (`avx2.rs`), one that the
//! compiler vectorises for any other CPU (`portable.rs`); and for products of bf16 with sums in f32 one for AVX-512 BF16 and one for AMX
//! (`amx.rs`). All add along k in ascending order, so an element's value does not depend on the tile it falls into.
//!
//! Operands come packed by `pack.rs`: strips of `rows` (or `lanes`) neighbours, k by k.

use crate::ahead::Ahead;
use crate::capability::{Capability, capability};
use std::sync::LazyLock;

/// Which micro-kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Amx,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// Whether this CPU multiplies bf16 pairs (AVX-512 BF16), and AVX-512 is used.
pub fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static HAS: LazyLock<bool> = LazyLock::new(|| capability() == Capability::Avx512 && is_x86_feature_detected!("avx512bf16"));
        *HAS
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

impl Kernel {
    /// The best one for this CPU.
    pub(crate) fn f32() -> Self {
        match capability() {
            #[cfg(target_arch = "x86_64")]
            Capability::Avx512 => Self::Avx512,
            #[cfg(target_arch = "x86_64")]
            Capability::Avx2 => Self::Avx2,
            _ => Self::Portable,
        }
    }

    /// The best one of bf16 products; only where [`has_bf16`].
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn bf16() -> Self {
        if crate::amx::has_amx() { Self::Amx } else { Self::Avx512Bf16 }
    }

    /// Those that this CPU runs, without bf16's.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self::Portable];
        if Self::f32() != Self::Portable {
            all.push(Self::f32());
        }
        #[cfg(target_arch = "x86_64")]
        if Self::f32() == Self::Avx512 && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(Self::Avx2);
        }
        all
    }

    /// Whether its vectors have 16 numbers.
    pub(crate) fn avx512(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Bf16 | Self::Amx => true,
            _ => false,
        }
    }

    /// Whether its operands are rounded to bf16.
    pub(crate) fn is_bf16(self) -> bool {
        self.per_step() > 1
    }

    /// Rows of a full tile: with `lanes` columns as many sums as leave registers for the operands.
    pub(crate) fn rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => crate::amx::SIDE,
            _ if self.avx512() => 14,
            _ => 6,
        }
    }

    /// Columns of a full tile: two vectors.
    pub(crate) fn lanes(self) -> usize {
        if self.avx512() { 32 } else { 16 }
    }

    /// Columns of a tile at the edge: one vector, if that is enough.
    pub(crate) fn narrow(self) -> usize {
        if self == Self::Portable || self.is_amx() { self.lanes() } else { self.lanes() / 2 }
    }

    /// Whether the left operand's lines along k are read where they lie.
    pub(crate) fn in_place(self) -> bool {
        !self.is_bf16()
    }

    /// Whether it has packed operands of its own, see `amx.rs`.
    pub(crate) fn is_amx(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Self::Amx;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// What steps along k come in multiples of: bf16 comes in pairs.
    pub(crate) fn per_step(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => 2,
            #[cfg(target_arch = "x86_64")]
            Self::Amx => crate::amx::SIDE,
            _ => 1,
        }
    }
}

/// What a tile's sums are added to.
#[derive(Clone, Copy)]
pub(crate) enum Start {
    Zero,
    /// What is there.
    Add,
    /// A number for each of the tile's rows.
    Rows(*const f32),
    /// A number for each of the tile's columns.
    Columns(*const f32),
}

/// How a tile's left operand lies in memory.
#[derive(Clone, Copy)]
pub(crate) enum Left {
    /// `a[k * width + i]`.
    Packed(usize),
    /// In lines along k: `a[i * line + k]`. Only where [`Kernel::in_place`].
    Lines(usize),
}

/// One tile: `c[i * rs + j] = start + scale * sum over k of a(i, k) * b[k * lanes + j]`.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub rows: usize,
    /// Columns to write; `lanes` is the strip's width in memory.
    pub columns: usize,
    pub lanes: usize,
    pub steps: usize,
    /// The left operand.
    pub left: Left,
    pub rs: usize,
    /// Element (i, j) goes to `c[j * rs + i]`.
    pub turned: bool,
    pub start: Start,
    pub scale: f32,
}

/// Computes a tile, and meanwhile asks for what will be read next.
///
/// # Safety
/// `a` holds `rows` numbers at each of `steps` places, or `rows` lines of `steps`; `b` `steps * lanes`; `c` is exclusive for `rows` rows of `columns`
/// numbers, `rs` apart (turned: the other way); `start` has a number for each row or column; `rows` and `lanes` are at most the kernel's,
/// and the CPU has its instructions.
pub(crate) unsafe fn tile(kernel: Kernel, t: Tile, a: *const f32, b: *const f32, c: *mut f32, ahead: &mut Ahead) {
    debug_assert!(t.rows <= kernel.rows() && t.lanes <= kernel.lanes() && t.columns <= t.lanes);
    debug_assert!(matches!(t.left, Left::Packed(_)) || kernel.in_place());
    let _ = &ahead;
    // SAFETY: the caller's promises.
    unsafe {
        match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => crate::avx512::dispatch(t, a, b, c, ahead),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Bf16 => crate::avx512::dispatch_bf16(t, a, b, c, ahead),
            #[cfg(target_arch = "x86_64")]
            Kernel::Amx => crate::amx::tile(t, a, b, c),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => crate::avx2::dispatch(t, a, b, c, ahead),
            Kernel::Portable => crate::portable::dispatch(t, a, b, c),
        }
    }
}
