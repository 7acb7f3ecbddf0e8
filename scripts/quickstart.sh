#!/usr/bin/env bash
# Installs sparse-tvm into .venv and makes a real sentence encoder faster; safe to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh examples
exec .venv/bin/python scripts/minilm.py "$@"
