#!/bin/sh
# Puts a CUDA 13.0 compiler into a folder, from NVIDIA's wheels on PyPI (about 370 MB): enough to build lokr with its CUDA
# features on a machine that has no CUDA toolkit, and no GPU. Does nothing where the folder is there already.
#
#   eval "$(scripts/cuda-toolkit.sh)"        # installs, and sets CUDA_HOME, CUDA_PATH, NVCC and PATH in this shell
#
# The folder is LOKR_CUDA_TOOLKIT, by default one of the user's cache.
set -eu
folder=${LOKR_CUDA_TOOLKIT:-${XDG_CACHE_HOME:-$HOME/.cache}/lokr/cuda-toolkit-13.0}
home=$folder/nvidia/cu13

if [ ! -e "$folder/whole" ]; then
    rm -rf "$folder"
    python3 -m pip install --quiet --no-deps --target "$folder" \
        'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-runtime==13.0.*' \
        'nvidia-cuda-cccl==13.0.*' 'nvidia-curand==10.4.*' >&2
    # pip drops the run bit.
    chmod +x "$home"/bin/* "$home"/nvvm/bin/* 2>/dev/null || true
    "$home/bin/nvcc" --version >&2
    touch "$folder/whole"
fi

echo "export CUDA_HOME='$home' CUDA_PATH='$home' NVCC='$home/bin/nvcc' PATH='$home/bin':\"\$PATH\""
