//! A frozen weight as products read it: line by line, widened on the way if it is stored narrower, and with an adapter's
//! `kron(w1, w2)` added if there is one. Neither a widened copy nor W + delta ever exists whole.

use crate::ahead::Ahead;
#[cfg(target_arch = "x86_64")]
use crate::avx512;
#[cfg(target_arch = "x86_64")]
use crate::capability::{Capability, capability};
use crate::linear::widen;
use crate::mapped::{Mapped, Weight};
use crate::math::simd;
use crate::view::F32;
use candle_core::{CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// What a LoKr adds to a frozen weight `(a c, b d, ..)`: `kron(w1 (a, b), w2 (c, d, ..))`, the scale folded into `w1`; both f32 and
/// contiguous.
#[derive(Clone, Copy)]
pub struct Delta<'a> {
    /// `(a, b)`.
    pub w1: &'a Tensor,
    /// `(c, d, ..)`.
    pub w2: &'a Tensor,
}

/// A frozen weight, and what is added to it.
#[derive(Clone)]
pub struct Frozen<'a> {
    /// `(out, in, ..)`.
    pub weight: Weight,
    /// Only for f32 on the CPU, see [`crate::kernel::fuses`].
    pub delta: Option<Delta<'a>>,
}

impl<W: Into<Weight>> From<W> for Frozen<'_> {
    fn from(weight: W) -> Self {
        Self { weight: weight.into(), delta: None }
    }
}

/// A weight's elements, C order.
pub(crate) enum Stored<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl Stored<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }
}

/// Holds the borrows that [`Lines`] looks into.
pub(crate) struct Held<'a> {
    weight: Place<'a>,
    row: usize,
    delta: Option<(F32<'a>, F32<'a>)>,
    /// b, c and the elements of one row of w2.
    sizes: [usize; 3],
}

enum Place<'a> {
    Tensor(StorageRef<'a>, &'a Layout),
    Mapped(&'a Mapped),
}

/// The rows of a weight seen as a matrix `(out, rest)`.
pub(crate) struct Lines<'a> {
    stored: Stored<'a>,
    row: usize,
    delta: Option<(&'a [f32], &'a [f32])>,
    sizes: [usize; 3],
}

impl<'a> Held<'a> {
    /// Borrows a contiguous f32, f16 or bf16 weight on the CPU.
    pub(crate) fn new(weight: &'a Weight, delta: Option<Delta<'a>>) -> Result<Self> {
        let rows = weight.dims().first().copied().unwrap_or(1);
        let row = weight.elem_count() / rows.max(1);
        let (delta, sizes) = match delta {
            None => (None, [1, 1, 1]),
            Some(Delta { w1, w2 }) => {
                let ((a, b), c) = (w1.dims2()?, w2.dim(0)?);
                let inner = w2.elem_count() / c.max(1);
                if a * c != rows || b * inner != row {
                    candle_core::bail!("weight {:?} is not w1 {:?} by w2 {:?}", weight.dims(), w1.dims(), w2.dims());
                }
                (Some((F32::new(w1)?, F32::new(w2)?)), [b, c, inner])
            }
        };
        let weight = match weight {
            Weight::Tensor(tensor) => {
                let (storage, layout) = tensor.storage_and_layout();
                Place::Tensor(storage, layout)
            }
            Weight::Mapped(mapped) => Place::Mapped(mapped),
        };
        Ok(Self { weight, row, delta, sizes })
    }

    pub(crate) fn lines(&self) -> Result<Lines<'_>> {
        let stored = match &self.weight {
            Place::Mapped(mapped) => mapped.stored(),
            Place::Tensor(storage, layout) => match (&**storage, layout.contiguous_offsets()) {
                (Storage::Cpu(CpuStorage::F32(v)), Some((start, end))) => Some(Stored::F32(&v[start..end])),
                (Storage::Cpu(CpuStorage::F16(v)), Some((start, end))) => Some(Stored::F16(&v[start..end])),
                (Storage::Cpu(CpuStorage::BF16(v)), Some((start, end))) => Some(Stored::Bf16(&v[start..end])),
                _ => None,
            },
        };
        let Some(stored) = stored else { candle_core::bail!("a weight must be f32, f16 or bf16, contiguous and on the CPU") };
        let delta = self.delta.as_ref().map(|(w1, w2)| (&w1[..], &w2[..]));
        Ok(Lines { stored, row: self.row, delta, sizes: self.sizes })
    }
}

/// Rows that are asked for before they are read: pieces of rows far apart are nothing that a CPU guesses.
const AHEAD: usize = 8;

impl Lines<'_> {
    /// Where the elements begin, and the bytes of one.
    fn place(&self) -> (*const i8, usize) {
        match &self.stored {
            Stored::F32(v) => (v.as_ptr().cast(), 4),
            Stored::F16(v) => (v.as_ptr().cast(), 2),
            Stored::Bf16(v) => (v.as_ptr().cast(), 2),
        }
    }

    fn prefetch(&self, at: usize, len: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            let (start, size) = self.place();
            for line in (0..len * size).step_by(64) {
                // SAFETY: a prefetch may name any address.
                unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(start.wrapping_add(at * size + line)) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (at, len);
    }

    /// Elements `from..from + len` of rows `first..first + rows`, to be asked for.
    pub(crate) fn ahead(&self, (first, rows): (usize, usize), (from, len): (usize, usize)) -> Ahead {
        let (start, size) = self.place();
        Ahead::rows(start.wrapping_add((first * self.row + from) * size), rows, len * size, self.row * size)
    }

    /// The elements themselves, where nothing is done to them on the way.
    pub(crate) fn plain(&self) -> Option<&[f32]> {
        match (&self.stored, self.delta) {
            (Stored::F32(v), None) => Some(v),
            _ => None,
        }
    }

    /// Elements `from..from + out.len()` of row `r`.
    pub(crate) fn fill(&self, r: usize, from: usize, out: &mut [f32]) {
        let at = r * self.row + from;
        self.prefetch(at + AHEAD * self.row, out.len());
        // Copied on the way where that is all that is done to it; what is narrower is widened first.
        let widened = |out: &mut [f32]| match &self.stored {
            Stored::F32(v) => Some(&v[at..at + out.len()]),
            Stored::F16(v) => {
                v[at..at + out.len()].convert_to_f32_slice(out);
                None
            }
            Stored::Bf16(v) => {
                widen_bf16(&v[at..at + out.len()], out);
                None
            }
        };
        let Some((w1, w2)) = self.delta else {
            if let Some(base) = widened(out) {
                out.copy_from_slice(base);
            }
            return;
        };
        let [b, c, inner] = self.sizes;
        let (w1, w2) = (&w1[r / c * b..][..b], &w2[r % c * inner..][..inner]);
        #[cfg(target_arch = "x86_64")]
        if capability() == Capability::Avx512 && !out.is_empty() {
            assert!(from + out.len() <= b * inner);
            let (start, to) = (&w1[from / inner..], out.as_mut_ptr());
            // SAFETY: the CPU has AVX-512; `out.len()` elements of the weight lie at `at`, and what `from` goes on from in w1 and w2 by the
            // assertion.
            unsafe {
                match &self.stored {
                    Stored::F32(v) => avx512::merge::<0>(v[at..at + out.len()].as_ptr().cast(), start, (w2, from % inner), to, out.len()),
                    Stored::F16(v) => avx512::merge::<1>(v[at..at + out.len()].as_ptr().cast(), start, (w2, from % inner), to, out.len()),
                    Stored::Bf16(v) => avx512::merge::<2>(v[at..at + out.len()].as_ptr().cast(), start, (w2, from % inner), to, out.len()),
                }
            }
            return;
        }
        let base = widened(out);
        simd(
            #[inline(always)]
            || {
                let (mut j, mut q, mut done) = (from / inner, from % inner, 0);
                while done < out.len() {
                    let run = (inner - q).min(out.len() - done);
                    let k = w1[j];
                    let (out, w2) = (&mut out[done..done + run], &w2[q..q + run]);
                    if let Some(base) = base {
                        for ((o, x), v) in out.iter_mut().zip(&base[done..done + run]).zip(w2) {
                            *o = x + k * v;
                        }
                    } else {
                        for (o, v) in out.iter_mut().zip(w2) {
                            *o += k * v;
                        }
                    }
                    done += run;
                    (j, q) = (j + 1, 0);
                }
            },
        );
    }
}

fn widen_bf16(from: &[bf16], to: &mut [f32]) {
    simd(
        #[inline(always)]
        || {
            for (t, f) in to.iter_mut().zip(from) {
                *t = f32::from_bits(u32::from(f.to_bits()) << 16);
            }
        },
    );
}

/// A weight that products on the CPU can read: as it is stored if that is f32, f16 or bf16.
pub(crate) fn stored(weight: Weight) -> Result<Weight> {
    match weight {
        Weight::Tensor(t) if !matches!(t.dtype(), DType::F32 | DType::F16 | DType::BF16) || !t.is_contiguous() => {
            Ok(widen(&t, DType::F32)?.into())
        }
        weight => Ok(weight),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::tests::numbers;
    use candle_core::Device;

    /// The elements as the definition gives them, to the last bit, whatever the CPU's instructions; runs of w2 that fill no vector.
    #[test]
    fn lines_are_the_weight_and_the_adapter() -> Result<()> {
        for (a, b, c, inner) in [(2, 3, 4, 5), (3, 2, 2, 16), (2, 4, 3, 37), (1, 8, 2, 40)] {
            let tensor = |n: usize, seed, shape: (usize, usize)| Tensor::from_vec(numbers(n, seed), shape, &Device::Cpu);
            let row = b * inner;
            let (w1, w2) = (tensor(a * b, 1, (a, b))?, tensor(c * inner, 2, (c, inner))?);
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let stored = tensor(a * c * row, 3, (a * c, row))?.to_dtype(dtype)?;
                let wide: Vec<f32> = stored.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                let (v1, v2): (Vec<f32>, Vec<f32>) = (w1.flatten_all()?.to_vec1()?, w2.flatten_all()?.to_vec1()?);
                let weight = Weight::from(&stored);
                for delta in [None, Some(Delta { w1: &w1, w2: &w2 })] {
                    let held = Held::new(&weight, delta)?;
                    let lines = held.lines()?;
                    for (r, from, len) in (0..a * c).flat_map(|r| [(r, 0, row), (r, 3, row - 4), (r, row - 1, 1)]) {
                        let mut out = vec![f32::NAN; len];
                        lines.fill(r, from, &mut out);
                        for (i, got) in (from..).zip(&out) {
                            let product = if delta.is_some() { v1[r / c * b + i / inner] * v2[r % c * inner + i % inner] } else { 0.0 };
                            let want = wide[r * row + i] + product;
                            assert_eq!(got.to_bits(), want.to_bits(), "{dtype:?} {delta:?} {r} {i}", delta = delta.is_some());
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
