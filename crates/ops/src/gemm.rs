//! Matrix products: blocks that fit the caches, packed and handed to the micro-kernels of `tile.rs`. Operands may be computed
//! while they are packed: patches of a picture, or a weight that is widened and has its adapter added on the way.
//!
//! # Determinism
//! Each element is summed along k in one order, in blocks whose size is fixed: the result does not depend on how the work is
//! dealt to threads. It does depend on the CPU's instructions.

use crate::ahead::Ahead;
use crate::pack::{Operand, SLACK, Side, column_strips, pack, row_strips};
use crate::tile::{Kernel, Left, Start, Tile, has_bf16, tile};
use crate::view::{SharedMut, reuse};
use rayon::prelude::*;
use std::cell::{Cell, RefCell};

/// Steps along k in a block: a strip of columns is then 32 KiB, the first cache (with AVX2 half of that).
const KC: usize = 256;

/// The same for a kernel: longer with AMX, which multiplies so fast that what is done once for a block weighs more.
fn depth(kernel: Kernel) -> usize {
    if kernel.is_amx() { 4 * KC } else { KC }
}

/// Columns and rows of a block, so that both packed operands fit the second cache: 1 MiB where there is AVX-512, 512 KiB elsewhere.
fn block(kernel: Kernel) -> (usize, usize) {
    if kernel.avx512() { (576, 196) } else { (256, 192) }
}

/// Rows of a left operand up to which the sides may change places: the right one is read once for every block of them.
const SWAP_ROWS: usize = 128;

/// Where a product goes: places `offset + i * rs + j` of a shared slice, or, `turned`, `offset + j * rs + i`.
#[derive(Clone, Copy)]
pub(crate) struct Dst {
    pub data: SharedMut,
    pub offset: usize,
    pub rs: usize,
    pub turned: bool,
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Begin<'a> {
    Zero,
    /// What is there.
    Add,
    /// A number for each row.
    Rows(&'a [f32]),
    /// A number for each column.
    Columns(&'a [f32]),
}

/// One thread, for use inside parallel loops; or all of them.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Threads {
    One,
    All,
}

thread_local! {
    static BF16: Cell<bool> = const { Cell::new(false) };
    static BUFFERS: RefCell<Buffers> = const { RefCell::new(Buffers { packed: Vec::new(), scratch: Vec::new() }) };
}

struct Buffers {
    packed: Vec<f32>,
    scratch: Vec<f32>,
}

/// Runs `f` with the operands of matrix products, convolutions and attention rounded to bf16 where this CPU multiplies it (sums
/// stay f32), or, if `on` is false or it does not, in f32 as ever. Holds for what `f` calls on this thread.
pub fn with_bf16<R>(on: bool, f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            BF16.set(self.0);
        }
    }
    let _restore = Restore(BF16.replace(on && has_bf16()));
    f()
}

/// Whether the calling thread's products are rounded to bf16.
pub(crate) fn bf16() -> bool {
    BF16.get()
}

/// The micro-kernel that the calling thread's products take. Parallel loops ask before they start.
pub(crate) fn kernel() -> Kernel {
    #[cfg(target_arch = "x86_64")]
    if BF16.get() {
        return Kernel::bf16();
    }
    Kernel::f32()
}

/// `dst (m, n) = begin + scale * a (m, k) * b (k, n)`.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Operand<'a>,
    pub b: Operand<'a>,
    pub dst: Dst,
    pub begin: Begin<'a>,
    pub scale: f32,
    pub kernel: Kernel,
}

impl Product<'_> {
    /// Whether the left operand goes to the micro-kernel in lines along k, unpacked.
    fn in_lines(&self) -> bool {
        self.kernel.in_place() && (matches!(self.a, Operand::Plain { along: 1, .. }) || self.a.makes_lines())
    }

    /// Computes it.
    ///
    /// # Safety
    /// No other thread touches the places of `dst` meanwhile.
    pub(crate) unsafe fn run(&self, threads: Threads) {
        let tasks = self.tasks(threads);
        if let [(m, n)] = tasks[..] {
            // SAFETY: the caller's promise.
            return unsafe { self.part(m, n) };
        }
        // SAFETY: the parts are disjoint.
        tasks.into_par_iter().with_max_len(1).for_each(|(m, n)| unsafe { self.part(m, n) });
    }

    /// Ranges of rows and columns for threads to take, whole tiles each.
    pub(crate) fn tasks(&self, threads: Threads) -> Vec<((usize, usize), (usize, usize))> {
        if self.m == 0 || self.n == 0 {
            return Vec::new();
        }
        let work = self.m * self.n * self.k;
        // Below a thread's share of 2^18 multiply-adds, waking it costs more than it gives.
        let most = match threads {
            Threads::One => 1,
            Threads::All => (work >> 22).clamp(1, rayon::current_num_threads() * (work >> 24).clamp(1, 4)),
        };
        let (rows, columns) = (self.m.div_ceil(self.kernel.rows()), self.n.div_ceil(self.kernel.lanes()));
        // Each part packs its own operands: of all ways to deal, the one that packs least.
        let ways = (1..=most).map(|pm| (pm.min(rows), (most / pm).clamp(1, columns)));
        let rows_cost = if self.in_lines() && matches!(self.a, Operand::Plain { .. }) { 8 } else { 80 };
        let cost = |&(pm, pn): &(usize, usize)| {
            let uneven = rows.div_ceil(pm) * columns.div_ceil(pn) * self.kernel.rows() * self.kernel.lanes();
            uneven * 16 + self.m.div_ceil(pm) * rows_cost + self.n.div_ceil(pn) * 80
        };
        let (pm, pn) = ways.min_by_key(cost).unwrap_or((1, 1));
        let cut = |len: usize, unit: usize, units: usize, parts: usize, p: usize| {
            ((units * p / parts * unit).min(len), (units * (p + 1) / parts * unit).min(len))
        };
        let deal = |p: usize| {
            let (i, j) = (p % pm, p / pm);
            (cut(self.m, self.kernel.rows(), rows, pm, i), cut(self.n, self.kernel.lanes(), columns, pn, j))
        };
        (0..pm * pn).map(deal).filter(|((a, b), (c, d))| a < b && c < d).collect()
    }

    /// The part of the result in `rows` and `columns` (start, end).
    ///
    /// # Safety
    /// No other thread touches these places of `dst` meanwhile.
    pub(crate) unsafe fn part(&self, rows: (usize, usize), columns: (usize, usize)) {
        let (kernel, k, dst) = (self.kernel, self.k, self.dst);
        self.a.check(self.m, k);
        self.b.check(self.n, k);
        let last = if dst.turned { (self.n - 1) * dst.rs + self.m } else { (self.m - 1) * dst.rs + self.n };
        let c = dst.data.ptr(dst.offset, last);
        match self.begin {
            Begin::Rows(v) => assert_eq!(v.len(), self.m),
            Begin::Columns(v) => assert_eq!(v.len(), self.n),
            Begin::Zero | Begin::Add => {}
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: this kernel is chosen only where the CPU has AMX.
        let _tiles = kernel.is_amx().then(|| unsafe { crate::amx::Tiles::set_up() });
        let in_lines = self.in_lines();
        let (nc_most, mc_most) = block(kernel);
        let (mc, nc, kc) = ((rows.1 - rows.0).min(mc_most), (columns.1 - columns.0).min(nc_most), k.clamp(1, depth(kernel)));
        BUFFERS.with_borrow_mut(|Buffers { packed, scratch }| {
            let kc_padded = kc.next_multiple_of(kernel.per_step().max(2));
            let a_len = kc_padded * if in_lines { kernel.rows() } else { mc.next_multiple_of(kernel.rows()) } + SLACK;
            let b_len = kc_padded * nc.next_multiple_of(kernel.lanes()) + SLACK;
            let (b_buffer, a_buffer) = reuse(packed, b_len.next_multiple_of(16) + a_len).split_at_mut(b_len.next_multiple_of(16));
            for j0 in (columns.0..columns.1).step_by(nc_most) {
                let nc = nc_most.min(columns.1 - j0);
                for k0 in (0..k.max(1)).step_by(depth(kernel)) {
                    let kc = depth(kernel).min(k - k0);
                    let steps = kc.div_ceil(kernel.per_step());
                    let padded = steps * kernel.per_step();
                    pack(kernel, Side::Right, &self.b, column_strips(kernel, nc), j0, (k0, kc), b_buffer, scratch);
                    // What is read next is asked for while this block is computed: the left operand's next strip, and the next block.
                    let (j_next, k_next) = if k0 + kc < k { (j0, k0 + kc) } else { (j0 + nc, 0) };
                    let mut next_block = match columns.1.saturating_sub(j_next) {
                        0 => Ahead::none(),
                        left => self.b.ahead((j_next, nc_most.min(left)), (k_next, depth(kernel).min(k - k_next))),
                    };
                    for i0 in (rows.0..rows.1).step_by(mc_most) {
                        let mc = mc_most.min(rows.1 - i0);
                        if !in_lines {
                            pack(kernel, Side::Left, &self.a, row_strips(kernel, mc), i0, (k0, kc), a_buffer, scratch);
                        }
                        let mut a_at = 0;
                        for r in row_strips(kernel, mc) {
                            let first = i0 + r.start;
                            let (a, left) = match &self.a {
                                Operand::Plain { data, across, .. } if in_lines && kc > 0 => {
                                    (data[first * across + k0..].as_ptr(), Left::Lines(*across))
                                }
                                made if in_lines => {
                                    for (i, to) in a_buffer.chunks_exact_mut(kc.max(1)).take(r.len).enumerate() {
                                        made.line(first + i, k0, to);
                                    }
                                    (a_buffer.as_ptr(), Left::Lines(kc))
                                }
                                _ => (a_buffer[a_at..].as_ptr(), Left::Packed(r.width)),
                            };
                            let mut next_strip = match rows.1 - (first + r.len) {
                                left if in_lines && left > 0 => self.a.ahead((first + r.len, kernel.rows().min(left)), (k0, kc)),
                                _ => Ahead::none(),
                            };
                            let mut b_at = 0;
                            for s in column_strips(kernel, nc) {
                                let start = match self.begin {
                                    Begin::Add => Start::Add,
                                    _ if k0 > 0 => Start::Add,
                                    Begin::Zero => Start::Zero,
                                    Begin::Rows(v) => Start::Rows(v[first..].as_ptr()),
                                    Begin::Columns(v) => Start::Columns(v[j0 + s.start..].as_ptr()),
                                };
                                let t = Tile {
                                    rows: r.len,
                                    columns: s.len,
                                    lanes: s.width,
                                    steps,
                                    left,
                                    rs: dst.rs,
                                    turned: dst.turned,
                                    start,
                                    scale: self.scale,
                                };
                                let ahead = if next_strip.done() { &mut next_block } else { &mut next_strip };
                                let (i, j) = (first, j0 + s.start);
                                // SAFETY: the packed strips, and lines by the check above, hold what the tile reads; its places lie inside
                                // `dst` by the check above and are exclusive by the caller's promise.
                                unsafe {
                                    let c = c.add(if dst.turned { j * dst.rs + i } else { i * dst.rs + j });
                                    tile(kernel, t, a, b_buffer[b_at..].as_ptr(), c, ahead);
                                }
                                b_at += padded * s.width;
                            }
                            a_at += padded * r.width;
                        }
                    }
                }
            }
        });
    }
}

/// `a (m, k) * b (k, n)`, row-major, on all threads.
pub(crate) fn gemm(m: usize, n: usize, k: usize, a: Operand, b: Operand) -> Vec<f32> {
    gemm_from(m, n, k, a, b, None)
}

/// The same plus a bias for each column. Where the right operand has more lines than the left one, the sides change places and the
/// result is turned: the larger operand is then read as it lies, and the smaller one packed.
pub(crate) fn gemm_from(m: usize, n: usize, k: usize, a: Operand, b: Operand, bias: Option<&[f32]>) -> Vec<f32> {
    let kernel = kernel();
    let mut out = Vec::new();
    let data = SharedMut::for_vec(&mut out, m * n);
    let swap = n > m && m <= SWAP_ROWS && kernel.in_place() && (matches!(b, Operand::Plain { along: 1, .. }) || b.makes_lines());
    let dst = Dst { data, offset: 0, rs: n, turned: swap };
    let product = if swap {
        Product { m: n, n: m, k, a: b, b: a, dst, begin: bias.map_or(Begin::Zero, Begin::Rows), scale: 1.0, kernel }
    } else {
        Product { m, n, k, a, b, dst, begin: bias.map_or(Begin::Zero, Begin::Columns), scale: 1.0, kernel }
    };
    // SAFETY: `out` is borrowed exclusively for the call, which writes every element.
    unsafe {
        product.run(Threads::All);
        out.set_len(m * n);
    }
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Numbers between -1 and 1.
    pub(crate) fn numbers(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    fn plain(m: usize, n: usize, k: usize, a: impl Fn(usize, usize) -> f32, b: impl Fn(usize, usize) -> f32) -> Vec<f64> {
        (0..m * n).map(|at| (0..k).map(|kk| a(at / n, kk) as f64 * b(kk, at % n) as f64).sum()).collect()
    }

    fn kernels() -> Vec<Kernel> {
        let mut all = Kernel::all();
        #[cfg(target_arch = "x86_64")]
        if has_bf16() {
            all.push(Kernel::Avx512Bf16);
            if Kernel::bf16() != Kernel::Avx512Bf16 {
                all.push(Kernel::bf16());
            }
        }
        all
    }

    /// Numbers that bf16 holds exactly, so that its kernel is measured and not its rounding.
    fn coarse(v: Vec<f32>) -> Vec<f32> {
        v.into_iter().map(|x| f32::from_bits(x.to_bits() & 0xffff_0000)).collect()
    }

    #[test]
    fn products_equal_the_plain_sum_in_every_layout() {
        for (m, n, k) in [(1, 1, 1), (14, 32, 256), (15, 33, 257), (77, 80, 19), (200, 400, 300), (3, 500, 40), (31, 16, 515)] {
            let (a, b) = (coarse(numbers(m * k, 1)), coarse(numbers(k * n, 2)));
            let wants = plain(m, n, k, |i, kk| a[i * k + kk], |kk, j| b[kk * n + j]);
            let at = |kk: usize, i: usize| a[i * k + kk];
            let a_t: Vec<f32> = (0..k * m).map(|p| at(p / m, p % m)).collect();
            let b_t: Vec<f32> = (0..k * n).map(|p| b[p % k * n + p / k]).collect();
            let a_fill = |i: usize, kk: usize, out: &mut [f32]| out.copy_from_slice(&a[i * k + kk..][..out.len()]);
            let b_fill = |kk: usize, j: usize, out: &mut [f32]| out.copy_from_slice(&b[kk * n + j..][..out.len()]);
            let lefts = [Operand::rows(&a, k), Operand::columns(&a_t, m), Operand::AlongK(&a_fill)];
            let (row_bias, column_bias) = (numbers(m, 5), numbers(n, 6));
            let rights = [Operand::columns(&b, n), Operand::rows(&b_t, k), Operand::Across(&b_fill)];
            for kernel in kernels() {
                for (l, left) in lefts.iter().enumerate() {
                    for (r, right) in rights.iter().enumerate() {
                        for (begin, turned) in (0..4).flat_map(|begin| [(begin, false), (begin, true)]) {
                            let mut out = vec![1f32; m * n];
                            let dst = Dst { data: SharedMut::new(&mut out), offset: 0, rs: if turned { m } else { n }, turned };
                            let begins = [Begin::Zero, Begin::Add, Begin::Rows(&row_bias), Begin::Columns(&column_bias)];
                            let product = Product { m, n, k, a: *left, b: *right, dst, begin: begins[begin], scale: 0.5, kernel };
                            // SAFETY: `out` is this test's own.
                            unsafe { product.run(Threads::All) };
                            for (at, want) in wants.iter().enumerate() {
                                let (i, j) = (at / n, at % n);
                                let got = out[if turned { j * m + i } else { at }];
                                let first = [0.0, 1.0, row_bias[i], column_bias[j]][begin];
                                let want = first as f64 + 0.5 * want;
                                // Sums of up to 515 products of order one half, in f32.
                                assert!(
                                    (got as f64 - want).abs() < 1e-6 * (k as f64 + 4.0),
                                    "{kernel:?} {l} {r} {begin} {turned} {:?}: {got}, {want}",
                                    (m, n, k)
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() -> Result<(), rayon::ThreadPoolBuildError> {
        let (m, n, k) = (160, 1000, 700);
        let (a, b) = (numbers(m * k, 3), numbers(k * n, 4));
        let mut results = Vec::new();
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            results.push(pool.install(|| gemm(m, n, k, Operand::rows(&a, k), Operand::columns(&b, n))));
        }
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
        Ok(())
    }
}
