"""The manifest of an artifact: what is in it, and the check that it is.

`Manifest` is the schema. A key is added here, in ``docs/formats.md``, and where it is written;
keys that are not listed are let through, for an older reader to ignore.
"""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

Natural = Annotated[int, "not negative"]

DType = Literal[
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
]


class Code(TypedDict):
    """The shared library at the start of the file."""

    nbytes: Natural
    crc32: Natural


class Weight(TypedDict):
    """One array that lies in the file."""

    name: str
    dtype: DType
    shape: list[Natural]
    offset: Natural
    nbytes: Natural
    crc32: Natural


class _Spec(TypedDict):
    name: str
    dtype: DType
    shape: list[Natural | str]


class Spec(_Spec, total=False):
    """An input or an output; ``range`` where it holds indices into a table."""

    range: tuple[int, int]


class _Target(TypedDict):
    name: str
    triple: str
    features: list[str]


class Target(_Target, total=False):
    """The processor that the code is for; a backend may say more of it."""

    cpu: str
    vector_bits: Natural


class Versions(TypedDict):
    """What built the artifact."""

    sparse_tvm: str
    tvm: str
    tvm_ffi: str


class Origin(TypedDict):
    """The model that was compiled."""

    name: str
    source: str | None
    kind: str
    sha256: str | None


class _Figures(TypedDict):
    seconds: float
    dense_seconds: float


class _Times(TypedDict):
    tokens: Natural
    predicted: _Figures


class Times(_Times, total=False):
    """Seconds of a call for so many tokens, on one core or on so many threads."""

    threads: Natural
    measured: _Figures


class _Layer(TypedDict):
    name: str
    op: str
    shape: list[Natural]
    sparsity: float
    nnz: Natural
    structure: str
    format: str
    block: list[Natural] | None
    kernel: str
    epilogue: list[str]
    reason: str
    bytes: Natural
    precision: str


class Layer(_Layer, total=False):
    """What became of one layer, and why."""

    basis: Literal["measured", "predicted"]
    times: Times


class Totals(TypedDict):
    """Sums over the model."""

    parameters: Natural
    nonzeros: Natural
    weight_bytes: Natural
    file_bytes: Natural


class Phase(TypedDict):
    """One phase of the compile."""

    name: str
    seconds: float


class Compile(TypedDict):
    """What the compile took."""

    seconds: float
    peak_memory_bytes: Natural
    phases: list[Phase]


class _Similarity(TypedDict):
    mean_abs_diff: float
    cosine: float


class Similarity(_Similarity, total=False):
    """The mean difference, the least cosine of rows, and in how many rows the largest agrees."""

    top1: float


class _Verification(TypedDict):
    reference: str
    tolerance: float
    max_abs_diff: dict[str, float]


class Verification(_Verification, total=False):
    """How the outputs compare with the reference's, computed by which emulated CPU, if any.

    ``similarity`` is there where layers compute in low precision, by output.
    """

    emulated: str
    similarity: dict[str, Similarity]


class _Kernel(TypedDict):
    kind: str
    layers: list[str]


class Kernel(_Kernel, total=False):
    """A function of the library: the kernel of a family for an operator."""

    family: str
    operator: dict[str, Any]


class _Required(TypedDict):
    format_version: Natural
    code: Code
    versions: Versions
    model: Origin
    backend: str
    device: str
    target: Target
    threads: Natural | None
    inputs: list[Spec]
    outputs: list[Spec]
    layers: list[Layer]
    notes: list[str]
    totals: Totals
    compile: Compile
    verification: Verification | None
    weights: list[Weight]
    kernels: dict[str, Kernel]


class Manifest(_Required, total=False):
    """Everything that an artifact says of itself; ``docs/formats.md`` describes the keys."""

    bounds: dict[str, tuple[int, int]]
    unverified: str | None


def check_manifest(value: Any) -> None:
    """Check that a value read from JSON is a `Manifest`.

    Raises
    ------
    ValueError
        With the first place that is not as it should be, and what stands there.
    """
    check(value, Manifest, "")


def check(value: Any, expected: Any, where: str) -> None:
    """Check that a value read from JSON is of a type, which may be a `TypedDict`.

    Raises
    ------
    ValueError
        As :func:`check_manifest`; ``where`` is the place of the value itself.
    """
    origin, arguments = get_origin(expected), get_args(expected)
    if expected is Any:
        return
    if is_typeddict(expected):
        _check_keys(value, expected, where)
    elif origin is list:
        _demand(isinstance(value, list), value, "a list", where)
        for index, item in enumerate(value):
            check(item, arguments[0], f"{where}[{index}]")
    elif origin is tuple:
        found = isinstance(value, list) and len(value) == len(arguments)
        _demand(found, value, f"a list of {len(arguments)}", where)
        for index, item in enumerate(value):
            check(item, arguments[index], f"{where}[{index}]")
    elif origin is dict:
        _demand(isinstance(value, dict), value, "an object", where)
        for key, item in value.items():
            check(item, arguments[1], f"{where}[{key!r}]")
    elif origin in (Union, UnionType):
        check(value, _alternative(value, arguments), where)
    elif origin is Literal:
        _demand(value in arguments, value, f"one of {', '.join(arguments)}", where)
    elif expected == Natural:
        _demand(_is_a(value, int) and value >= 0, value, "a number from 0", where)
    else:
        _demand(_is_a(value, expected), value, _NAMES[expected], where)


def _check_keys(value: Any, expected: Any, where: str) -> None:
    _demand(isinstance(value, dict), value, "an object", where)
    missing = sorted(expected.__required_keys__ - value.keys())
    if missing:
        raise ValueError(f"{where or 'the manifest'} has no {missing[0]!r}")
    for key, type_ in _fields(expected).items():
        if key in value:
            check(value[key], type_, f"{where}.{key}" if where else key)


@cache
def _fields(expected: Any) -> dict[str, Any]:
    return get_type_hints(expected, include_extras=True)


def _alternative(value: Any, alternatives: tuple[Any, ...]) -> Any:
    """Return which of a union's members `value` should be."""
    if value is None and type(None) in alternatives:
        return type(None)
    if isinstance(value, str) and str in alternatives:
        return str
    return alternatives[0]


def _is_a(value: Any, expected: type) -> bool:
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)


_NAMES = {str: "a string", int: "an integer", float: "a number", type(None): "null"}


def _demand(found: bool, value: Any, expected: str, where: str) -> None:
    if not found:
        text = repr(value)
        shown = text if len(text) <= 40 else text[:39] + "…"
        raise ValueError(f"{where or 'the manifest'} is {shown}, not {expected}")
