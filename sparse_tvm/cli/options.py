"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="NAME:DIMS",
        help="Fix an input's shape, as in input_ids:1,128. Repeatable.",
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Unpickle a model that is a pickle. Runs any code in it: only if you trust it.",
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME:DIMS",
        help="Shape of a random input, as in input_ids:8,128, or the size of a symbolic dimension, "
        "as in batch=8. Repeatable.",
    ),
]
Target = Annotated[
    str,
    typer.Option(metavar="NAME", help="native, or a CPU or board that `sparse-tvm targets` lists."),
]
HugePages = Annotated[
    bool,
    typer.Option(
        "--huge-pages",
        help="Weights in memory of its own, in large pages: faster for few tokens, not shared.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Such as cuda:1; by default the first that MODEL is for."),
]
Layers = Annotated[
    str | None, typer.Option(metavar="REGEX", help="Prune only the layers whose name matches.")
]
Exclude = Annotated[
    str | None, typer.Option(metavar="REGEX", help="Leave the layers whose name matches.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
