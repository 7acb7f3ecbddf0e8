"""64-bit Arm: CPU families by what their cores have beside NEON's 32 registers of 128 bits.

Costs come from Arm's optimisation guides and LLVM's models, not from measurements. SVE is present
in the newest ones and not used: its registers are as wide there as NEON's.
"""

from __future__ import annotations

from dataclasses import replace

from sparse_tvm.targets.target import Caches, Costs, Target

_V8_0 = ("neon",)
_V8_2 = (*_V8_0, "lse", "rdm", "rcpc", "fullfp16", "dotprod")
_V8_4 = (*_V8_2, "fp16fml", "complxnum", "i8mm", "bf16")


def _attributes(features: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"+{feature}" for feature in features)


_CORTEX_A72 = Target(
    name="cortex-a72",
    description="Armv8.0: Raspberry Pi 4, Graviton 1",
    aliases=("armv8-a", "raspberry-pi-4", "graviton"),
    cpu="generic",
    triple="aarch64-unknown-linux-gnu",
    features=_V8_0,
    attributes=_attributes(_V8_0),
    vector_bits=128,
    registers=32,
    caches=Caches(l1=32 << 10, l2=256 << 10, l3=0),
    costs=Costs(
        ghz=1.5,
        fma=1.0,
        spilled=1.85,
        load=1.0,
        narrow=1.0,
        scalars_per_load=4,
        l2_line=5.0,
        streamed=8.0,
        words=3.0,
        memory=2.5,
        disturbed=0.0,
        second=20.0,
        last=5.0,
        row=16.0,
        sum=2.0,
        index=1.0,
        apart=16.0,
    ),
    parts=(0xD08,),
)

_CORTEX_A76 = replace(
    _CORTEX_A72,
    name="cortex-a76",
    description="Armv8.2, dot products, fp16: Raspberry Pi 5",
    aliases=("raspberry-pi-5",),
    features=_V8_2,
    attributes=_attributes(_V8_2),
    caches=Caches(l1=64 << 10, l2=512 << 10, l3=512 << 10),
    costs=replace(
        _CORTEX_A72.costs,
        ghz=2.4,
        fma=0.5,
        spilled=1.5,
        load=0.5,
        l2_line=2.5,
        streamed=12.0,
        memory=4.0,
        disturbed=0.0,
        second=32.0,
        last=8.0,
        row=12.0,
        sum=1.5,
        index=0.5,
        apart=16.0,
    ),
    parts=(0xD0B,),
)

_NEOVERSE_N1 = replace(
    _CORTEX_A76,
    name="neoverse-n1",
    description="Armv8.2, dot products, fp16: Graviton 2, Ampere Altra",
    aliases=("armv8.2-a", "graviton2", "ampere-altra"),
    caches=Caches(l1=64 << 10, l2=1 << 20, l3=512 << 10),
    costs=replace(_CORTEX_A76.costs, ghz=2.5, streamed=16.0, memory=8.0, second=64.0, last=16.0),
    parts=(0xD0C,),
)

_NEOVERSE_V1 = replace(
    _NEOVERSE_N1,
    name="neoverse-v1",
    description="Armv8.4, int8 and bfloat16 matrices: Graviton 3",
    aliases=("armv8.4-a", "graviton3"),
    features=_V8_4,
    attributes=_attributes(_V8_4),
    caches=Caches(l1=64 << 10, l2=1 << 20, l3=512 << 10),
    costs=replace(
        _NEOVERSE_N1.costs,
        ghz=2.6,
        fma=0.25,
        spilled=0.7,
        load=1 / 3,
        l2_line=2.0,
        streamed=32.0,
        memory=10.0,
        disturbed=0.0,
        second=80.0,
        last=20.0,
    ),
    parts=(0xD40,),
)

_NEOVERSE_V2 = replace(
    _NEOVERSE_V1,
    name="neoverse-v2",
    description="Armv9.0, int8 and bfloat16 matrices: Graviton 4, Grace, Axion",
    aliases=("graviton4", "nvidia-grace", "google-axion"),
    caches=Caches(l1=64 << 10, l2=2 << 20, l3=1 << 20),
    costs=replace(_NEOVERSE_V1.costs, ghz=2.8),
    parts=(0xD4F,),
)

_NEOVERSE_N2 = replace(
    _NEOVERSE_V1,
    name="neoverse-n2",
    description="Armv9.0, int8 and bfloat16 matrices: Cobalt 100, Yitian 710",
    aliases=("cobalt100", "yitian710"),
    costs=replace(_NEOVERSE_V1.costs, ghz=3.0, fma=0.5, spilled=1.5, streamed=16.0),
    parts=(0xD49,),
)

ARM_TARGETS = (
    _NEOVERSE_V2,
    _NEOVERSE_N2,
    _NEOVERSE_V1,
    _NEOVERSE_N1,
    _CORTEX_A76,
    _CORTEX_A72,
)
"""The most capable first."""
