#!/bin/sh
# Checks a machine with a GPU and writes a report that can be pasted into an issue: whether the GPU computes what the CPU computes,
# how fast a step is, and, from a checkout with a compiler, whether NCCL does what it must between two GPUs.
#
#   scripts/check-gpu.sh [path of a lokr built with CUDA] [recipe.toml] [report.txt]
set -eu
lokr=${1:-lokr}
recipe=${2:-}
report=${3:-gpu-report.txt}
{
    nvidia-smi --query-gpu=name,memory.total,driver_version,pcie.link.gen.max,pcie.link.width.max --format=csv 2>&1 || echo "nvidia-smi is not here"
    "$lokr" --version
    if "$lokr" check-gpu ${recipe:+--config "$recipe"}; then echo "check-gpu: good"; else echo "check-gpu: FAILED"; fi
    gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
    if [ "$gpus" -lt 2 ]; then
        echo "NCCL: skipped, $gpus GPUs here and two are needed"
    elif [ -f "$(dirname "$0")/../Cargo.toml" ] && command -v cargo >/dev/null; then
        cd "$(dirname "$0")/.."
        if cargo test --quiet --release -p dist --features nccl --test nccl -- --nocapture; then echo "NCCL: good"; else echo "NCCL: FAILED"; fi
    else
        echo "NCCL: skipped, its tests need a checkout and cargo"
    fi
} 2>&1 | tee "$report"
echo "written to $report"
! grep -q FAILED "$report"
