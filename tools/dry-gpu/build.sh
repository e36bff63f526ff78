#!/bin/sh
# build.sh OUT [FILE.cu...]: builds the stand-ins for NVIDIA's libraries into OUT, under the names and sonames of the real ones
# (CUDA 13, cuDNN 9, NCCL 2), so that a program linked with them runs on the real ones as well; and, if kernels are given, their
# host build (build-kernels.sh). To run a program on them: LD_LIBRARY_PATH=OUT.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1
shift
mkdir -p "$out"
flags="-std=c++20 -O3 -march=x86-64-v3 -Wall -fPIC -shared"
library() { # NAME VERSION [SOURCE]
    name=$1 version=$2
    case $name-$3 in
    *-none) set -- -xc++ /dev/null ;;
    cuda-*) set -- "$here/driver.cpp" "$here/memory.cpp" -ldl ;;
    *) set -- "$here/$3" -L"$out" -lcuda ;;
    esac
    g++ $flags -Wl,-soname,"lib$name.so.$version" -o "$out/lib$name.so.$version" "$@"
    ln -sf "lib$name.so.$version" "$out/lib$name.so"
}
library cuda 1 "driver.cpp, memory.cpp"
library cublas 13 blas.cpp
library cublasLt 13 none
library curand 10 rand.cpp
library nvrtc 13 none
library cudart 13 runtime.cpp
library cudnn 9 dnn.cpp
library nccl 2 nccl.cpp
[ $# = 0 ] || "$here/build-kernels.sh" "$out" "$@"
