#!/usr/bin/env bash
# `make gpu-check`: builds this checkout with what the machine has (no package index, no virtual environment), then tests
# and measures the GPU kernels; benchmarks/kernels/gpu/check.py says what, and what it writes. Arguments are handed on.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
BUILD=${BUILD:-build/gpu}
case $BUILD in /*) ;; *) BUILD=$PWD/$BUILD ;; esac
TREE=$BUILD/tree

die() { printf 'Error: check GPU: %s\nTry: %s\n' "$1" "$2" >&2; exit 1; }

[ -d /usr/local/cuda/bin ] && PATH="$PATH:/usr/local/cuda/bin"

missing=()
for tool in "$PYTHON" c++ cmake ninja; do command -v "$tool" > /dev/null || missing+=("$tool"); done
if command -v "$PYTHON" > /dev/null; then
    for module in numpy nanobind pytest; do
        "$PYTHON" -c "import $module" 2> /dev/null || missing+=("$module (a module of $PYTHON)")
    done
fi
command -v nvcc > /dev/null || missing+=("nvcc (of CUDA, in PATH or /usr/local/cuda/bin)")
[ ${#missing[@]} -eq 0 ] || die "$(printf '%s, ' "${missing[@]}" | sed 's/, $//') not found; nothing was measured" \
    "install what is missing, or set PYTHON to the interpreter that has the modules"

# Where ONNX Runtime's headers are not found, its library of ops is left out: nothing is fetched here.
mkdir -p "$BUILD"
cmake -S . -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
    -DSKERRY_ORT=FOUND > "$BUILD.log" 2>&1 && cmake --build "$BUILD" >> "$BUILD.log" 2>&1 || {
    tail -n 30 "$BUILD.log" >&2
    die "the build failed; nothing was measured" "read $BUILD.log"
}

# A tree that looks like the installed package: folders by link, and the compiled parts beside the sources of kernels.
rm -rf "$TREE"
mkdir -p "$TREE/skerry/kernels"
for folder in core exporter runtime fleet trainer benchmarks; do ln -s "$PWD/$folder" "$TREE/skerry/$folder"; done
for source in kernels/*; do ln -s "$PWD/$source" "$TREE/skerry/kernels/"; done
cmake --install "$BUILD" --prefix "$TREE" >> "$BUILD.log" 2>&1

PYTHONPATH="$TREE" exec "$PYTHON" -m skerry.benchmarks.kernels.gpu.check "$@"
