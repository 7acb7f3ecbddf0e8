"""Write ONNX files, with their weights in a file beside them where they are too large."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import onnx

from sparse_tvm.errors import OutputError
from sparse_tvm.files import replacing
from sparse_tvm.frontends.onnx.detach import as_array, is_weight, size_of

MAX_INLINE_BYTES = 1 << 31
"""Protobuf refuses messages from 2 GiB on."""

_ALIGNMENT = 4096  # lets readers map each tensor
_MARGIN = 1 << 26  # for everything but the weights


def weight_bytes(model: onnx.ModelProto) -> int:
    """Return the size of the float32 initializers, wherever they are stored."""
    return sum(4 * size_of(tensor) for tensor in model.graph.initializer if is_weight(tensor))


def write_onnx(
    model: onnx.ModelProto, output: str | os.PathLike[str], *, external: bool = False
) -> None:
    """Write a model; nothing is left behind, and nothing replaced, when that fails.

    Parameters
    ----------
    model : onnx.ModelProto
        Its initializers are moved out of it when they go to a file of their own.
    output : path
        The ``.onnx`` file; external data goes to ``<output>.data`` beside it.
    external : bool
        Store the weights as external data even where the model is under 2 GiB.

    Raises
    ------
    OutputError
        When a file cannot be written.
    """
    output = Path(output)
    if output.is_dir():
        raise OutputError(f"cannot write {output}: it is a directory", hint="name a file")
    if not external and weight_bytes(model) < MAX_INLINE_BYTES - _MARGIN:
        with replacing(output) as temporary:
            temporary.write_bytes(model.SerializeToString())
        return
    data = output.with_name(f"{output.name}.data")
    with replacing(output) as temporary, replacing(data) as temporary_data:
        with temporary_data.open("wb") as file:
            for tensor in model.graph.initializer:
                if is_weight(tensor):
                    _move_out(tensor, file, data.name)
        temporary.write_bytes(model.SerializeToString())


def _move_out(tensor: onnx.TensorProto, file: BinaryIO, location: str) -> None:
    """Append a tensor's values to `file` and leave only a reference to them in the model."""
    values = as_array(tensor).astype("<f4", copy=False).tobytes()
    file.write(bytes(-file.tell() % _ALIGNMENT))
    tensor.raw_data = b""  # marks the values as raw, which ONNX wants of external data
    onnx.external_data_helper.set_external_data(
        tensor, location, offset=file.tell(), length=len(values)
    )
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    file.write(values)
