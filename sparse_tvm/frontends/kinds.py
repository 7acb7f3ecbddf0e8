"""Of what kind a model is, by its content; and what is refused before any framework is loaded."""

from __future__ import annotations

import codecs
import os
import re
import zipfile
from pathlib import Path

from sparse_tvm.errors import ModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PREFIX = "hf://"
_MODEL_SUFFIXES = {".onnx", ".pt2", ".pt", ".pth", ".keras", ".tflite", ".h5", ".json", ".so"}


def check_model(model: str | os.PathLike[str]) -> None:
    """Refuse a path that no frontend opens.

    Raises
    ------
    ModelError
        When there is no such file, or it is of a kind that cannot be compiled.
    """
    check_path(model)
    path = Path(model)
    kind = file_kind(path)
    if kind in _REFUSED:
        what, hint = _REFUSED[kind]
        raise ModelError(f"{path}: not a model: it is {what}", hint=hint)


def check_path(model: str | os.PathLike[str]) -> None:
    """Refuse what is neither a file, nor a directory, nor a Hugging Face hub id.

    Raises
    ------
    ModelError
        When there is no such file, or its name cannot be one.
    """
    try:
        Path(model).stat()
    except (FileNotFoundError, NotADirectoryError):
        if hub_id(model) is None:
            raise ModelError(f"{os.fspath(model)}: no such file") from None
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{os.fspath(model)}: cannot be opened: {reason}") from error


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


def hub_id(model: str | os.PathLike[str]) -> str | None:
    """Return the Hugging Face hub id that ``model`` is, unless it is a path."""
    text = os.fspath(model)
    if text.startswith((_HUB_PREFIX, "hf:/")):  # a pathlib.Path has lost a slash
        return text.partition(":")[2].lstrip("/")
    path = Path(text)
    if path.exists() or path.parent.exists() or path.suffix in _MODEL_SUFFIXES:
        return None
    return text if _HUB_ID.fullmatch(text) else None
