"""``sparse-tvm run``: run a compiled model once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_tvm.cli.options import Device, Shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from rich.table import Table


def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL.so", help="The compiled model.")],
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", "-i", metavar="FILE.npz", help="One array per input, by name."),
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Make up the inputs instead of reading them.")
    ] = False,
    shape: Shapes = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --random.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.npz", help="Write all outputs here."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="By default as compiled, else every core.")
    ] = None,
    device: Device = None,
) -> None:
    """Run MODEL.so once and show what it returns."""
    from sparse_tvm.cli.checks import check_artifact
    from sparse_tvm.cli.sweep import split_sweeps
    from sparse_tvm.errors import OptionError
    from sparse_tvm.frontends.input_shapes import parse_input_shapes

    if (inputs is None) != random:
        raise OptionError("give either -i FILE.npz or --random", hint="--random makes inputs up")
    if shape and not random:
        raise OptionError("--shape is of --random inputs", hint="-i has shapes of its own")
    check_artifact(model)
    given, combinations = split_sweeps(shape or ())
    if len(combinations) > 1:
        raise OptionError("--shape gives several sizes, and run runs once", hint="see bench")
    shapes = parse_input_shapes(given, "--shape")

    from sparse_tvm.cli.console import stdout_console
    from sparse_tvm.npz import read_npz, write_npz
    from sparse_tvm.random_inputs import chosen_sizes, random_inputs
    from sparse_tvm.runtime import load

    loaded = load(model, threads=threads, device=device)
    if inputs is None:
        sizes = chosen_sizes(loaded.inputs, loaded.bounds, shapes, combinations[0])
        arrays = random_inputs(loaded.inputs, seed, sizes)
    else:
        arrays = read_npz(inputs)
    outputs = loaded.run(arrays)
    if output is not None:
        write_npz(output, outputs)
    stdout_console().print(_table(outputs))


def _table(outputs: Mapping[str, np.ndarray]) -> Table:
    from rich.text import Text

    from sparse_tvm.cli.tables import plain_table, shape_cell

    statistics = ("min", "mean", "max")
    table = plain_table("output", "dtype", "shape", *statistics, numbers=statistics)
    for name, array in outputs.items():
        values = (array.min(), array.mean(), array.max()) if array.size else ()
        table.add_row(
            Text(name),
            array.dtype.name,
            shape_cell(array.shape) or "scalar",
            *[f"{float(value):.6g}" for value in values],
        )
    return table
