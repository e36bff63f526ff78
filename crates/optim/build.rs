//! Compiles the optimizer's kernels. Products and sums are not contracted: the results are those of the CPU, bit for bit.

#[path = "../../tools/ptx.rs"]
mod ptx;

fn main() {
    ptx::compile(&["optim"], &["-fmad=false"]);
}
