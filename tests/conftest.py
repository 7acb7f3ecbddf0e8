"""All tests run with every pass held to what it promises, and at whatever speed a machine has."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ["SPARSE_TVM_CHECK_PASSES"] = "1"

# How long an example takes says nothing of what is tested: others use the machine, too.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")
