#!/usr/bin/env bash
# Makes a Python for aarch64 with TVM's runtime, in which sparse-tvm verifies artifacts for Arm on
# another machine; safe to run again. Needs Debian (or Ubuntu) and what it asks for: qemu's user
# mode and a cross compiler. The system's own packages stay as they are.
#
#   scripts/setup_arm.sh [DIRECTORY]     by default where `sparse-tvm compile --verify` looks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

place="${1:-${SPARSE_TVM_AARCH64:-${XDG_CACHE_HOME:-$HOME/.cache}/sparse-tvm/aarch64}}"
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

missing=()
command -v qemu-aarch64-static >/dev/null || command -v qemu-aarch64 >/dev/null ||
    missing+=(qemu-user-static)
command -v cmake >/dev/null || missing+=(cmake)
command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
command -v llvm-mca-19 >/dev/null || ! apt-cache show llvm-19 >/dev/null 2>&1 || missing+=(llvm-19)
if [ ${#missing[@]} -gt 0 ]; then
    as_root apt-get update -qq
    as_root apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

if [ ! -x "$place/root/usr/bin/python3" ]; then
    echo "Unpacking Debian's Python for arm64 into $place/root"
    rm -rf "$place/root" "$place/apt"
    mkdir -p "$place/root" "$place/apt/state/lists/partial" "$place/apt/cache/archives/partial"
    apt() {
        apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 \
            -o Dir::State="$place/apt/state" -o Dir::State::status=/dev/null \
            -o Dir::Cache="$place/apt/cache" -o Debug::NoLocking=1 "$@"
    }
    apt update
    apt install -y --download-only --no-install-recommends python3 libstdc++6 >/dev/null
    for package in "$place"/apt/cache/archives/*.deb; do
        dpkg-deb -x "$package" "$place/root"
    done
    rm -rf "$place/apt"
fi

version="$(basename "$(readlink "$place/root/usr/bin/python3")")"
if [ ! -d "$place/site/tvm" ] || [ ! -d "$place/site/onnxsim" ]; then
    echo "Installing wheels for aarch64 into $place/site"
    rm -rf "$place/site"
    .venv/bin/python -c '
from importlib.metadata import requires
print(*(r for r in requires("sparse-tvm") if "extra ==" not in r), sep="\n")' |
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            --target "$place/site" --no-compile --only-binary=:all: --implementation cp \
            --python-version "${version#python}" --platform manylinux_2_28_aarch64 \
            --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
            --platform manylinux2014_aarch64 -r /dev/stdin
fi
