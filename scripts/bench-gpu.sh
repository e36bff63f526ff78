#!/bin/sh
# Times a full-size SDXL step on a GPU: the recipe of Kohaku XL Epsilon, and the UNet alone with factor 8 beside PyTorch and LyCORIS.
# Writes random weights of full size first (7 GB).
#
#   scripts/bench-gpu.sh [path of a lokr built with CUDA] [folder for the weights] [python with torch and lycoris-lora]
set -eu
cd "$(dirname "$0")/.."
lokr=${1:-target/release/lokr}
base=${2:-target/bench-models}/sdxl.safetensors
python=${3:-python3}
[ -e "$base" ] || "$lokr" init-base --config sdxl --seed 0 --out "$base"
set -- --config configs/kohaku-xl-epsilon.toml --set "model.base='$base'" --set train.initial_loss_scale=1024
"$lokr" check-gpu "$@" | sed -n '/^A step/,/^what/p'
"$lokr" check-gpu "$@" --set network.preset=full --set network.train_norm=false --set network.train_text_encoder=false --set train.max_token_length=75 |
    sed -n '/^A step/,/^what/p'
if "$python" -c 'import lycoris, torch' 2>/dev/null; then
    PYTHONDONTWRITEBYTECODE=1 "$python" benches/torch/gpu.py
else
    echo "PyTorch: skipped, $python has no torch and lycoris-lora"
fi
