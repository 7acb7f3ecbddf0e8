"""The manifest of an artifact: what is in it, and the check that it is.

`Manifest` is the schema. A key is added here, in ``docs/formats.md``, and where it is written;
keys that are not listed are let through, for an older reader to ignore.
"""

import re
from collections.abc import Callable, Iterable
from functools import cache
from itertools import repeat
from types import UnionType
from typing import (
    Annotated,
    Any,
    ForwardRef,
    Literal,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

Natural = Annotated[int, "not negative"]

Hexadecimal = Annotated[str, "two digits for each byte"]

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
    """An input or an output; ``range`` where it holds indices into a table, ``multiples`` where
    its sizes must be some, ``only`` where its elements may have one value."""

    range: tuple[int, int]
    multiples: list[int]
    only: int


class _Target(TypedDict):
    name: str
    triple: str
    features: list[str]


class Target(_Target, total=False):
    """The processor that the code is for; a backend may say more of it."""

    cpu: str
    vector_bits: Natural
    architectures: list[str]


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
    density: list[Hexadecimal]


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

    ``similarity`` is there where layers compute in low precision, by output, and ``sensitivity``
    where they were measured: what each by itself takes from a cosine of 1.
    """

    emulated: str
    sensitivity: dict[str, float]
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


class Turns(TypedDict):
    """How a run of many images may take turns."""

    dimension: str
    widest: float
    moved: float


class Manifest(_Required, total=False):
    """Everything that an artifact says of itself; ``docs/formats.md`` describes the keys."""

    bounds: dict[str, tuple[int, int]]
    turns: Turns
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
    try:
        _checker(expected)(value)
    except _Wrong as error:
        place = "".join((where, *reversed(error.places))).removeprefix(".")
        raise ValueError(f"{place or 'the manifest'} {error}") from None


class _Wrong(Exception):
    """What is wrong with a value; the containers around it add its place, innermost first."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.places: list[str] = []


_Check = Callable[[Any], None]


@cache
def _checker(expected: Any) -> _Check:
    """Return what raises `_Wrong` for a value of another type.

    Made once for each type: a model has thousands of values, and is checked whenever it is loaded.
    """
    origin, arguments = get_origin(expected), get_args(expected)
    if expected is Any:
        return lambda value: None
    if is_typeddict(expected):
        return _keys_checker(expected)
    if origin is list:
        return _items_checker("a list", None, repeat(_checker(arguments[0])))
    if origin is tuple:
        size = len(arguments)
        return _items_checker(f"a list of {size}", size, [_checker(each) for each in arguments])
    if origin is dict:
        return _object_checker(_checker(arguments[1]))
    if origin in (Union, UnionType):
        return _union_checker(arguments)
    if origin is Literal:
        return _literal_checker(arguments)
    return _SPECIAL.get(expected) or _type_checker(expected)


def _keys_checker(expected: Any) -> _Check:
    types = expected.__annotations__
    if any(isinstance(type_, ForwardRef) for type_ in types.values()):  # not evaluated yet
        types = get_type_hints(expected, include_extras=True)
    fields = [(key, _checker(type_)) for key, type_ in types.items()]
    required = expected.__required_keys__

    def check_keys(value: Any) -> None:
        if not isinstance(value, dict):
            raise _unlike(value, "an object")
        if missing := required - value.keys():
            raise _Wrong(f"has no {min(missing)!r}")
        for key, check_value in fields:
            if key in value:
                try:
                    check_value(value[key])
                except _Wrong as error:
                    error.places.append(f".{key}")
                    raise

    return check_keys


def _items_checker(expected: str, size: int | None, checks: Iterable[_Check]) -> _Check:
    def check_items(value: Any) -> None:
        if not isinstance(value, list) or size not in (None, len(value)):
            raise _unlike(value, expected)
        for index, (item, check_item) in enumerate(zip(value, checks, strict=False)):
            try:
                check_item(item)
            except _Wrong as error:
                error.places.append(f"[{index}]")
                raise

    return check_items


def _object_checker(check_item: _Check) -> _Check:
    def check_items(value: Any) -> None:
        if not isinstance(value, dict):
            raise _unlike(value, "an object")
        for key, item in value.items():
            try:
                check_item(item)
            except _Wrong as error:
                error.places.append(f"[{key!r}]")
                raise

    return check_items


def _union_checker(alternatives: tuple[Any, ...]) -> _Check:
    """Check what the value looks like: null, a string, or else the first alternative."""
    checks = {type_: _checker(type_) for type_ in alternatives}
    others = checks[alternatives[0]]
    of_null, of_string = checks.get(type(None), others), checks.get(str, others)

    def check_alternative(value: Any) -> None:
        if value is None:
            of_null(value)
        elif isinstance(value, str):
            of_string(value)
        else:
            others(value)

    return check_alternative


def _literal_checker(values: tuple[str, ...]) -> _Check:
    def check_literal(value: Any) -> None:
        if value not in values:
            raise _unlike(value, f"one of {', '.join(values)}")

    return check_literal


def _type_checker(expected: type) -> _Check:
    """JSON has no subclasses: `bool` is none of `int`'s."""

    def check_type(value: Any) -> None:
        if type(value) is not expected:
            raise _unlike(value, _NAMES[expected])

    return check_type


def _check_natural(value: Any) -> None:
    if type(value) is not int or value < 0:
        raise _unlike(value, "a number from 0")


def _check_number(value: Any) -> None:
    if type(value) not in (int, float):
        raise _unlike(value, "a number")


def _check_hexadecimal(value: Any) -> None:
    if not isinstance(value, str) or re.fullmatch("([0-9a-f]{2})+", value) is None:
        raise _unlike(value, "bytes in hex")


def _unlike(value: Any, expected: str) -> _Wrong:
    text = repr(value)
    shown = text if len(text) <= 40 else text[:39] + "…"
    return _Wrong(f"is {shown}, not {expected}")


_SPECIAL: dict[Any, _Check] = {
    Natural: _check_natural,
    Hexadecimal: _check_hexadecimal,
    float: _check_number,
}

_NAMES = {str: "a string", int: "an integer", type(None): "null"}
