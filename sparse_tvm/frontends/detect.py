"""What a model is: told by its content, not by its name."""

from __future__ import annotations

import codecs
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import onnx

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.guard import check_links
from sparse_tvm.frontends.source import Source, SourceOptions

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PREFIX = "hf://"
_MODEL_SUFFIXES = {".onnx", ".pt2", ".pt", ".pth", ".keras", ".tflite", ".h5", ".json", ".so"}


def open_source(model: Any, options: SourceOptions | None = None) -> Source:
    """Open a model as the source that it is.

    Parameters
    ----------
    model : path, onnx.ModelProto, torch.nn.Module, or keras.Model
        A file or directory of any kind that ``docs/sources.md`` lists, a Hugging Face hub id, or
        a model in memory.
    options : SourceOptions | None
        What else there is to know.

    Raises
    ------
    ModelError
        When there is no such file, it is of no such kind, or its framework is not installed.
    """
    options = options or SourceOptions()
    if isinstance(model, onnx.ModelProto):
        from sparse_tvm.frontends.onnx.source import OnnxSource

        return OnnxSource(model)
    if not isinstance(model, str | os.PathLike):
        return _open_object(model, options)
    try:
        Path(model).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # perhaps a hub id; the reader says what is wrong otherwise
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{os.fspath(model)}: cannot be opened: {reason}") from error
    if hub_id := _hub_id(model):
        from sparse_tvm.frontends.huggingface.source import HuggingFaceSource

        return HuggingFaceSource.from_hub(hub_id)
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
    if kind in _REFUSED:
        what, hint = _REFUSED[kind]
        raise ModelError(f"{path}: not a model: it is {what}", hint=hint)
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


_REFUSED: dict[str, tuple[str, str | None]] = {
    "library": (
        "a shared library, perhaps an artifact that was compiled already",
        "give the model that it was compiled from",
    ),
    "hdf5": ("an HDF5 file, perhaps an old Keras model", "load it with Keras, save it as .keras"),
    "gzip": ("a gzip archive", "unpack it"),
    "gguf": ("a GGUF model, quantised weights for llama.cpp", "give the float32 model"),
    "numpy": ("a NumPy array or archive", None),
    "lfs": ("a Git LFS pointer", "the model itself was not downloaded: git lfs pull"),
    "safetensors": (
        "weights without a graph",
        "give the Hugging Face directory that has config.json beside it",
    ),
    "torchscript": (
        "a TorchScript archive, which PyTorch no longer develops",
        "export the model with torch.export.save",
    ),
    "zip": ("a zip archive", "unpack it"),
    "text": ("a text file", None),
}
"""What cannot be opened, by `file_kind`, and what to do."""

_SIGNATURES = (
    (b"\x7fELF", "library"),
    (b"\x80\x02", "pickle"),
    (b"\x80\x03", "pickle"),
    (b"\x80\x04", "pickle"),
    (b"\x80\x05", "pickle"),
    (b"\x89HDF", "hdf5"),
    (b"\x1f\x8b", "gzip"),
    (b"GGUF", "gguf"),
    (b"\x93NUMPY", "numpy"),
    (b"version https://git-lfs", "lfs"),
    (b'{"sparse_tvm_ir":', "ir"),
)


def file_kind(path: Path) -> str:
    """Tell what a file is, by its content.

    Returns
    -------
    str
        ``program``, ``pickle``, ``keras``, ``tflite``, ``ir``, a key of the table of what is
        refused, or ``onnx`` for everything else: its reader says what is wrong with it.

    Raises
    ------
    ModelError
        When it is a damaged archive.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return "onnx"
    if head.startswith(b"PK\x03\x04"):
        return _archive_kind(path)
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return kind
    if head[4:8] == b"TFL3":
        return "tflite"
    header = int.from_bytes(head[:8], "little")
    if path.name.endswith(".safetensors.index.json") or (head[8:9] == b"{" and header < 1 << 32):
        return "safetensors"
    return "text" if head and _is_text(head) else "onnx"


def _archive_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            # A truncated archive may end in an archive that was its member.
            if min(entry.header_offset for entry in archive.infolist()) > 0:
                raise ValueError("its end is missing")
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ModelError(f"{path}: truncated or damaged zip archive: {error}") from error
    # The archive's folder has any name; PT2 archives have models/, older ones do not.
    inner = {name.partition("/")[2] for name in names}
    if "serialized_exported_program.json" in names or any(
        name.startswith("models/") and name.endswith(".json") for name in inner | names
    ):
        return "program"
    if names >= {"config.json", "model.weights.h5"}:
        return "keras"
    if any(name.startswith("code/") for name in inner):
        return "torchscript"
    if "data.pkl" in inner:
        return "pickle"
    return "numpy" if any(name.endswith(".npy") for name in names) else "zip"


def _is_text(head: bytes) -> bool:
    try:
        # Incremental: the last bytes may be half a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\r\n\t" for c in text)


def _hub_id(model: str | os.PathLike[str]) -> str | None:
    text = os.fspath(model)
    if text.startswith((_HUB_PREFIX, "hf:/")):  # a pathlib.Path has lost a slash
        return text.partition(":")[2].lstrip("/")
    path = Path(text)
    if path.exists() or path.parent.exists() or path.suffix in _MODEL_SUFFIXES:
        return None
    return text if _HUB_ID.fullmatch(text) else None


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
