#!/usr/bin/env bash
# The server's tests, with everything they need: Triton's and OpenAI's clients, and Ray.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh serve-test
exec .venv/bin/python -m pytest tests/test_serving*.py "$@"
