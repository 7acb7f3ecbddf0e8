"""The compiler: a model in, one artifact out. This file is the pipeline, top to bottom."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from sparse_tvm import __version__
from sparse_tvm.artifact import read_manifest, rewrite_manifest, write_artifact
from sparse_tvm.backends import resolve_target
from sparse_tvm.cpu import cpu_model
from sparse_tvm.errors import OptionError, OutputError
from sparse_tvm.files import check_writable, replacing
from sparse_tvm.frontends.detect import open_source
from sparse_tvm.frontends.importer.model import ImportedModel
from sparse_tvm.frontends.input_shapes import InputShapes
from sparse_tvm.frontends.ir.source import check_ir_path, write_ir
from sparse_tvm.frontends.source import SourceOptions, copy_companions
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.pipeline import phases as pipeline
from sparse_tvm.passes.program import Program
from sparse_tvm.passes.set_precision import check_precisions, has_kernels
from sparse_tvm.report import check_report_path, write_report
from sparse_tvm.targets import NATIVE
from sparse_tvm.tuning.evidence import Evidence
from sparse_tvm.tuning.records import read_records
from sparse_tvm.verification import (
    LEAST_COSINE,
    LEAST_COSINE_QUANTISED,
    TOLERANCE,
    TOLERANCE_16_BIT,
    Bound,
    NotVerified,
    compare_with_reference,
)

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
    dump_ir: PathLike | None = None,
    save_ir: PathLike | None = None,
    report: PathLike | Sequence[PathLike] | None = None,
    verify: bool = True,
    tolerance: float | None = None,
    min_cosine: float | None = None,
    verify_inputs: Mapping[str, np.ndarray] | None = None,
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
        weights are rounded per output, activations per token. By default ``fp32``, or ``bf16`` for
        a model of bfloat16 where the target has it.
    input_shapes : InputShapes | None
        Shapes of inputs by name, each dimension a fixed size, a name, or a ``range`` of sizes;
        dimensions that are symbolic in the model stay so otherwise.
    threads : int | None
        Threads the artifact uses unless told otherwise when loaded; by default all cores there.
    records : Sequence[path]
        What ``sparse-tvm tune`` measured: it decides before predictions do. For ``native`` only
        records of this machine's CPU count, for a target by name those of any of its CPUs.
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
        and 0.99 where the model is quantised and nothing else in low precision.
    verify_inputs : Mapping[str, np.ndarray] | None
        Inputs to compare on, instead of random ones.
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
    started = now if started is None else started
    backend, chosen_target = resolve_target(target)
    options = FormatOptions.parse(
        format=format,
        block=block,
        threshold=threshold,
        rules=layer_rules,
        precision=precision or "fp32",
    )
    measured = read_records(records, cpu_model() if target == NATIVE else None)
    context = Context(backend, chosen_target, options, Evidence(measured, threads))
    check_precisions(context)
    if min_cosine is not None and not 0 <= min_cosine <= 1:
        raise OptionError(f"the least cosine must be from 0 to 1, not {min_cosine}")
    if threads is not None and threads < 1:
        raise OptionError(f"threads must be at least 1, not {threads}")
    reports = [report] if isinstance(report, str | os.PathLike) else list(report or ())
    for path in reports:
        check_report_path(path)
    check_writable(output)
    if save_ir is not None:
        check_ir_path(save_ir)
    phases = _Phases(progress, Path(dump_ir) if dump_ir is not None else None)
    if started < now:
        phases.seconds["load the compiler"] = now - started

    with phases("import"):
        source = open_source(
            model,
            SourceOptions(
                example_inputs=example_inputs,
                dynamic_shapes=dynamic_shapes,
                allow_pickle=allow_pickle,
                input_shapes=input_shapes or {},
            ),
        )
        imported = source.load(input_shapes)
        if save_ir is not None:
            write_ir(source, imported, save_ir)
        program = Program(imported.module, dict(imported.weights), dict(imported.layers))
        context = in_model_precision(context, imported, precision)
        options = context.options
        if tolerance is None:
            tolerance = TOLERANCE_16_BIT if imported.widened else TOLERANCE
        rounded = options.precisions != ["fp32"]
        if min_cosine is None:
            min_cosine = LEAST_COSINE if rounded else LEAST_COSINE_QUANTISED
        bound = Bound(tolerance, min_cosine if rounded or imported.quantised else None)
        totals = _model_totals(program)
        phases.program = program
    for phase in pipeline(backend):
        with phases(phase.name):
            program = phases.program = phase.run(program, context, check=check_passes)
    _check_rules(options, program)
    with phases("build"):
        code = backend.generate(program, chosen_target)

    manifest = {
        "versions": {
            "sparse_tvm": __version__,
            "tvm": tvm.__version__,
            "tvm_ffi": _distribution_version("apache-tvm-ffi"),
        },
        "model": source.describe(),
        "backend": backend.name,
        "device": backend.device,
        "target": chosen_target.as_json(),
        "threads": threads,
        "inputs": [spec.as_json() for spec in imported.inputs],
        "outputs": [spec.as_json() for spec in imported.outputs],
        "bounds": {name: list(bounds) for name, bounds in imported.bounds.items()},
        "layers": [layer.as_json() for layer in program.reports.values()],
        "notes": [*measured.remarks, *source.notes(), *imported.notes, *program.notes],
        "totals": {**totals, "weight_bytes": sum(w.nbytes for w in program.weights.values())},
        "verification": None,
        "unverified": None if verify else "compiled with --no-verify",
        "kernels": program.kernels,
        "compile": {"seconds": 0.0, "peak_memory_bytes": 0, "phases": []},  # known at the end
    }
    with replacing(output) as unverified:
        with phases("link"), tempfile.TemporaryDirectory() as directory:
            library = Path(directory) / "library.so"
            backend.write_library(code, chosen_target, library)
            write_artifact(unverified, library, program.weights, manifest)
        if verify:
            with phases("verify"):
                try:
                    manifest["verification"] = compare_with_reference(
                        unverified, imported, source, chosen_target, bound, verify_inputs
                    )
                except NotVerified as reason:
                    manifest["unverified"] = str(reason)
        manifest["compile"] = {
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": _peak_memory_bytes(),
            "phases": phases.as_json(),
        }
        rewrite_manifest(unverified, manifest)
        manifest = read_manifest(unverified)
    copy_companions(source, output)
    for path in reports:
        write_report(manifest, path)
    return CompileResult(Path(output), manifest)


@dataclass
class _Phases:
    """Names, times and dumps the pipeline's phases."""

    progress: Callable[[str], None] | None
    dump_directory: Path | None
    program: Program | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.progress is not None:
            self.progress(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self._dump(name)

    def _dump(self, name: str) -> None:
        if self.dump_directory is None or self.program is None or name in ("link", "verify"):
            return
        path = self.dump_directory / f"{len(self.seconds):02}_{name.replace(' ', '_')}.py"
        try:
            self.dump_directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create {self.dump_directory}: {error.strerror}") from error
        with replacing(path) as temporary:
            temporary.write_text(self.program.module.script(), encoding="utf-8")

    def as_json(self) -> list[dict[str, Any]]:
        return [{"name": n, "seconds": round(s, 3)} for n, s in self.seconds.items()]


def in_model_precision(context: Context, imported: ImportedModel, precision: str | None) -> Context:
    """The context for a model that may bring its own precision: bf16, or integers."""
    options = context.options
    if precision is None and "bfloat16" in imported.widened and has_kernels(context, "bf16"):
        options = replace(options, precision="bf16")
    if precision in (None, "int8") and imported.quantised:
        options = replace(options, integers=True)
    return replace(context, options=options)


def _check_rules(options: FormatOptions, program: Program) -> None:
    """Refuse a layer rule that matches nothing: most likely it is misspelt."""
    for rule in options.rules:
        if not any(rule.pattern.search(layer) for layer in program.reports):
            names = ", ".join(list(program.reports)[:5])
            raise OptionError(f"layer rule {rule.text!r} matches no layer", hint=f"such as {names}")


def _model_totals(program: Program) -> dict[str, int]:
    weights = program.weights.values()
    return {
        "parameters": sum(w.size for w in weights),
        "nonzeros": sum(int(np.count_nonzero(w)) for w in weights),
    }


def _distribution_version(name: str) -> str:
    from importlib import metadata

    return metadata.version(name)


def _peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
