// For build scripts: compiles kernels to PTX for the GPUs that the crates' src/cuda.rs choose from.

use std::path::PathBuf;
use std::process::Command;

/// With the feature `cuda`: `kernels/NAME.cu` to `NAME.sm_ARCH.ptx` in OUT_DIR, for each name and architecture. Without it nothing is done.
pub fn compile(names: &[&str], arguments: &[&str]) {
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=../../tools/ptx.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-env-changed=NVCC");
    let nvcc = std::env::var("NVCC").unwrap_or_else(|_| "nvcc".into());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for name in names {
        for arch in ["86", "89", "90"] {
            let (source, ptx) = (format!("kernels/{name}.cu"), out.join(format!("{name}.sm_{arch}.ptx")));
            let mut command = Command::new(&nvcc);
            command.args(["--ptx", "-O3", "-std=c++17", &format!("-arch=compute_{arch}")]).args(arguments).args([&source, "-o"]).arg(&ptx);
            let status = command.status();
            let made = status.as_ref().is_ok_and(std::process::ExitStatus::success);
            assert!(made, "`{nvcc}` did not compile {source} ({status:?}): scripts/cuda-toolkit.sh installs a compiler");
        }
    }
}
