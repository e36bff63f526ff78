#!/bin/sh
# One LoKr step of a full-size SDXL on the CPU, batch 1, by the recipe of Kohaku XL Epsilon: peak memory and seconds, beside what `lokr plan`
# says of the memory.
#
#   scripts/bench-full-size.sh FOLDER [--compute float,bf16] [RESOLUTION...]        512 and 1024, in f32, if nothing else is named
#
# FOLDER takes a base model of random weights (7 GB, made once), a picture, and the runs (2.5 GB each, removed). GNU time is needed.
set -eu
mkdir -p "${1:?a folder for 10 GB}"
folder=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
computes=float
if [ "${1:-}" = --compute ]; then
    computes=$(echo "$2" | tr , ' ')
    shift 2
fi
resolutions=${*:-512 1024}
cargo build --release --quiet
lokr=${CARGO_TARGET_DIR:-target}/release/lokr

mkdir -p "$folder/pictures"
base=$folder/random-sdxl.safetensors
[ -e "$base" ] || "$lokr" init-base --config sdxl --seed 0 --out "$base"
# A picture of 1024x1024: the header of a BMP, and pixels.
{
    printf 'BM\066\000\060\000\000\000\000\000\066\000\000\000\050\000\000\000\000\004\000\000\000\004\000\000'
    printf '\001\000\030\000\000\000\000\000\000\000\060\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000'
    yes "a picture of stripes" | head -c 3145728
} >"$folder/pictures/stripes.bmp"
echo "stripes, simple background" >"$folder/pictures/stripes.txt"
sed -e "s|^base = .*|base = \"$base\"|" -e "s|^image_dir = .*|image_dir = \"$folder/pictures\"|" -e "s|^dir = .*|dir = \"$folder/run\"|" \
    -e 's/^max_train_epochs = .*/max_train_steps = 1/' -e 's/^batch_size = .*/batch_size = 1/' \
    -e 's/^gradient_accumulation_steps = .*/gradient_accumulation_steps = 1/' -e 's/^max_token_length = .*/max_token_length = 75/' \
    -e 's/^lr_scheduler = .*/lr_scheduler = "constant"/' -e '/^lr_warmup_steps/d' -e 's/^mixed_precision = .*/mixed_precision = "no"/' \
    -e '/^save_every_n_steps/d' -e '/^\[dataset\]/a cache_latents = true' configs/kohaku-xl-epsilon.toml >"$folder/full.toml"

for resolution in $resolutions; do
    for compute in $computes; do
        set -- --config "$folder/full.toml" --set "dataset.resolution=$resolution" --set "train.compute=$compute"
        rm -rf "$folder/run"
        planned=$("$lokr" plan "$@" | awk '$1 == "total" { print $2 }')
        /usr/bin/time -f %M -o "$folder/peak" "$lokr" train "$@" >"$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
        seconds=$(sed 's/.*"seconds":\([0-9.]*\).*/\1/' "$folder/run/metrics.jsonl")
        awk -v what="${resolution}x$resolution, $compute" -v planned="$planned" -v seconds="$seconds" \
            '{ peak = $1 / 1048576; printf "%-18s peak %.2f GiB, planned %.2f GiB (%+.0f %%), step %.1f s\n", what, peak, planned, 100 * (planned / peak - 1), seconds }' "$folder/peak"
    done
done
rm -rf "$folder/run" "$folder/peak"
