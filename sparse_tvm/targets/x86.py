"""x86-64: the psABI's levels, and families with instructions for few bits beyond them.

float32 kernels are the same within a level: the costs are one level's, measured on Zen 5 with
AVX-512. Those of AVX2 are Zen 3's, those of Sapphire Rapids and Zen 4 their own, by `sparse-tvm
tune --fit`. Zen 3's `second` and `last` are what chooses best for 1 to 8 tokens among its records,
and its `l2_line` and `row` were fitted by themselves since, to rows whose weights are loaded four
at once. Zen 4's `disturbed` is what chooses best, too; its first cache has 32 KiB, but with 48 as
here faster layouts are chosen. `words` was measured on Sapphire Rapids, with BERT-base's
layers one after another.
"""

from __future__ import annotations

from dataclasses import replace

from sparse_tvm.targets.target import Caches, Costs, Target

_V2 = ("cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_AVX_VNNI = ("avxvnni",)
_AVX512_VNNI = ("avx512vnni",)
_AVX512_BF16 = (*_AVX512_VNNI, "avx512bf16")
_ZEN_5 = (*_AVX512_BF16, *_AVX_VNNI)
_SAPPHIRE_RAPIDS = (
    *_AVX512_BF16,
    *_AVX_VNNI,
    "avx512vbmi2",
    "avx512fp16",
    "amx-tile",
    "amx-int8",
    "amx-bf16",
)

_LEVEL_4 = Target(
    name="x86-64-v4",
    description="AVX-512: Skylake-X",
    aliases=("skylake-avx512",),
    cpu="x86-64-v4",
    triple="x86_64-unknown-linux-gnu",
    features=_V4,
    attributes=("-prefer-256-bit",),  # or LLVM halves our 512-bit vectors
    vector_bits=512,
    registers=32,
    caches=Caches(l1=48 << 10, l2=1 << 20, l3=2 << 20),
    costs=Costs(
        ghz=3.0,
        fma=0.5,
        spilled=1.0,
        load=0.5,
        narrow=1.0,
        scalars_per_load=1,
        l2_line=0.95,
        streamed=8.0,
        words=3.0,
        memory=6.0,
        disturbed=0.0,
        second=48.0,
        last=12.0,
        row=12.0,
        sum=3.25,
        index=0.4,
        apart=16.0,
    ),
)

_LEVEL_3 = replace(
    _LEVEL_4,
    name="x86-64-v3",
    description="AVX2: Haswell, Zen 1 to 3",
    aliases=("haswell", "broadwell", "skylake", "znver1", "znver2", "znver3"),
    cpu="x86-64-v3",
    features=_V3,
    attributes=(),
    vector_bits=256,
    registers=16,
    caches=Caches(l1=32 << 10, l2=512 << 10, l3=2 << 20),
    costs=Costs(
        ghz=3.0,
        fma=0.645,
        spilled=1.07,
        load=0.43,
        narrow=1.0,
        scalars_per_load=1,
        l2_line=1.8,
        streamed=32.0,
        words=3.0,
        memory=5.0,
        disturbed=0.0,
        second=24.0,
        last=5.0,
        row=20.0,
        sum=2.32,
        index=1.14,
        apart=16.0,
    ),
)

_LEVEL_2 = replace(
    _LEVEL_3,
    name="x86-64-v2",
    description="SSE4.2: Nehalem, Goldmont",
    aliases=("nehalem", "westmere", "sandybridge", "ivybridge", "goldmont"),
    cpu="x86-64-v2",
    features=_V2,
    vector_bits=128,
    caches=Caches(l1=32 << 10, l2=256 << 10, l3=2 << 20),
    # a multiply-add is two instructions, on three ports
    costs=replace(_LEVEL_4.costs, l2_line=0.8, fma=0.75),
)


def _with(
    level: Target, extra: tuple[str, ...], name: str, description: str, *aliases: str
) -> Target:
    """A family that has more features than its level."""
    return replace(
        level,
        name=name,
        description=description,
        aliases=aliases,
        features=(*level.features, *extra),
        attributes=(*level.attributes, *(f"+{feature}" for feature in extra)),
    )


_SAPPHIRE = replace(
    _with(
        _LEVEL_4,
        _SAPPHIRE_RAPIDS,
        "sapphirerapids",
        "AMX, AVX512-FP16: Sapphire, Emerald, Granite Rapids",
        "sapphire-rapids",
        "emeraldrapids",
        "graniterapids",
    ),
    caches=Caches(l1=48 << 10, l2=2 << 20, l3=2 << 20),
    costs=replace(
        _LEVEL_4.costs,
        fma=0.573,
        load=0.509,
        l2_line=1.1,
        streamed=13.7,
        last=7.08,
        row=11.6,
        sum=3.11,
        index=0.636,
    ),
)

_ZEN_4 = replace(
    _with(
        _LEVEL_4,
        _AVX512_BF16,
        "avx512-bf16",
        "AVX-512 with VNNI and bfloat16: Zen 4, Cooper Lake",
        "znver4",
        "cooperlake",
    ),
    costs=replace(
        _LEVEL_4.costs,
        fma=0.72,
        load=0.88,
        narrow=0.44,
        l2_line=1.06,
        streamed=176.0,
        memory=8.2,
        disturbed=2.2,
        second=31.2,
        last=25.5,
        row=7.2,
        sum=1.05,
        index=0.044,
        apart=5.0,
    ),
    foresees=True,
)

X86_TARGETS = (
    _SAPPHIRE,
    replace(
        _with(_LEVEL_4, _ZEN_5, "znver5", "AVX-512 with bfloat16 and AVX-VNNI: Zen 5"),
        foresees=True,
    ),
    _ZEN_4,
    _with(
        _LEVEL_4,
        _AVX512_VNNI,
        "avx512-vnni",
        "AVX-512 with VNNI: Cascade Lake, Ice Lake",
        "cascadelake",
        "icelake-client",
        "icelake-server",
        "rocketlake",
        "tigerlake",
    ),
    _LEVEL_4,
    _with(
        _LEVEL_3,
        _AVX_VNNI,
        "avx-vnni",
        "AVX2 with VNNI: Alder Lake to Arrow Lake, Sierra Forest",
        "alderlake",
        "raptorlake",
        "meteorlake",
        "arrowlake",
        "sierraforest",
    ),
    _LEVEL_3,
    _LEVEL_2,
)
"""The most capable first."""
