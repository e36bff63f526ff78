//! Asking for memory before it is read. A layer's weight comes from main memory, and no CPU guesses where the next block of a matrix begins; the
//! micro-kernels ask for it while they compute, one cache line with each step, on x86.

#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

/// A cache line.
pub(crate) const LINE: usize = 64;

/// Memory that will be read next: rows of so many cache lines, some bytes apart.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    next: Lines,
    /// Lines that are left, of all rows.
    left: usize,
}

/// One cache line after the other, row by row, without end.
#[derive(Clone, Copy)]
pub(crate) struct Lines {
    /// Address of the next line.
    pub at: usize,
    /// Lines that are left of its row, that one included, and lines in a row.
    pub left: usize,
    pub row: usize,
    /// From the line behind a row's last one to the next row.
    pub turn: usize,
}

impl Lines {
    /// The address of the next line.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> usize {
        let at = self.at;
        (self.at, self.left) = (at.wrapping_add(LINE), self.left - 1);
        if self.left == 0 {
            (self.at, self.left) = (self.at.wrapping_add(self.turn), self.row);
        }
        at
    }
}

impl Ahead {
    /// Nothing.
    pub(crate) fn none() -> Self {
        Self { next: Lines { at: 0, left: 1, row: 1, turn: 0 }, left: 0 }
    }

    /// `rows` rows of `len` elements, `stride` elements apart.
    pub(crate) fn rows<T>(first: *const T, rows: usize, len: usize, stride: usize) -> Self {
        if len == 0 {
            return Self::none();
        }
        let (start, len, stride) = (first.addr(), len * size_of::<T>(), stride * size_of::<T>());
        let row = (start % LINE + len).div_ceil(LINE);
        Self { next: Lines { at: start, left: row, row, turn: stride.wrapping_sub(row * LINE) }, left: rows * row }
    }

    /// Whether everything was asked for.
    pub(crate) fn done(&self) -> bool {
        self.left == 0
    }

    /// The lines for some steps, which may go a little beyond the end. If there is none, those from `used` on, a place that the tile reads:
    /// asking for memory that the program has not takes long.
    #[inline(always)]
    pub(crate) fn lines(&self, used: *const f32) -> Lines {
        if self.done() { Lines { at: used.addr(), left: 1, row: 1, turn: 0 } } else { self.next }
    }

    /// Goes on behind `steps` of these lines.
    #[inline(always)]
    pub(crate) fn took(&mut self, lines: Lines, steps: usize) {
        self.left = self.left.saturating_sub(steps);
        self.next = lines;
    }
}

/// Asks for the next line. Not the intrinsic: for the compiler that touches memory, and it would keep a tile's sums there.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn ask(lines: &mut Lines) {
    let line = lines.next();
    // SAFETY: a prefetch may name any address, and changes nothing that a program sees.
    unsafe { std::arch::asm!("prefetcht1 [{}]", in(reg) line, options(nomem, nostack, preserves_flags)) };
}

/// The same in the assembly of a kernel, which has the fields of [`Lines`] in the registers `at`, `left`, `row` and `turn`, the constant
/// `line` for [`LINE`], and a register `t` to spare.
#[cfg(target_arch = "x86_64")]
macro_rules! ask_next {
    () => {
        "prefetcht1 [{at}]\nxor {t:e}, {t:e}\ndec {left}\ncmovz {t}, {turn}\ncmovz {left}, {row}\nlea {at}, [{at} + {t} + {line}]"
    };
}
#[cfg(target_arch = "x86_64")]
pub(crate) use ask_next;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tile::{Kernel, Left, Start, Tile, tile};

    /// The assembly of the kernels goes on as [`Lines::next`] does.
    #[test]
    fn kernels_ask_for_one_line_with_each_step() {
        let (a, b) = (vec![1f32; 14 * 100], vec![1f32; 32 * 100]);
        for kernel in Kernel::all().into_iter().filter(|k| *k != Kernel::Portable) {
            for (rows, lanes, left) in [(kernel.rows(), kernel.lanes(), Left::Packed(14)), (3, kernel.narrow(), Left::Lines(100))] {
                // Rows of three lines, and a fourth begun, after a first tile of seven steps and a second one.
                let mut ahead = Ahead::rows(a.as_ptr(), 9, 40, 60);
                let mut lines = ahead.lines(a.as_ptr());
                for steps in [7, 0, 13] {
                    let start = Start::Zero;
                    let t = Tile { rows, columns: lanes, lanes, steps, left, rs: lanes, turned: false, start, scale: 1.0 };
                    let mut c = vec![0f32; rows * lanes];
                    // SAFETY: a and b hold fourteen rows and two vectors for each step, c the tile.
                    unsafe { tile(kernel, t, a.as_ptr(), b.as_ptr(), c.as_mut_ptr(), &mut ahead) };
                    assert!(c.iter().all(|v| *v == steps as f32), "{kernel:?} {c:?}");
                    (0..steps).for_each(|_| _ = lines.next());
                    let now = ahead.lines(a.as_ptr());
                    assert_eq!((now.at, now.left), (lines.at, lines.left), "{kernel:?} after {steps} steps");
                }
            }
        }
    }

    #[test]
    fn lines_go_row_by_row_and_end() {
        let base = std::ptr::without_provenance::<f32>(4096 + 32);
        // Rows of 40 numbers are 160 bytes, which from the middle of a line on reach into a third one; the next begins 800 bytes on.
        let mut ahead = Ahead::rows(base, 2, 40, 200);
        let mut asked = Vec::new();
        for steps in [2, 4] {
            let mut lines = ahead.lines(base);
            asked.extend((0..steps).map(|_| lines.next() - 4096));
            ahead.took(lines, steps);
        }
        assert_eq!(asked, [32, 96, 160, 832, 896, 960]);
        assert!(ahead.done() && Ahead::rows(base, 3, 0, 8).done(), "the end, and rows of nothing");
        let mut lines = ahead.lines(base);
        assert_eq!([lines.next(), lines.next()], [4128, 4192], "what is used anyway");
    }
}
