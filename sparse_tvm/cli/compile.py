"""``sparse-tvm compile``: a model in, one ``.so`` out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_tvm.cli.options import AllowPickle, InputShapes, Quiet, Target
from sparse_tvm.collection import without_collection


def compile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model to compile.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The artifact to write."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would become sparse and how fast; write nothing."),
    ] = False,
    target: Target = "native",
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="0..1",
            help="Least sparsity that makes a layer sparse; by default predicted cost decides.",
        ),
    ] = None,
    format: Annotated[
        str, typer.Option(metavar="FORMAT", help="auto, dense, csr or bsr, for all layers.")
    ] = "auto",
    block: Annotated[
        str | None,
        typer.Option(
            metavar="RxC", help="BSR block: R consecutive outputs by C consecutive inputs."
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=FORMAT",
            help="Format of the layers whose name matches: csr, bsr:4x1 or dense, and with "
            "@ the precision: bsr:16x4@int8, @bf16. Repeatable.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="In which dense layers and attention compute: fp32, fp16 and bf16 "
            "(only stored in it where the target computes in float32), int8, or auto (the lowest "
            "that makes a layer faster and keeps --min-cosine); by default fp32, a 16-bit model's "
            "own, and fp16 on GPUs.",
        ),
    ] = None,
    input_shape: InputShapes = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Threads it uses unless told otherwise when loaded."),
    ] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="What `sparse-tvm tune` measured: it decides. Repeatable."
        ),
    ] = None,
    shipped_records: Annotated[
        bool,
        typer.Option(help="Whether the package's own measurements decide where FILE has none."),
    ] = True,
    dump_ir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the module here after each phase."),
    ] = None,
    check_passes: Annotated[
        bool,
        typer.Option("--check-passes", help="Check the module, and each pass's promises."),
    ] = False,
    save_ir: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Save the imported module; it can be compiled itself."
        ),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Write a .html, .md or .json report. Repeatable."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(help="Compare with the model's own framework on random inputs."),
    ] = True,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="X",
            help="Largest absolute difference --verify accepts: 1e-4, in 16 bits 1e-2.",
        ),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Least cosine that --verify accepts in low precision, 0.9, and of quantised "
            "models and with --precision auto, 0.99.",
        ),
    ] = None,
    verify_inputs: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Inputs to verify on, instead of random ones."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Data on which int8 layers find static scales: an .npz with an array per input, "
            "a .txt of sentences or a folder of images.",
        ),
    ] = None,
    calibration_method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How a range is found on that data: minmax, entropy or percentile.",
        ),
    ] = "minmax",
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
) -> None:
    """Compile MODEL into one .so that skips the zeros of its weights."""
    from sparse_tvm.cli.checks import check_target
    from sparse_tvm.errors import OptionError
    from sparse_tvm.files import check_writable
    from sparse_tvm.frontends.input_shapes import parse_input_shapes
    from sparse_tvm.frontends.kinds import check_model

    started = time.perf_counter()
    check_model(model)
    check_target(target)

    from sparse_tvm.passes.formats import FormatOptions

    FormatOptions.parse(
        format=format,
        block=block,
        threshold=threshold,
        rules=layer or (),
        precision="fp32" if precision in (None, "auto") else precision,
    )
    input_shapes = parse_input_shapes(input_shape or ())
    if report:
        from sparse_tvm.report import check_report_path

        for path in report:
            check_report_path(path)
    if dry_run:
        writing = {
            "--output": output,
            "--dump-ir": dump_ir,
            "--save-ir": save_ir,
            "--report": report,
        }
        if given := [name for name, value in writing.items() if value]:
            raise OptionError(f"--dry-run writes nothing, but {given[0]} was given")
        if calibrate is not None:
            raise OptionError("--dry-run finds no static scales, but --calibrate was given")
    elif output is None:
        raise OptionError("no --output", hint="-o model.so, or --dry-run")
    else:
        check_writable(output)

    from sparse_tvm.cli.console import stderr_console, stdout_console
    from sparse_tvm.cli.progress import PhaseProgress

    # Little of a compiler is garbage before its process ends.
    with without_collection(), PhaseProgress(stderr_console(), quiet=quiet) as progress:
        progress("load the compiler")
        from sparse_tvm.npz import read_npz

        how: dict[str, Any] = {
            "target": target,
            "threshold": threshold,
            "format": format,
            "block": block,
            "layer_rules": layer or (),
            "precision": precision,
            "input_shapes": input_shapes,
            "threads": threads,
            "records": records or (),
            "shipped_records": shipped_records,
            "allow_pickle": allow_pickle,
            "progress": progress,
        }
        if output is None:
            from sparse_tvm.compiler import preview

            manifest = preview(model, **how)
        else:
            from sparse_tvm.compiler import compile

            result = compile(
                model,
                output,
                **how,
                dump_ir=dump_ir,
                check_passes=check_passes or None,
                save_ir=save_ir,
                report=report or None,
                verify=verify,
                tolerance=tolerance,
                min_cosine=min_cosine,
                verify_inputs=read_npz(verify_inputs) if verify_inputs else None,
                calibrate=calibrate,
                calibration_method=calibration_method,
                started=started,
            )
            manifest = result.manifest
    if not quiet:
        from sparse_tvm.report.tables import print_preview, print_summary

        if output is None:
            print_preview(stdout_console(), manifest)
        else:
            print_summary(stdout_console(), manifest, output)
