#!/bin/sh
# Times our training step, single ops and the loader of pictures against PyTorch on the CPU, alternately, and prints the ratio of
# the medians.
#
#   scripts/bench-against-torch.sh step --config mid [--against bypass,default,bf16-bypass] [--compute bf16] [--rounds 7] [--checkpointing]
#   scripts/bench-against-torch.sh ops [--only conv] [--rounds 7]
#   scripts/bench-against-torch.sh loader [--threads 2] [--rounds 7]
#
# PyTorch is installed once (about 5 GB with what it brings) into LOKR_TORCH_VENV, by default a folder of the user's cache. The
# loader's pictures are drawn once into LOKR_BENCH_PICTURES, by default target/bench-pictures. Run it on an otherwise idle machine;
# see docs/benchmarks.md.
set -eu
cd "$(dirname "$0")/.."
what=${1:?step, ops or loader}
venv=${LOKR_TORCH_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/lokr/torch-venv}

if ! "$venv/bin/python" -c 'import bitsandbytes, lycoris, PIL, torch' 2>/dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet torch==2.13.0 lycoris-lora==4.1.3 bitsandbytes==0.50.2 pillow==13.0.0 numpy
fi

cargo build --release --quiet -p benches --bins
target=${CARGO_TARGET_DIR:-target}
export PYTHONDONTWRITEBYTECODE=1
case $what in
# The first call writes the model; that must not count as the first measurement.
step) "$target/release/step" --config mid --steps 1 >/dev/null ;;
loader)
    pictures=${LOKR_BENCH_PICTURES:-$target/bench-pictures}
    "$venv/bin/python" benches/torch/pictures.py "$pictures"
    set -- "$@" --pictures "$pictures"
    ;;
esac
exec "$venv/bin/python" benches/torch/compare.py "$@" --ours "$target/release/$what"
