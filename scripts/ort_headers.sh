#!/usr/bin/env bash
# Puts ONNX Runtime's C headers under build/ort/include, because its Python wheel carries none.
# Order: a system package; the headers of Debian 13's libonnxruntime-dev, read through a private apt list so that
# the machine's own sources stay untouched. Where neither works CMake fetches the upstream release by hash.
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/ort/include
[ -f "$out/onnxruntime_cxx_api.h" ] && exit 0
mkdir -p "$out"

for dir in /usr/include/onnxruntime /usr/local/include/onnxruntime /usr/include/onnxruntime/core/session; do
    if [ -f "$dir/onnxruntime_cxx_api.h" ]; then cp "$dir"/onnxruntime_*.h "$out/"; exit 0; fi
done

command -v apt-get > /dev/null && command -v dpkg > /dev/null || exit 0
mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2> /dev/null || true; } |
    sed -nE 's/^URIs:[[:space:]]*([^[:space:]]+\/debian)\/?$/\1/p; s/^deb[[:space:]]+(\[[^]]*\][[:space:]]+)?([^[:space:]]+\/debian)\/?[[:space:]].*/\2/p' | head -n 1)
[ -n "$mirror" ] || exit 0
apt=$(mktemp -d)
trap 'rm -rf "$apt"' EXIT
mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
printf 'Types: deb\nURIs: %s\nSuites: trixie\nComponents: main\nSigned-By: %s\n' "$mirror" "$keyring" > "$apt/trixie.sources"
opts=(-qq -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o "Dir::Etc::SourceList=/dev/null"
    -o "Dir::Etc::SourceParts=$apt" -o "APT::Sandbox::User=root")
cd "$apt"
if apt-get "${opts[@]}" update && apt-get "${opts[@]}" download libonnxruntime-dev; then
    dpkg -x libonnxruntime-dev_*.deb "$apt/root"
    cd - > /dev/null
    cp "$apt"/root/usr/include/onnxruntime/onnxruntime_*.h "$out/" 2> /dev/null ||
        find "$apt/root/usr/include" -name 'onnxruntime_*.h' -exec cp {} "$out/" \;
fi
