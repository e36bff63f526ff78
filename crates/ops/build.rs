//! Compiles the kernels of the GPU's operations.

#[path = "../../tools/ptx.rs"]
mod ptx;

fn main() {
    ptx::compile(&["attention", "norm", "pointwise"], &[]);
}
