#!/usr/bin/env bash
# Writes what the container installs, version by version and with checksums; needs uv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wheels="$(mktemp -d)"
trap 'rm -r "$wheels"' EXIT
.venv/bin/python scripts/build_runtime.py "$wheels" >&2
echo "sparse-tvm-runtime[serve] @ file://$(ls "$wheels"/*.whl)" >"$wheels/requirements.in"
uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
    --no-emit-package sparse-tvm-runtime --custom-compile-command "bash scripts/lock_container.sh" \
    --output-file examples/container/requirements.txt "$wheels/requirements.in"
