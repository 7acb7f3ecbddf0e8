"""The compiler: a model in, one artifact out. This file is the pipeline, top to bottom."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tvm.artifact import read_manifest, rewrite_manifest, write_artifact
from sparse_tvm.backends import resolve_target
from sparse_tvm.compilation import Compilation, Phases, check_rules
from sparse_tvm.errors import OptionError, VerificationError
from sparse_tvm.files import check_writable, replacing
from sparse_tvm.frontends.input_shapes import InputShapes
from sparse_tvm.frontends.ir.source import check_ir_path, write_ir
from sparse_tvm.frontends.source import SourceOptions, copy_companions
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.pipeline import graph_phases
from sparse_tvm.passes.pipeline import phases as pipeline
from sparse_tvm.passes.set_precision import check_precisions
from sparse_tvm.quantising.choice import (
    AUTO,
    Calibration,
    Quantising,
    check_calibration,
    ladder_of,
)
from sparse_tvm.quantising.judge import Judge
from sparse_tvm.report import check_report_path, write_report
from sparse_tvm.sparsity.calibration import Data
from sparse_tvm.tuning.evidence import Evidence
from sparse_tvm.tuning.shipped import evidence_for

PathLike = str | os.PathLike[str]


@dataclass
class CompileResult:
    """What :func:`compile` made.

    Attributes
    ----------
    path : Path
        The artifact.
    manifest : dict[str, Any]
        Everything there is to say about it: target, layers with formats and reasons, totals,
        phases, verification (see ``docs/formats.md``).
    """

    path: Path
    manifest: dict[str, Any]


def compile(
    model: Any,
    output: PathLike,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    allow_pickle: bool = False,
    target: str = "native",
    threshold: float | None = None,
    format: str = "auto",
    block: str | None = None,
    layer_rules: Sequence[str] = (),
    precision: str | None = None,
    input_shapes: InputShapes | None = None,
    threads: int | None = None,
    records: Sequence[PathLike] = (),
    shipped_records: bool = True,
    dump_ir: PathLike | None = None,
    save_ir: PathLike | None = None,
    report: PathLike | Sequence[PathLike] | None = None,
    verify: bool = True,
    tolerance: float | None = None,
    min_cosine: float | None = None,
    verify_inputs: Mapping[str, np.ndarray] | None = None,
    calibrate: Data | None = None,
    calibration_method: str = "minmax",
    check_passes: bool | None = None,
    progress: Callable[[str], None] | None = None,
    started: float | None = None,
) -> CompileResult:
    """Compile a model into one artifact.

    Parameters
    ----------
    model : path, torch.nn.Module, keras.Model or onnx.ModelProto
        A model of any kind that ``docs/sources.md`` lists; files are told by content.
    output : path
        The artifact to write. It appears complete and verified, or not at all. A tokenizer's
        files go to ``<output>.tokenizer`` (in place of its suffix) beside it.
    example_inputs : tuple | Mapping[str, Any] | None
        For an ``nn.Module``: positional or keyword arguments to trace it with.
    dynamic_shapes : Any
        For an ``nn.Module``: as ``torch.export.export`` takes it; all are fixed by default.
    allow_pickle : bool
        Unpickle a file that is a pickle, which runs whatever code is in it.
    target : str
        A name in ``sparse_tvm.targets.TARGETS``, or ``native``.
    threshold : float | None
        Layers with a smaller share of zeros stay dense; by default predicted cost decides.
    format, block : str, str | None
        ``auto``, ``dense``, ``csr`` or ``bsr``, and BSR's block as ``"RxC"``, for all layers.
    layer_rules : Sequence[str]
        Exceptions, ``"REGEX=csr|bsr:RxC|dense"``; the last that matches a layer's name counts.
        ``"REGEX=bsr:16x4@int8"`` or ``"REGEX=@int8"`` sets the precision too.
    precision : str | None
        ``fp32``, or ``bf16`` or ``int8`` for dense layers and attention where the target has it:
        weights are rounded per output, activations per token. ``fp16`` on GPUs, where it is the
        default and all activations have it. By default ``fp32`` elsewhere, or ``bf16`` for
        a model of bfloat16 where the target has it. ``auto`` measures what each dense layer does
        to the outputs in int8, and raises those that hurt most to bf16, fp16 or float32 until
        `min_cosine` holds; no layer is in a precision that is not predicted to make it faster.
    input_shapes : InputShapes | None
        Shapes of inputs by name, each dimension a fixed size, a name, or a ``range`` of sizes;
        dimensions that are symbolic in the model stay so otherwise.
    threads : int | None
        Threads the artifact uses unless told otherwise when loaded; by default all cores there.
    records : Sequence[path]
        What ``sparse-tvm tune`` measured: it decides before predictions do. For ``native`` only
        records of this machine's CPU count, for a target by name those of any of its CPUs.
    shipped_records : bool
        Whether those that come with the package decide where ``records`` know nothing.
    dump_ir : path | None
        Directory for the module after each phase, as TVMScript.
    save_ir : path | None
        ``.json`` file for the imported module, with its weights in safetensors beside it; it
        can be compiled in place of the model.
    report : path or paths | None
        ``.html``, ``.md`` or ``.json`` files to write.
    verify : bool
        Compare with the model's own framework on random inputs; another architecture's code in
        an emulator, and where there is none the manifest says that it was not verified.
    tolerance : float | None
        Largest absolute difference accepted, relative to the output's largest value if that is
        above 1; by default 1e-4, and 1e-2 for a model of 16-bit floats.
    min_cosine : float | None
        For layers in low precision and for quantised models, instead of the tolerance: the least
        cosine of any row (along the last axis) of an output with the reference's; by default 0.9,
        and 0.99 where the model is quantised and nothing else in low precision, or the precision
        ``auto``.
    verify_inputs : Mapping[str, np.ndarray] | None
        Inputs to compare on, instead of random ones: one call's, or any number of samples of a
        model whose batch is fixed. In low precision, the layers that hurt most are named.
    calibrate : path or mapping | None
        Data on which int8 layers find static scales, instead of one per token at run time; as
        :func:`sparse_tvm.prune` takes it. With it, convolutions of images are int8 layers, too.
        ``auto`` measures on it, unless there are `verify_inputs`.
    calibration_method : str
        How ONNX Runtime finds a tensor's range on it: ``minmax``, ``entropy`` or ``percentile``.
    check_passes : bool | None
        Check the module, and what each pass promises, after every pass; by default where
        ``SPARSE_TVM_CHECK_PASSES`` is 1.
    progress : Callable[[str], None] | None
        Called with each phase's name as it starts.
    started : float | None
        When the work began, by ``time.perf_counter()``, if that was before this call, with the
        loading of the compiler; the time until now becomes a phase.

    Raises
    ------
    SparseTvmError
        A subclass that says what is wrong with the model, an option, the output or the result.
    """
    now = time.perf_counter()
    calibration = None if calibrate is None else Calibration(calibrate, calibration_method)
    measured = _evidence(records, shipped_records, target, threads)
    context, ladder = _context_and_ladder(
        target, format, block, threshold, layer_rules, precision, measured, calibration
    )
    if min_cosine is not None and not 0 <= min_cosine <= 1:
        raise OptionError(f"the least cosine must be from 0 to 1, not {min_cosine}")
    reports = [report] if isinstance(report, str | os.PathLike) else list(report or ())
    for path in reports:
        check_report_path(path)
    check_writable(output)
    if save_ir is not None:
        check_ir_path(save_ir)
    phases = Phases(progress, Path(dump_ir) if dump_ir is not None else None, started or now)
    if started is not None:
        phases.seconds["load the compiler"] = now - started

    opened = SourceOptions(example_inputs, dynamic_shapes, allow_pickle, input_shapes or {})
    compilation = Compilation.of(model, opened, context, precision, phases)
    if save_ir is not None:
        write_ir(compilation.source, compilation.imported, save_ir)
    judge = Judge.of(compilation, verify_inputs, tolerance, min_cosine, chosen=bool(ladder))
    quantising = _quantising(compilation, ladder, calibration, judge)
    while True:
        if quantising is not None:
            compilation = _as_chosen(compilation, quantising, opened)
        compilation.run(pipeline(context.backend), check_passes)
        check_rules(context.options, compilation.program)
        check = partial(judge.verification, compilation, quantising) if verify else None
        try:
            manifest = _write(compilation, Path(output), check)
            break
        except VerificationError:
            if quantising is None or not quantising.raise_more():
                raise
    copy_companions(compilation.source, output)
    for path in reports:
        write_report(manifest, path)
    return CompileResult(Path(output), manifest)


def _write(
    compilation: Compilation, output: Path, check: Callable[[Path], dict[str, Any]] | None
) -> dict[str, Any]:
    """Generate code and write the artifact, if it passes the check; return its manifest."""
    context, phases = compilation.context, compilation.phases
    with phases("build"):
        code = context.backend.generate(compilation.program, context.target)
    phases.dump(compilation.program)
    with replacing(output) as unverified:
        manifest = compilation.manifest()
        with phases("link"), tempfile.TemporaryDirectory() as directory:
            library = Path(directory) / "library.so"
            context.backend.write_library(code, context.target, library)
            write_artifact(unverified, library, compilation.program.weights, manifest)
        if check is not None:
            with phases("verify"):
                manifest |= check(unverified)
        else:
            manifest["unverified"] = "compiled with --no-verify"
        manifest["compile"] = phases.as_json()
        rewrite_manifest(unverified, manifest)
        return read_manifest(unverified)


def preview(
    model: Any,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    allow_pickle: bool = False,
    target: str = "native",
    threshold: float | None = None,
    format: str = "auto",
    block: str | None = None,
    layer_rules: Sequence[str] = (),
    precision: str | None = None,
    input_shapes: InputShapes | None = None,
    threads: int | None = None,
    records: Sequence[PathLike] = (),
    shipped_records: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Say what would become of each layer, and how fast that would be; build and write nothing.

    Parameters
    ----------
    model : path, torch.nn.Module, keras.Model or onnx.ModelProto
        As :func:`compile` takes it, and all the rest.

    Returns
    -------
    dict[str, Any]
        What the artifact's manifest would say of target, inputs, outputs, layers and totals (see
        ``docs/formats.md``).

    Raises
    ------
    SparseTvmError
        As :func:`compile` does, as far as it would get.
    """
    measured = _evidence(records, shipped_records, target, threads)
    context, ladder = _context_and_ladder(
        target, format, block, threshold, layer_rules, precision, measured, None
    )
    opened = SourceOptions(example_inputs, dynamic_shapes, allow_pickle, input_shapes or {})
    phases = Phases(progress, None, time.perf_counter())
    compilation = Compilation.of(model, opened, context, precision, phases)
    judge = Judge.of(compilation, None, None, None, chosen=bool(ladder))
    quantising = _quantising(compilation, ladder, None, judge)
    if quantising is not None:
        compilation = _as_chosen(compilation, quantising, opened)
    compilation.run(graph_phases())
    check_rules(context.options, compilation.program)
    return compilation.manifest()


def context_of(
    target: str,
    format: str,
    block: str | None,
    threshold: float | None,
    layer_rules: Sequence[str],
    precision: str | None,
    measured: Evidence,
) -> Context:
    """What passes decide by, from what :func:`compile` was told."""
    backend, chosen_target = resolve_target(target)
    options = FormatOptions.parse(
        format=format,
        block=block,
        threshold=threshold,
        rules=layer_rules,
        precision=precision or backend.precision,
    )
    context = Context(backend, chosen_target, options, measured)
    check_precisions(context)
    return context


def _evidence(
    records: Sequence[PathLike], shipped: bool, target: str, threads: int | None
) -> Evidence:
    """What is known of layers, from what :func:`compile` was told."""
    if threads is not None and threads < 1:
        raise OptionError(f"threads must be at least 1, not {threads}")
    return evidence_for(target, records, threads, shipped=shipped)


def _context_and_ladder(
    target: str,
    format: str,
    block: str | None,
    threshold: float | None,
    layer_rules: Sequence[str],
    precision: str | None,
    measured: Evidence,
    calibration: Calibration | None,
) -> tuple[Context, list[str]]:
    """The context, in the lowest precision where it is ``auto``, and what that chooses among."""
    fixed = None if precision == AUTO else precision
    context = context_of(target, format, block, threshold, layer_rules, fixed, measured)
    ladder: list[str] = []
    if precision == AUTO:
        ladder = ladder_of(context)
        context = replace(context, options=replace(context.options, precision=ladder[0]))
    if calibration is not None:
        check_calibration(context.options, calibration)
    return context, ladder


def _quantising(
    compilation: Compilation,
    ladder: Sequence[str],
    calibration: Calibration | None,
    judge: Judge,
) -> Quantising | None:
    """What was measured before the compile, if anything was to be."""
    if not ladder and calibration is None:
        return None
    with compilation.phases("choose precision"):
        source, context, imported = compilation.source, compilation.context, compilation.imported
        quantising = Quantising(source, context, imported, calibration)
        if ladder:
            feeds = judge.real_feeds or quantising.batches or judge.feeds
            quantising.search(ladder, judge.least_cosine, feeds)
    return quantising


def _as_chosen(
    compilation: Compilation, quantising: Quantising, opened: SourceOptions
) -> Compilation:
    """Start a compilation anew, with the precision and the scales that were chosen."""
    options = quantising.options
    context = replace(compilation.context, options=options)
    source, phases = quantising.source, compilation.phases
    chosen = Compilation.of(source, opened, context, options.precision, phases)
    chosen.program.notes.extend(quantising.notes)
    return chosen
