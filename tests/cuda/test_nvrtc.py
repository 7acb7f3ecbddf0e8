"""NVIDIA's compiler: what it makes, what it says, and that no kernel of ours spills."""

from __future__ import annotations

import ptxas_table
import pytest

from sparse_tvm import nvrtc
from sparse_tvm.errors import BuildError
from sparse_tvm.schedules.cuda.instructions import PRELUDE

SOURCE = 'extern "C" __global__ void nothing(float* x) { x[threadIdx.x] = 0; }'


def test_a_cubin_for_every_architecture():
    binary = nvrtc.fat_binary(PRELUDE + SOURCE, [80, 89, 90, 100])
    assert binary.count(b"\x7fELF") == 4
    assert "registers" in nvrtc.compile_source(SOURCE, "sm_90").log


def test_what_it_refuses():
    with pytest.raises(BuildError, match=r"refuses the code for sm_80: kernels\.cu\(1\): error"):
        nvrtc.compile_source("what", "sm_80")


def test_without_the_packages(monkeypatch):
    monkeypatch.setattr(nvrtc, "_headers", lambda: None)
    with pytest.raises(BuildError, match="NVIDIA's compiler is not installed") as error:
        nvrtc.fat_binary(SOURCE, [80])
    assert "cuda" in (error.value.hint or "")


def test_no_kernel_spills():
    found = list(ptxas_table.rows())
    assert {row.gpu.capability for row in found} == {80, 89, 90, 100}
    assert [row for row in found if row.spilled] == []
    assert min(row.occupancy for row in found) > 0
