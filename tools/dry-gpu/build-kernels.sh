#!/bin/sh
# build-kernels.sh OUT FILE.cu...: builds kernels for the host into OUT/libdrykernels.so and OUT/libdrykernels-2.so. A file with barriers or shuffles of its
# own runs its blocks as fibers.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1
shift
mkdir -p "$out/kernels"
# Without -fno-gnu-unique both copies of the library would have the same static variables.
flags="-std=c++20 -O2 -march=x86-64-v3 -fPIC -fno-gnu-unique -w -fno-strict-aliasing -ffp-contract=off -I$here/include -I$here"
objects=
for file in "$@"; do
    name=$(basename "$file" .cu)
    # What is defined, after the macros: extern "C" ... void NAME(
    names=$(g++ $flags -E -P -include cuda_host.h -I"$(dirname "$file")" -x c++ "$file" | tr '\n' ' ' |
        grep -oE 'extern "C" +__attribute__\(\(annotate_global\)\) +void +[A-Za-z0-9_]+ *\(' | sed -E 's/.* ([A-Za-z0-9_]+) *\($/\1/' | sort -u)
    barriers=false
    if grep -qE '__syncthreads|__shfl' "$file"; then barriers=true; fi
    {
        echo "#include \"kernels.h\""
        echo "#include \"$file\""
        for kernel in $names; do echo "DRY_RUN($kernel, $barriers)"; done
    } >"$out/kernels/$name.cpp"
    g++ $flags -I"$(dirname "$file")" -c "$out/kernels/$name.cpp" -o "$out/kernels/$name.o"
    objects="$objects $out/kernels/$name.o"
    echo "$name: $(echo "$names" | wc -w) kernels"
done
g++ $flags -c "$here/fiber.cpp" -o "$out/kernels/fiber.o"
# The files share helper functions that no header marks inline.
g++ -shared -Wl,-z,muldefs -o "$out/libdrykernels.so" $objects "$out/kernels/fiber.o"
# A second one with variables of its own, so that two threads of a program launch at once.
cp "$out/libdrykernels.so" "$out/libdrykernels-2.so"
