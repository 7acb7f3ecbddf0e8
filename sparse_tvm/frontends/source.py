"""What every source is: a model as ONNX in memory, with its own framework as the reference."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from sparse_tvm.errors import ModelError, OptionError, OutputError
from sparse_tvm.extras import install_command
from sparse_tvm.files import replacing

if TYPE_CHECKING:
    from sparse_tvm.frontends.importer.model import ImportedModel
    from sparse_tvm.frontends.input_shapes import InputShapes
    from sparse_tvm.reference import ReferenceModel


@dataclass(frozen=True)
class SourceOptions:
    """How to open a model, where the model alone does not say.

    Attributes
    ----------
    example_inputs : tuple | Mapping[str, Any] | None
        For an ``nn.Module``: tensors to trace it with.
    dynamic_shapes : Any
        For an ``nn.Module``: as ``torch.export.export`` takes it; all shapes are fixed by default.
    allow_pickle : bool
        Unpickle files that are pickles, which runs whatever code is in them.
    input_shapes : InputShapes
        Shapes of inputs by name, where they are given.
    """

    example_inputs: Any = None
    dynamic_shapes: Any = None
    allow_pickle: bool = False
    input_shapes: InputShapes = field(default_factory=dict)


class Source(ABC):
    """A model as the user has it.

    Attributes
    ----------
    kind : str
        What it is, for tables: ``"PyTorch module"``.
    name : str
        What messages call it: its path, or its class.
    path : Path | None
        The file or directory it came from.
    """

    kind: str

    def __init__(self, name: str, path: Path | None = None) -> None:
        self.name = name
        self.path = path

    def load(self, input_shapes: InputShapes | None = None) -> ImportedModel:
        """Import the model into Relax, with its weights beside it.

        Parameters
        ----------
        input_shapes : InputShapes | None
            Shapes of inputs by name.

        Raises
        ------
        ModelError, OptionError
            When it cannot be read or compiled, or `input_shapes` do not fit.
        """
        from sparse_tvm.frontends.importer.model import import_onnx

        return import_onnx(self.as_onnx(), input_shapes)

    @abstractmethod
    def as_onnx(self) -> onnx.ModelProto | Path:
        """Return the model as ONNX: in memory, or the file it is.

        Initializers have the names that weights have in the source.
        """

    @abstractmethod
    def reference(self, threads: int) -> ReferenceModel:
        """Return the model in the framework that it came from."""

    def origins(self) -> Mapping[str, str]:
        """Tell by initializer how the source stored the zeros of its sparse weights."""
        return {}

    def notes(self) -> list[str]:
        """Tell what the user should know of how the model was opened."""
        return []

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of the model: name, file, kind, and its SHA-256."""
        if self.path is None:
            return {"name": self.name, "source": None, "kind": self.kind, "sha256": None}
        return {
            "name": self.path.name if self.path.is_dir() else self.path.stem,
            "source": self.path.name,
            "kind": self.kind,
            "sha256": _sha256(self.path),
        }

    def companions(self) -> list[Path]:
        """Return files of `path`, relative to it, that users of the compiled model need too."""
        return []

    def write_pruned(self, weights: Mapping[str, np.ndarray], output: Path) -> None:
        """Write the model with some of its weights replaced, in its own format.

        Parameters
        ----------
        weights : Mapping[str, np.ndarray]
            By initializer, in the layout of the ONNX model.
        output : path
            What to write.
        """
        raise OptionError(
            f"a pruned {self.kind} is written as ONNX, not as {output}",
            hint="give an output that ends in .onnx",
        )


def copy_companions(source: Source, artifact: str | os.PathLike[str]) -> None:
    """Copy what `Source.companions` lists to ``model.tokenizer/`` beside ``model.so``.

    Raises
    ------
    OutputError
        When a file cannot be written.
    """
    directory = Path(artifact).with_suffix(".tokenizer")
    for relative in source.companions():
        assert source.path is not None
        output = directory / relative
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create {output.parent}: {error.strerror}") from error
        with replacing(output) as temporary:
            shutil.copyfile(source.path / relative, temporary)


def require(module: str, extra: str, what: str) -> Any:
    """Import an optional package.

    Parameters
    ----------
    module, extra : str
        The module, and the extra of sparse-tvm that brings it.
    what : str
        What needs it, for the message.

    Raises
    ------
    ModelError
        When it is not installed; the hint is the pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelError(
            f"{what} needs the {module.partition('.')[0]} package: {error}",
            hint=install_command(extra),
        ) from error


def _sha256(path: Path) -> str:
    """Hash a file, or the names and contents of a directory's files in order."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if file != path:
            digest.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
