//! Asking for memory before it is read. A layer's weight comes from main memory, and no CPU guesses where the next block of a matrix begins; the
//! micro-kernels ask for it while they compute, on x86.

#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

/// Cache lines that are asked for in a row, one with each step of a micro-kernel.
pub(crate) const RUN: usize = 64;

/// A cache line.
const LINE: usize = 64;

/// Memory that will be read next: rows of so many runs, some bytes apart.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    row: *const i8,
    stride: usize,
    /// Runs in a row, and which one comes next.
    runs: usize,
    run: usize,
    /// Rows that are left.
    rows: usize,
}

impl Ahead {
    /// Nothing.
    pub(crate) fn none() -> Self {
        Self { row: std::ptr::null(), stride: 0, runs: 0, run: 0, rows: 0 }
    }

    /// `rows` rows of `len` elements, `stride` elements apart.
    pub(crate) fn rows<T>(first: *const T, rows: usize, len: usize, stride: usize) -> Self {
        let runs = (len * size_of::<T>()).div_ceil(LINE * RUN);
        Self { row: first.cast(), stride: stride * size_of::<T>(), runs, run: 0, rows: if runs == 0 { 0 } else { rows } }
    }

    /// Whether everything was asked for.
    pub(crate) fn done(&self) -> bool {
        self.rows == 0
    }

    /// Where the next run starts; `used` if there is none, a place of the program's memory (asking for others takes long).
    #[inline(always)]
    pub(crate) fn next_run(&mut self, used: *const f32) -> *const i8 {
        if self.rows == 0 {
            return used.cast();
        }
        let at = self.row.wrapping_add(self.run * LINE * RUN);
        self.run += 1;
        if self.run == self.runs {
            (self.run, self.row, self.rows) = (0, self.row.wrapping_add(self.stride), self.rows - 1);
        }
        at
    }
}

/// Asks for line `i` of a run. Not the intrinsic: for the compiler that touches memory, and it would keep a tile's sums there.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn ask(run: *const i8, i: usize) {
    let line = run.addr().wrapping_add(i * LINE);
    // SAFETY: a prefetch may name any address, and changes nothing that a program sees.
    unsafe { std::arch::asm!("prefetcht1 [{}]", in(reg) line, options(nomem, nostack, preserves_flags)) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_go_row_by_row_and_end() {
        let place = |at: *const i8, base: *const f32| at.addr() - base.addr();
        let data = [0f32; 1];
        let (base, other) = (data.as_ptr(), std::ptr::null());
        // Rows of 1,500 numbers are 6,000 bytes: two runs of 4 KiB.
        let mut ahead = Ahead::rows(base, 2, 1500, 2000);
        let at: Vec<usize> = (0..4).map(|_| place(ahead.next_run(other), base)).collect();
        assert_eq!(at, [0, 4096, 8000, 12096]);
        assert!(ahead.done() && ahead.next_run(other).is_null());
        assert!(Ahead::rows(base, 3, 0, 8).done(), "rows of nothing");
    }
}
