"""All tests run with every pass held to what it promises."""

from __future__ import annotations

import os

os.environ["SPARSE_TVM_CHECK_PASSES"] = "1"
