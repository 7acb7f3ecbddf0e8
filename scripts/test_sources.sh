#!/usr/bin/env bash
# The tests of every source: PyTorch, transformers and TensorFlow, in a virtual environment of
# their own. It downloads about 1 GB the first time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ -x .venv-sources/bin/python ] || "${PYTHON:-python3}" -m venv .venv-sources
pip() { .venv-sources/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
# TORCH_INDEX may name PyTorch's index of CPU builds: without GPU libraries it is 2 GB smaller.
.venv-sources/bin/python -c "import torch" 2>/dev/null ||
    pip torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
pip -e ".[sources-test]"
exec .venv-sources/bin/python -m pytest -n auto --dist loadfile tests/test_sources*.py \
    tests/test_doc_examples.py::test_sources "$@"
