"""Option values that are more than a string, a number or a path."""

from __future__ import annotations

from collections.abc import Iterable

from sparse_tvm.errors import OptionError


def parse_input_shapes(values: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Parse ``NAME:1,128`` values into shapes by input name.

    The last colon separates, since exported names may contain colons (``input:0``).

    Raises
    ------
    OptionError
        When a value has another form, a dimension is not positive, or a name comes twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for value in values:
        name, colon, dims = value.rpartition(":")
        try:
            shape = tuple(int(dim) for dim in dims.split(","))
        except ValueError:
            shape = ()
        if not (name and colon and shape) or min(shape) < 1:
            raise OptionError(
                f"--input-shape {value!r} is not of the form NAME:DIM,DIM,... with positive sizes",
                hint="for example --input-shape input_ids:1,128",
            )
        if name in shapes:
            raise OptionError(
                f"--input-shape is given twice for input {name!r}", hint="keep one of them"
            )
        shapes[name] = shape
    return shapes
