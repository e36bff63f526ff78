//! Matrix products on slices with any strides, by the crate `gemm`.

use crate::view::SharedMut;
use gemm::Parallelism;

/// A matrix operand: elements and the strides of rows and columns.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    pub data: &'a [f32],
    pub rs: usize,
    pub cs: usize,
}

impl<'a> Mat<'a> {
    /// Row-major with `cols` columns.
    pub(crate) fn rows(data: &'a [f32], cols: usize) -> Self {
        Self { data, rs: cols, cs: 1 }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        Self { data: self.data, rs: self.cs, cs: self.rs }
    }

    fn check(&self, m: usize, n: usize) {
        assert!(m == 0 || n == 0 || (m - 1) * self.rs + (n - 1) * self.cs < self.data.len());
    }
}

/// Where a product goes: places `offset + i*rs + j*cs` of a shared slice.
#[derive(Clone, Copy)]
pub(crate) struct Dst {
    pub data: SharedMut,
    pub offset: usize,
    pub rs: usize,
    pub cs: usize,
}

/// One thread, for use inside parallel loops; or all of them.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Threads {
    One,
    All,
}

/// `dst (m, n) = [dst +] scale * a (m, k) * b (k, n)`.
///
/// # Safety
/// No other thread touches the places of `dst` meanwhile.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn gemm_into(m: usize, n: usize, k: usize, dst: Dst, add: bool, a: Mat, b: Mat, scale: f32, threads: Threads) {
    if m == 0 || n == 0 {
        return;
    }
    a.check(m, k);
    b.check(k, n);
    let ptr = dst.data.ptr(dst.offset, (m - 1) * dst.rs + (n - 1) * dst.cs + 1);
    // Below this many multiply-adds, waking another thread costs more than it gives.
    let small = m * n * k < 1 << 19;
    let parallelism = match threads {
        Threads::All if !small => Parallelism::Rayon(0),
        _ => Parallelism::None,
    };
    // SAFETY: all three operands lie inside their slices by the checks above; `dst` is exclusive by the caller's promise
    // and cannot overlap `a` or `b`, which are shared borrows.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            ptr,
            dst.cs as isize,
            dst.rs as isize,
            add,
            a.data.as_ptr(),
            a.cs as isize,
            a.rs as isize,
            b.data.as_ptr(),
            b.cs as isize,
            b.rs as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `out (m, n), row-major = [out +] a (m, k) * b (k, n)`, on all threads.
pub(crate) fn gemm(m: usize, n: usize, k: usize, out: &mut [f32], add: bool, a: Mat, b: Mat) {
    let dst = Dst { data: SharedMut::new(out), offset: 0, rs: n, cs: 1 };
    // SAFETY: `out` is borrowed exclusively for the call.
    unsafe { gemm_into(m, n, k, dst, add, a, b, 1.0, Threads::All) }
}
