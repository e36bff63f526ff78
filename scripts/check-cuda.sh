#!/bin/sh
# Checks the CUDA configuration on a machine without a GPU: lints it, builds it whole, and runs it on stand-ins for NVIDIA's
# libraries (tools/dry-gpu). Says so where it skips. The first run compiles candle's kernels and takes about twelve minutes of two cores;
# later ones take what changed.
#
#   scripts/check-cuda.sh [lint] [build] [test]        all three if none is named
#
# Everything it makes stays outside the clone: LOKR_CUDA_TARGET, by default a folder of the user's cache.
set -eu
cd "$(dirname "$0")/.."
cache=${XDG_CACHE_HOME:-$HOME/.cache}/lokr
target=${LOKR_CUDA_TARGET:-$cache/cuda-target}
features=cuda,cudnn,nccl
# One selection for builds and tests: another one unifies the dependencies' features differently, and candle is compiled again.
build="--quiet --release -p cli -p trainer -p dist -p end-to-end --features cli/cuda,cli/cudnn,cli/nccl"
what=${*:-lint build test}

if ! command -v python3 >/dev/null || ! command -v g++ >/dev/null; then
    echo "skipped: the CUDA configuration was not checked; python3 (for the compiler's wheels) and g++ are needed"
    exit 0
fi
if [ -z "${CUDA_HOME:-}" ]; then
    if ! settings=$(scripts/cuda-toolkit.sh); then
        echo "skipped: the CUDA configuration was not checked; the CUDA compiler could not be installed"
        exit 0
    fi
    eval "$settings"
fi
export CARGO_TARGET_DIR="$target" CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-86}"

# The stand-ins are also what the linker sees. They are rebuilt where their sources, ours or candle's kernels are newer.
dry=$target/dry-gpu
kernels=
candle=$(cargo metadata --format-version 1 --features $features --manifest-path crates/cli/Cargo.toml |
    python3 -c 'import json,sys; print(next(p["manifest_path"] for p in json.load(sys.stdin)["packages"] if p["name"]=="candle-kernels"))')
for name in affine binary cast conv fill indexing reduce ternary unary; do kernels="$kernels $(dirname "$candle")/src/$name.cu"; done
for kernel in crates/optim/kernels/*.cu crates/ops/kernels/*.cu; do kernels="$kernels $PWD/$kernel"; done
if [ ! -e "$dry/libdrykernels.so" ] || [ -n "$(find tools/dry-gpu crates/optim/kernels crates/ops/kernels "$candle" -newer "$dry/libdrykernels.so" -type f)" ]; then
    tools/dry-gpu/build.sh "$dry" $kernels
fi
export LIBRARY_PATH="$dry${LIBRARY_PATH:+:$LIBRARY_PATH}"

for step in $what; do
    case $step in
    lint) cargo clippy --quiet --release --all-targets -p cli -p trainer -p ops -p optim -p dist --features cli/cuda,cli/cudnn,cli/nccl -- -D warnings ;;
    build) cargo build $build --bin lokr ;;
    test)
        export LD_LIBRARY_PATH="$dry${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" LOKR_DRY_GPU="$dry"
        # The ten recorded steps, by the CUDA code path; NCCL's contract in two and four ranks.
        DRY_GPU_COUNT=4 cargo test $build --test train_step_golden --test nccl
        # The program: losses, counts, errors, two processes.
        DRY_GPU_COUNT=0 cargo test $build --test cli dry_gpu
        ;;
    *) echo "there is no step $step: lint, build, test" && exit 2 ;;
    esac
    echo "CUDA configuration: $step done"
done
