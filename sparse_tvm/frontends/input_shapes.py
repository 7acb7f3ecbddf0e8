"""The shapes that a model's inputs may take: what the model says, and what the user fixes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from sparse_tvm.errors import OptionError
from sparse_tvm.spec import LARGEST_SIZE, TensorSpec

Dimension = int | str | range
"""A fixed size, a name (``"?"`` keeps the model's), or the sizes that are allowed."""

InputShapes = Mapping[str, Sequence[Dimension]]
"""Shapes by input name."""

_NAME = re.compile(r"[A-Za-z_]\w*")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass
class Shapes:
    """The inputs of a program.

    Attributes
    ----------
    specs : list[TensorSpec]
        One per input; every symbolic dimension has a name.
    bounds : dict[str, tuple[int, int]]
        Smallest and largest size of those symbolic dimensions that are bounded.
    multiples : dict[str, int]
        What symbolic dimensions must be multiples of, because the model demands it.
    """

    specs: list[TensorSpec]
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)
    multiples: dict[str, int] = field(default_factory=dict)

    def multiples_of(self, spec: TensorSpec) -> tuple[int, ...] | None:
        """Return what the dimensions of an input must be multiples of, None if nothing."""
        listed = tuple(self.multiples.get(str(dim), 1) for dim in spec.shape)
        return listed if any(multiple > 1 for multiple in listed) else None

    def merge(self, first: str, second: str) -> None:
        """Make one of two symbolic dimensions: the later has the earlier's name from now on."""
        order = [dim for spec in self.specs for dim in spec.shape]
        kept, gone = sorted((first, second), key=order.index)
        self.specs = [_substitute(spec, {gone: kept}) for spec in self.specs]
        low, high = self.bounds.pop(gone, (1, LARGEST_SIZE))
        if kept in self.bounds or (low, high) != (1, LARGEST_SIZE):
            known_low, known_high = self.bounds.get(kept, (low, high))
            self.bounds[kept] = max(low, known_low), min(high, known_high)
        if (multiple := self.multiples.pop(gone, 1)) > 1:
            self.multiples[kept] = math.lcm(multiple, self.multiples.get(kept, 1))


def parse_input_shapes(
    options: Iterable[str], called: str = "--input-shape"
) -> dict[str, tuple[Dimension, ...]]:
    """Parse ``--input-shape`` options, or others that are `called` something else.

    >>> parse_input_shapes(["ids:1,128", "mask:batch,1..512"])
    {'ids': (1, 128), 'mask': ('batch', range(1, 513))}

    Raises
    ------
    OptionError
        When an option is not ``NAME:DIM,DIM,...``.
    """
    shapes: dict[str, tuple[Dimension, ...]] = {}
    for option in options:
        # TensorFlow's names hold colons themselves: "ids:0:1,128".
        name, _, dims = option.rpartition(":")
        listed = re.sub(r"(?<=\d)x(?=\d)", ",", dims.strip("[]() ")).split(",")
        shape = tuple(_parse_dimension(dim.strip()) for dim in listed)
        if not name or None in shape:
            raise OptionError(
                f"{called} {option!r} is not NAME:DIM,DIM,... where each DIM is a positive "
                "integer, a range as 1..512, a name or ?",
                hint=f"for example {called} input_ids:1,128",
            )
        if shapes.setdefault(name, shape) != shape:  # type: ignore[arg-type]
            raise OptionError(f"{called} gives {name!r} two shapes")
    return shapes


def _parse_dimension(text: str) -> Dimension | None:
    if text.isdecimal():
        return int(text) or None
    if match := _RANGE.fullmatch(text):
        low, high = int(match[1]), int(match[2])
        return range(low, high + 1) if 1 <= low <= high else None
    return text if text == "?" or _NAME.fullmatch(text) else None


def choose_shapes(specs: Sequence[TensorSpec], input_shapes: InputShapes) -> Shapes:
    """Return the inputs as `input_shapes` fixes, names and bounds their dimensions.

    What is said of a symbolic dimension holds wherever the model uses it. Dimensions without a
    name get one.

    Raises
    ------
    OptionError
        When a name is unknown, a rank or a fixed dimension differs, or a symbol gets two values.
    """
    known = {spec.name: spec for spec in specs}
    unknown = [name for name in input_shapes if name not in known]
    if unknown:
        raise OptionError(
            f"--input-shape: the model has no input {unknown[0]!r}",
            hint=f"its inputs are {', '.join(map(str, specs))}",
        )
    symbols = {dim for spec in specs for dim in spec.shape if _NAME.fullmatch(str(dim))}
    named = {s.name: _with_names(s, symbols) for s in specs}
    chosen: dict[str, Dimension] = {}
    for name, shape in input_shapes.items():
        _match(named[name], shape, chosen)
    shapes = Shapes([_substitute(spec, chosen) for spec in named.values()])
    for symbol, dimension in chosen.items():
        if isinstance(dimension, range):
            shapes.bounds[symbol] = (dimension[0], dimension[-1])
    return shapes


def _with_names(spec: TensorSpec, symbols: Set[int | str]) -> TensorSpec:
    """Name all dimensions without a name."""
    names = (_dimension_name(dim, spec, axis, symbols) for axis, dim in enumerate(spec.shape))
    return TensorSpec(spec.name, spec.dtype, tuple(names))


def _dimension_name(
    dim: int | str, spec: TensorSpec, axis: int, symbols: Set[int | str]
) -> int | str:
    """Return a size, an identifier, or an expression of the model's symbols: ``past + new``."""
    if isinstance(dim, int):
        return dim
    if dim == "?":
        return re.sub(r"\W", "_", f"{spec.name}_{axis}")
    is_expression = re.fullmatch(r"[\w\s+*/-]+", dim) and symbols >= set(_NAME.findall(dim))
    return dim if is_expression else re.sub(r"\W", "_", dim)


def _match(spec: TensorSpec, shape: Sequence[Dimension], chosen: dict[str, Dimension]) -> None:
    """Check a given shape against an input, and note what it says of the input's symbols."""
    given = f"--input-shape {spec.name}:{','.join(map(_text, shape))}"
    if len(shape) != len(spec.shape):
        raise OptionError(
            f"{given} has {len(shape)} dimensions, but the model has {len(spec.shape)}: {spec}"
        )
    for size, dim in zip(shape, spec.shape, strict=True):
        if size == "?":
            continue
        if isinstance(dim, int):
            if size != dim and not (isinstance(size, range) and dim in size):
                raise OptionError(
                    f"{given} contradicts the model: {spec}", hint=f"its dimension {dim} is fixed"
                )
        elif chosen.setdefault(dim, size) != size:
            raise OptionError(
                f"{given} makes {dim} {_text(size)}, but it is {_text(chosen[dim])} already"
            )


def _substitute(spec: TensorSpec, chosen: Mapping[str, Dimension]) -> TensorSpec:
    """Replace symbols by sizes or other names, also inside of expressions of symbols."""

    def replacement(symbol: str) -> str:
        size = chosen.get(symbol)
        return symbol if size is None or isinstance(size, range) else str(size)

    def substitute(dim: int | str) -> int | str:
        if isinstance(dim, int):
            return dim
        if dim in chosen:
            text = replacement(dim)
        else:
            text = _NAME.sub(lambda match: replacement(match[0]), dim)
        return int(text) if text.isdecimal() else text

    return TensorSpec(spec.name, spec.dtype, tuple(map(substitute, spec.shape)))


def _text(dimension: Dimension) -> str:
    if isinstance(dimension, range):
        return f"{dimension[0]}..{dimension[-1]}"
    return str(dimension)
