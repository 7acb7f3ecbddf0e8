#!/usr/bin/env bash
# Everything that must pass before a change is merged: lint, format, types, docs, tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh dev
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
.venv/bin/lint-imports
.venv/bin/zensical build --strict
exec .venv/bin/python -m pytest -n auto --dist loadfile "$@"
