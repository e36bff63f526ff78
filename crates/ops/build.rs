//! With the feature `cuda`: compiles the kernels to PTX for the GPUs that src/cuda.rs chooses from. Without it nothing is done.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=kernels");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-env-changed=NVCC");
    let nvcc = std::env::var("NVCC").unwrap_or_else(|_| "nvcc".into());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for name in ["attention", "norm", "pointwise"] {
        for arch in ["86", "89", "90"] {
            let ptx = out.join(format!("{name}.sm_{arch}.ptx"));
            let source = format!("kernels/{name}.cu");
            let status = Command::new(&nvcc)
                .args(["--ptx", "-O3", "-std=c++17", &format!("-arch=compute_{arch}"), &source, "-o"])
                .arg(&ptx)
                .status();
            let made = status.as_ref().is_ok_and(std::process::ExitStatus::success);
            assert!(made, "`{nvcc}` did not compile {source} ({status:?}): scripts/cuda-toolkit.sh installs a compiler");
        }
    }
}
