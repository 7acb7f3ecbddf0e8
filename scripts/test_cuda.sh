#!/usr/bin/env bash
# What is compiled for NVIDIA's GPUs: for every architecture with NVIDIA's compiler, and run on an
# emulated GPU, without a real one. Installs the compiler (200 MB) and the server; needs g++.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh dev
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[cuda,serve]"
SPARSE_TVM_TEST_CUDA=1 exec .venv/bin/python -m pytest -n auto --dist worksteal tests/cuda \
    tests/test_doc_examples.py::test_cuda -m "not heavy" "$@"
