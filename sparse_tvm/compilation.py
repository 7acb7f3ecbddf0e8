"""One model on its way through the compiler, phase by phase."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from sparse_tvm import __version__
from sparse_tvm.errors import OptionError, OutputError
from sparse_tvm.files import replacing
from sparse_tvm.frontends.detect import open_source
from sparse_tvm.frontends.importer.model import ImportedModel
from sparse_tvm.frontends.source import Source, SourceOptions
from sparse_tvm.passes.formats import FormatOptions, LayerRule
from sparse_tvm.passes.image_turns import image_turns
from sparse_tvm.passes.infrastructure import Context, Phase
from sparse_tvm.passes.program import Program
from sparse_tvm.passes.set_precision import has_kernels
from sparse_tvm.spec import multiples_of


@dataclass
class Phases:
    """Names, times and dumps what is done to a program.

    Attributes
    ----------
    progress : Callable[[str], None] | None
        Called with each phase's name as it starts.
    dump_directory : Path | None
        Where the module goes after each phase, as TVMScript.
    started : float
        When the work began, by ``time.perf_counter()``.
    """

    progress: Callable[[str], None] | None
    dump_directory: Path | None
    started: float
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what happens under a name."""
        if self.progress is not None:
            self.progress(name)
        started = time.perf_counter()
        yield
        took = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + took

    def dump(self, program: Program) -> None:
        """Write the module as the last phase left it, where that was asked for."""
        if self.dump_directory is None:
            return
        name = list(self.seconds)[-1].replace(" ", "_")
        path = self.dump_directory / f"{len(self.seconds):02}_{name}.py"
        try:
            self.dump_directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create {self.dump_directory}: {error.strerror}") from error
        with replacing(path) as temporary:
            temporary.write_text(program.module.script(), encoding="utf-8")

    def as_json(self) -> dict[str, Any]:
        """What the compile took so far, as the manifest has it."""
        return {
            "seconds": round(time.perf_counter() - self.started, 3),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "phases": [{"name": n, "seconds": round(s, 3)} for n, s in self.seconds.items()],
        }


@dataclass
class Compilation:
    """A model, what it has become so far, and why.

    Attributes
    ----------
    source : Source
        The model's file or object.
    imported : ImportedModel
        What came of it, before any pass.
    program : Program
        What the passes made of that.
    context : Context
        Backend, target, options and measurements that passes decide by.
    totals : dict[str, int]
        The model's parameters, and how many are not zero.
    """

    source: Source
    imported: ImportedModel
    program: Program
    context: Context
    phases: Phases
    totals: dict[str, int]

    @classmethod
    def of(
        cls,
        model: Any,
        options: SourceOptions,
        context: Context,
        precision: str | None,
        phases: Phases,
    ) -> Compilation:
        """Import a model, which may be a `Source` already."""
        with phases("import"):
            source = open_source(model, options)
            imported = source.load(options.input_shapes or None)
            program = Program(imported.module, dict(imported.weights), dict(imported.layers))
            context = in_model_precision(context, imported, precision)
            totals = _totals(program.weights.values())
        phases.dump(program)
        return cls(source, imported, program, context, phases, totals)

    def run(self, phases: Sequence[Phase], check: bool | None = None) -> None:
        """Run passes, and dump the module after each phase."""
        for phase in phases:
            with self.phases(phase.name):
                self.program = phase.run(self.program, self.context, check=check)
            self.phases.dump(self.program)

    def manifest(self) -> dict[str, Any]:
        """What there is to say of the program, but for its file and its verification."""
        program, target = self.program, self.context.target
        return {
            "versions": {
                "sparse_tvm": __version__,
                "tvm": tvm.__version__,
                "tvm_ffi": _distribution_version("apache-tvm-ffi"),
            },
            "model": self.source.describe(),
            "backend": self.context.backend.name,
            "device": self.context.backend.device,
            "target": target.as_json(),
            "threads": self.context.evidence.threads,
            "inputs": [spec.as_json() for spec in self.imported.inputs],
            "outputs": [spec.as_json() for spec in self.imported.outputs],
            "bounds": {name: list(bounds) for name, bounds in self.imported.bounds.items()},
            **self._turns(),
            "layers": [layer.as_json() for layer in program.reports.values()],
            "notes": [
                *self.context.evidence.records.remarks,
                *self.source.notes(),
                *self.imported.notes,
                *program.notes,
            ],
            "totals": {
                **self.totals,
                "weight_bytes": sum(w.nbytes for w in program.weights.values()),
            },
            "verification": None,
            "unverified": None,
            "kernels": program.kernels,
            "compile": self.phases.as_json(),
        }

    def _turns(self) -> dict[str, Any]:
        """What a run of many images may do, if each is computed for itself, and may be alone."""
        turns = image_turns(self.imported.module["main"], len(self.imported.inputs))
        if turns is None or turns.dimension in multiples_of(self.imported.inputs):
            return {}
        alone = self.imported.bounds.get(turns.dimension, (1, 1))[0] <= 1
        return {"turns": vars(turns)} if alone else {}


def in_model_precision(context: Context, imported: ImportedModel, precision: str | None) -> Context:
    """The context for a model that may bring its own precision: 16 bits, or integers.

    A model that mixes 16 bits with float32 keeps both: weights that its 16 bits do not hold stay
    float32, unless the user has a rule for them, or the backend rounds models of float32 anyway.
    Not so in quantised models, whose weights hold integers times steps.
    """
    options = context.options
    keeps = context.backend.precision == "fp32" and not imported.quantised
    if precision is None:
        for dtype, name in (("bfloat16", "bf16"), ("float16", "fp16")):
            if dtype in imported.widened and has_kernels(context, name):
                wider = _wider(imported, dtype) if keeps else []
                wide = [LayerRule.of_layer(layer, "fp32") for layer in wider]
                options = replace(options, precision=name, rules=(*wide, *options.rules))
                break
    if precision in (None, "int8") and imported.quantised:
        options = replace(options, integers=True)
    return replace(context, options=options)


def _wider(imported: ImportedModel, dtype: str) -> list[str]:
    """Name the layers and tables with weights of float32 that a type of 16 bits does not hold."""
    return [
        imported.layers.get(name, name)
        for name, array in imported.weights.items()
        if array.ndim > 1 and array.dtype == np.float32 and not _holds(dtype, array)
    ]


def _holds(dtype: str, array: np.ndarray) -> bool:
    """Whether all of an array's numbers are of a type of 16 bits."""
    if dtype == "bfloat16":  # the upper half of a float32
        return not np.any(array.view(np.uint32) << 16)
    with np.errstate(over="ignore"):
        return np.array_equal(array.astype(dtype), array)


def check_rules(options: FormatOptions, program: Program) -> None:
    """Refuse a layer rule that matches nothing: most likely it is misspelt."""
    for rule in options.rules:
        if not any(rule.pattern.search(layer) for layer in program.reports):
            names = ", ".join(list(program.reports)[:5])
            raise OptionError(f"layer rule {rule.text!r} matches no layer", hint=f"such as {names}")


def _totals(weights: Collection[np.ndarray]) -> dict[str, int]:
    return {
        "parameters": sum(w.size for w in weights),
        "nonzeros": sum(int(np.count_nonzero(w)) for w in weights),
    }


def _distribution_version(name: str) -> str:
    from importlib import metadata

    return metadata.version(name)
