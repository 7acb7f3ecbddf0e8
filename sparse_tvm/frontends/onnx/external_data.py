"""Weights that an ONNX model keeps in other files: found, then loaded or mapped."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.guard import lies_inside
from sparse_tvm.frontends.onnx.detach import is_weight, size_of, stored_tensors


def load_external_data(model: onnx.ModelProto, path: Path, *, mapped: bool = False) -> None:
    """Bring the tensors that lie in other files within reach, in place.

    Parameters
    ----------
    model : onnx.ModelProto
        As parsed from `path`.
    path : Path
        The model's file; its data files lie beside it, or below.
    mapped : bool
        Leave large float32 tensors in their files, for `as_array` to map.

    Raises
    ------
    ModelError
        When a data file is missing or too short, or lies elsewhere.
    """
    for name, tensor in stored_tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        what = f"{path}: external data of initializer {name}"
        try:
            info = ExternalDataInfo(tensor)
        except ValueError as error:
            raise ModelError(f"{what}: {error}") from error
        file = _data_file(path, info.location, name)
        offset, length = info.offset or 0, info.length
        if tensor.data_type == TensorProto.FLOAT:
            length = 4 * size_of(tensor)
        if offset + (length or 0) > file.stat().st_size:
            raise ModelError(f"{what}: {info.location} is too short", hint="it may be truncated")
        if mapped and is_weight(tensor):
            _refer(tensor, file, offset)
        else:
            _load(tensor, file, offset, length)


def _data_file(path: Path, location: str, name: str) -> Path:
    relative = Path(location)
    file = path.parent / relative
    # A model that is a link itself, as in a download cache, has its data beside what it links to.
    homes = (path.parent, path.resolve().parent)
    if (
        relative.is_absolute()
        or ".." in relative.parts
        or not any(lies_inside(file, home) for home in homes)
    ):
        raise ModelError(
            f"{path}: external data of initializer {name} lies outside of the model's folder: "
            f"{location}"
        )
    if not file.is_file():
        raise ModelError(
            f"{path}: its external data file {location} is missing "
            f"(it holds the initializer {name})",
            hint="copy the model together with its data files",
        )
    return file


def _refer(tensor: TensorProto, file: Path, offset: int) -> None:
    """Refer to the data by an absolute path: the tensor alone then says where it is."""
    del tensor.external_data[:]
    for key, value in (("location", str(file.absolute())), ("offset", str(offset))):
        tensor.external_data.add(key=key, value=value)


def _load(tensor: TensorProto, file: Path, offset: int, length: int | None) -> None:
    with file.open("rb") as stream:
        stream.seek(offset)
        tensor.raw_data = stream.read(-1 if length is None else length)
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]
