"""What a model is: told by its content, not by its name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import onnx

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.guard import check_links
from sparse_tvm.frontends.kinds import check_model, file_kind, hub_id
from sparse_tvm.frontends.source import Source, SourceOptions


def open_source(model: Any, options: SourceOptions | None = None) -> Source:
    """Open a model as the source that it is.

    Parameters
    ----------
    model : path, onnx.ModelProto, torch.nn.Module, keras.Model, or Source
        A file or directory of any kind that ``docs/sources.md`` lists, a Hugging Face hub id, or
        a model in memory; a source is returned as it is.
    options : SourceOptions | None
        What else there is to know.

    Raises
    ------
    ModelError
        When there is no such file, it is of no such kind, or its framework is not installed.
    """
    options = options or SourceOptions()
    if isinstance(model, Source):
        return model
    if isinstance(model, onnx.ModelProto):
        from sparse_tvm.frontends.onnx.source import OnnxSource

        return OnnxSource(model)
    if not isinstance(model, str | os.PathLike):
        return _open_object(model, options)
    check_model(model)
    if name := hub_id(model):
        from sparse_tvm.frontends.huggingface.source import HuggingFaceSource

        return HuggingFaceSource.from_hub(name)
    path = Path(model)
    return _open_directory(path) if path.is_dir() else _open_file(path, options)


def _open_object(model: Any, options: SourceOptions) -> Source:
    bases = {f"{base.__module__}.{base.__name__}" for base in type(model).__mro__}
    if "torch.nn.modules.module.Module" in bases:
        from sparse_tvm.frontends.torch.source import ModuleSource

        return ModuleSource(model, options)
    if any(base.startswith("keras.") and base.endswith(".Model") for base in bases):
        from sparse_tvm.frontends.tensorflow.keras import KerasSource

        return KerasSource.from_model(model)
    raise ModelError(
        f"a {type(model).__name__} is not a model",
        hint="give a path, an nn.Module, a Keras model or an onnx.ModelProto",
    )


def _open_directory(path: Path) -> Source:
    check_links(path)
    if (path / "saved_model.pb").is_file():
        from sparse_tvm.frontends.tensorflow.saved_model import SavedModelSource

        return SavedModelSource(path)
    if (path / "config.json").is_file():
        from sparse_tvm.frontends.huggingface.source import HuggingFaceSource

        return HuggingFaceSource(path)
    raise ModelError(
        f"{path}: is a directory, but not of a model",
        hint="a Hugging Face model has config.json in it, a SavedModel has saved_model.pb",
    )


def _open_file(path: Path, options: SourceOptions) -> Source:
    kind = file_kind(path)
    if kind == "program":
        from sparse_tvm.frontends.torch.source import ProgramSource

        return ProgramSource(path, options)
    if kind == "pickle":
        from sparse_tvm.frontends.torch.source import ModuleSource

        return ModuleSource.from_pickle(path, options)
    if kind == "keras":
        from sparse_tvm.frontends.tensorflow.keras import KerasSource

        return KerasSource(path, options)
    if kind == "tflite":
        from sparse_tvm.frontends.tensorflow.tflite import TfliteSource

        return TfliteSource(path)
    if kind == "ir":
        from sparse_tvm.frontends.ir.source import IrSource

        return IrSource(path)
    from sparse_tvm.frontends.onnx.source import OnnxSource

    return OnnxSource(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    ModelError
        When it cannot be read, or is something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: not a JSON object")
    return values
