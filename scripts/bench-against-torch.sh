#!/bin/sh
# Times our training step and single ops against PyTorch on the CPU, alternately, and prints the ratio of the medians.
#
#   scripts/bench-against-torch.sh step --config mid [--against bypass,default,bf16-bypass] [--rounds 7] [--checkpointing]
#   scripts/bench-against-torch.sh ops [--only conv] [--rounds 7]
#
# PyTorch is installed once (about 3 GB) into LOKR_TORCH_VENV, by default a folder of the user's cache. Run it on an
# otherwise idle machine; see docs/benchmarks.md.
set -eu
cd "$(dirname "$0")/.."
what=${1:?step or ops}
venv=${LOKR_TORCH_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/lokr/torch-venv}

if ! "$venv/bin/python" -c 'import bitsandbytes, lycoris, torch' 2>/dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet torch==2.13.0 lycoris-lora==4.1.3 bitsandbytes==0.50.2 numpy
fi

cargo build --release --quiet -p benches --bins
target=${CARGO_TARGET_DIR:-target}
# The first call writes the model; that must not count as the first measurement.
if [ "$what" = step ]; then
    "$target/release/step" --config mid --steps 1 >/dev/null
fi
export PYTHONDONTWRITEBYTECODE=1
exec "$venv/bin/python" benches/torch/compare.py "$@" --ours "$target/release/$what"
