"""The names of all targets of ours, whatever their backend: known without loading any."""

from __future__ import annotations

from sparse_tvm.targets import ALIASES, NATIVE, TARGETS
from sparse_tvm.targets.cuda import CUDA_TARGETS

TARGET_NAMES = (NATIVE, *TARGETS, *(target.name for target in CUDA_TARGETS))
"""As ``--target`` takes them."""

OTHER_NAMES = (*ALIASES, *(alias for target in CUDA_TARGETS for alias in target.aliases))
"""Names of devices and machines, which it takes too."""
