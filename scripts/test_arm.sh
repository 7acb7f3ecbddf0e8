#!/usr/bin/env bash
# What is compiled for Arm, run by qemu: models, the command line, the C++ example. Sets up all that
# it needs on Debian or Ubuntu: the emulator, a cross compiler, a Python for aarch64 (550 MB).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh dev
bash scripts/setup_arm.sh
SPARSE_TVM_TEST_ARM=1 exec .venv/bin/python -m pytest -n auto --dist worksteal tests/arm "$@"
