"""Saved IR as a source: an imported module that was saved, with its weights beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax

from sparse_tvm import __version__
from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.files import check_writable, replacing
from sparse_tvm.frontends.detect import read_json
from sparse_tvm.frontends.importer.model import ImportedModel
from sparse_tvm.frontends.input_shapes import InputShapes
from sparse_tvm.frontends.ir import onnx_functions
from sparse_tvm.frontends.safetensors_file import TensorFile, write_tensors
from sparse_tvm.frontends.source import Source
from sparse_tvm.reference import ReferenceModel
from sparse_tvm.sparsity.sources import decode_bitmask, encode_bitmask, find_bitmasks
from sparse_tvm.spec import TensorSpec

FORMAT_VERSION = 2

_SPARSE_FROM = 0.5  # sparsity from which a bitmask and values are clearly smaller
_BITMASK_ORIGIN = "saved as bitmask"


def check_ir_path(path: str | os.PathLike[str]) -> None:
    """Refuse what `write_ir` could not write, before the work.

    Raises
    ------
    OptionError, OutputError
        When it does not end in ``.json``, or cannot be written.
    """
    if Path(path).suffix != ".json":
        raise OptionError(f"--save-ir {path}: must end in .json")
    check_writable(path)


def write_ir(source: Source, imported: ImportedModel, path: str | os.PathLike[str]) -> None:
    """Save an imported module as JSON, and its weights as safetensors beside it.

    Weights of which half or more is zero are stored as compressed-tensors' ``sparse-bitmask``.

    Raises
    ------
    OutputError
        When a file cannot be written.
    """
    path = Path(path)
    origins = source.origins()
    document = {
        "sparse_tvm_ir": FORMAT_VERSION,
        "versions": {"sparse_tvm": __version__, "tvm": tvm.__version__},
        "model": source.describe(),
        "inputs": [spec.as_json() for spec in imported.inputs],
        "outputs": [spec.as_json() for spec in imported.outputs],
        "bounds": imported.bounds,
        "layers": imported.layers,
        "widened": imported.widened,
        "quantised": imported.quantised,
        "weights": list(imported.weights),
        "origins": {name: origins[name] for name in imported.weights if name in origins},
        "module": tvm.ir.save_json(imported.module),
    }
    tensors: dict[str, np.ndarray] = {}
    for name, weight in imported.weights.items():
        zeros = 1 - np.count_nonzero(weight) / max(weight.size, 1)
        sparse = weight.ndim >= 2 and zeros >= _SPARSE_FROM
        tensors |= encode_bitmask(name, weight) if sparse else {name: weight}
    write_tensors(_weights_path(path), tensors)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document), encoding="utf-8")


class IrSource(Source):
    """A ``.json`` file that `write_ir` wrote."""

    kind = "sparse-tvm IR"

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), path)
        self._document = read_json(path)
        self._check_versions()
        self._file = TensorFile(_weights_path(path))

    def _check_versions(self) -> None:
        found = self._document["sparse_tvm_ir"]
        if found != FORMAT_VERSION:
            raise ModelError(
                f"{self.name}: IR format {found} is not {FORMAT_VERSION}, the one known here",
                hint="save it again with this version of sparse-tvm",
            )
        saved = self._document.get("versions", {}).get("tvm")
        if saved != tvm.__version__:
            raise ModelError(
                f"{self.name}: was saved with TVM {saved}, but TVM {tvm.__version__} is "
                "installed: modules do not carry over between versions",
                hint="save it again from the original model",
            )

    def load(self, input_shapes: InputShapes | None = None) -> ImportedModel:
        """See `Source.load`; the shapes are those it was saved with."""
        if input_shapes:
            raise OptionError(
                f"{self.name}: --input-shape does not apply: the module was imported already",
                hint="give it when saving with --save-ir",
            )
        document, module = self._document, self._module()
        return ImportedModel(
            module=module,
            weights=self._weights(),
            inputs=[TensorSpec.from_json(entry) for entry in document["inputs"]],
            outputs=[TensorSpec.from_json(entry) for entry in document["outputs"]],
            layers=document["layers"],
            source=self.name,
            bounds={name: (low, high) for name, (low, high) in document["bounds"].items()},
            widened=document["widened"],
            quantised=document["quantised"],
        )

    def _module(self) -> tvm.IRModule:
        try:
            return tvm.ir.load_json(self._document["module"])
        except Exception as error:
            raise ModelError(f"{self.name}: its module cannot be read: {error}") from error

    def _weights(self) -> dict[str, np.ndarray]:
        names = self._file.names()
        sparse = find_bitmasks(names)
        missing = [n for n in self._document["weights"] if n not in names | sparse]
        if missing:
            raise ModelError(f"{self._file.path}: weight {missing[0]} is missing")
        return {
            name: decode_bitmask(self._file.__getitem__, name)
            if name in sparse
            else self._file[name]
            for name in self._document["weights"]
        }

    def as_onnx(self) -> onnx.ModelProto:
        """Refuse: a saved module is Relax, not ONNX."""
        raise ModelError(
            f"{self.name}: is an imported module; it can only be compiled",
            hint=f"inspect or prune the model it came from: {self._document['model']['source']}",
        )

    def origins(self) -> Mapping[str, str]:
        """See `Source.origins`."""
        origins: dict[str, str] = self._document["origins"]
        stored = dict.fromkeys(find_bitmasks(self._file.names()), _BITMASK_ORIGIN)
        return {**stored, **origins}

    def describe(self) -> dict[str, Any]:
        """Return what the model was that the module came from."""
        described: dict[str, Any] = self._document["model"]
        return described

    def reference(self, threads: int) -> ReferenceModel:
        """Return the module compiled by TVM alone, without any pass or kernel of ours."""
        return TvmReference(self.load())


class TvmReference(ReferenceModel):
    """An imported module as TVM compiles it by itself: right, and slow."""

    engine = "TVM"
    version = tvm.__version__

    def __init__(self, imported: ImportedModel) -> None:
        self.inputs = [spec.name for spec in imported.inputs]
        self.outputs = [spec.name for spec in imported.outputs]
        self._weights = [tvm.runtime.tensor(np.array(w)) for w in imported.weights.values()]
        onnx_functions.register()
        executable = tvm.compile(imported.module, target="llvm")
        self._run = relax.VirtualMachine(executable, tvm.cpu())["main"]

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """See `ReferenceModel.run`."""
        tensors = [tvm.runtime.tensor(np.array(inputs[name])) for name in self.inputs]
        result = self._run(*tensors, *self._weights)
        leaves = [result] if len(self.outputs) == 1 else list(result)
        found = {n: leaf.numpy() for n, leaf in zip(self.outputs, leaves, strict=True)}
        return {name: found[name] for name in (self.outputs if outputs is None else outputs)}


def _weights_path(path: Path) -> Path:
    return path.with_suffix(".safetensors")
