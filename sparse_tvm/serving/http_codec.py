"""Inference requests and responses over HTTP: JSON, with tensors in it or as bytes after it.

The JSON is decoded by its schema: what has another type ends the decoding, and unknown fields are
passed over, so that nothing is built from a hostile document that the model has no use for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sparse_tvm.serving.budget import Hold
from sparse_tvm.serving.json_numbers import decode_numbers
from sparse_tvm.serving.protocol import (
    DATATYPES,
    Call,
    Shapes,
    check_outputs,
    from_bytes,
    quoted,
    timeout_of,
)
from sparse_tvm.serving.refusal import Kind, Refusal, invalid
from sparse_tvm.serving.version import Version

HEADER_LENGTH = "inference-header-content-length"

_MAX_JSON = 16 << 20
"""Bytes of JSON in a request: skimming them holds up all others, for 0.1 s at most."""

_MAX_OBJECTS = 4096
_MAX_SHAPE = 1024

_PART = 1 << 16
"""Numbers that are written as JSON at a time, before others get their turn."""

_PIECE = 256 << 10
"""Bytes that are sent at a time: the next ones wait until the client has read these."""


class _TensorParameters(msgspec.Struct, gc=False):
    binary_data_size: int | None = None
    binary_data: bool | None = None


class _Input(msgspec.Struct, gc=False):
    name: str
    datatype: str = ""
    shape: msgspec.Raw = msgspec.Raw()
    data: msgspec.Raw = msgspec.Raw()
    parameters: _TensorParameters | None = None


class _Output(msgspec.Struct, gc=False):
    name: str
    parameters: _TensorParameters | None = None


class _Parameters(msgspec.Struct):
    binary_data_output: bool | None = None
    timeout: int | float | str | None = None


class _Request(msgspec.Struct):
    inputs: list[_Input]
    outputs: list[_Output] | None = None
    parameters: _Parameters | None = None
    id: msgspec.Raw = msgspec.Raw()


_documents = msgspec.json.Decoder(_Request)
_shapes = msgspec.json.Decoder(list[int])
_names = msgspec.json.Decoder(str)


async def decode(
    body: bytes | bytearray, header_length: str | None, version: Version, held: Hold
) -> Call:
    """Check and decode an inference request.

    Parameters
    ----------
    header_length : str | None
        The header that says where the JSON ends, if there is one.
    held : Hold
        Where the memory that it takes is noted.

    Raises
    ------
    Refusal
        When it does not fit the model, or is too large.
    """
    view = memoryview(body)
    end = _json_length(header_length, len(body))
    tail = view[end:]
    async with held.turn(end):
        document = _document(view[:end])
    shapes = Shapes(version.inputs, version.limits)
    for entry in document.inputs:
        spec, shape = shapes.expect(entry.name, entry.datatype, _shape(entry))
        nbytes = entry.parameters.binary_data_size if entry.parameters else None
        if nbytes is None:
            if not len(memoryview(entry.data)):
                raise invalid(f"input {spec.name!r} has no data")
            shapes.add(spec, await decode_numbers(entry.data, spec, shape, held))
            continue
        if not 0 <= nbytes <= len(tail):
            raise invalid(f"binary_data_size of input {spec.name!r} does not fit the body")
        shapes.add(spec, from_bytes(spec, tail[:nbytes], shape))
        tail = tail[nbytes:]
    if tail:
        raise invalid(f"{len(tail)} bytes follow the last input")
    arrays = shapes.complete()
    wanted = {
        entry.name: entry.parameters.binary_data if entry.parameters else None
        for entry in document.outputs or ()
    }
    check_outputs(list(wanted), version.outputs)
    parameters = document.parameters or _Parameters()
    return Call(
        arrays,
        shapes.sizes,
        wanted,
        parameters.binary_data_output is True,
        _id(document),
        timeout_of(parameters.timeout),
    )


def _json_length(header: str | None, size: int) -> int:
    """Return how many bytes of a body of `size` are JSON."""
    length = size
    if header is not None:
        # Longer digits than these are no length, and some would not even be a number to Python.
        length = int(header) if header.isdecimal() and len(header) < 19 else size + 1
        if length > size:
            raise invalid(f"{HEADER_LENGTH}: {quoted(header)} does not fit the body")
    if length > _MAX_JSON:
        raise Refusal(
            Kind.TOO_LARGE,
            f"the JSON has {length} bytes, the limit is {_MAX_JSON}; send tensors in binary",
        )
    return length


def _document(text: memoryview) -> _Request:
    if bytes(text).count(b"{") > _MAX_OBJECTS:
        raise invalid(f"the JSON has more than {_MAX_OBJECTS} objects")
    try:
        return _documents.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"the body is no inference request: {error}") from None


def _shape(entry: _Input) -> list[int]:
    raw = memoryview(entry.shape)
    try:
        if len(raw) <= _MAX_SHAPE:
            return _shapes.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        pass
    raise invalid(f"the shape of input {quoted(entry.name)} is no list of integers")


def _id(document: _Request) -> str:
    """Return the request's name; others than strings do not count."""
    try:
        return _names.decode(document.id)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


async def encode(
    call: Call, outputs: Mapping[str, np.ndarray], version: Version, held: Hold
) -> Response:
    """Return the results as JSON, those asked for in binary after it."""
    document: dict[str, Any] = {"model_name": version.model, "model_version": version.version}
    if call.id:
        document["id"] = call.id
    pieces: list[Any] = [orjson.dumps(document)[:-1], b',"outputs":[']
    tail: list[Any] = []
    for name in call.outputs or outputs:
        array = np.ascontiguousarray(outputs[name])
        entry: dict[str, Any] = {
            "name": name,
            "datatype": DATATYPES[array.dtype.name],
            "shape": array.shape,
        }
        wanted = call.outputs.get(name)
        if call.binary if wanted is None else wanted:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            tail.append(array.reshape(-1).view(np.uint8).data)
            pieces += [orjson.dumps(entry), b","]
        else:
            pieces += [orjson.dumps(entry)[:-1], b',"data":[']
            pieces += await _numbers(array, held)
            pieces += [b"]}", b","]
    pieces[-1] = b"]}"
    if not tail:
        return Pieces(pieces, {"content-type": "application/json"})
    length = sum(map(len, pieces))
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(length)}
    return Pieces([*pieces, *tail], headers)


async def _numbers(array: np.ndarray, held: Hold) -> list[bytes]:
    """Return an array as JSON without its brackets."""
    flat = array.reshape(-1)
    pieces = []
    for start in range(0, flat.size, _PART):
        part = flat[start : start + _PART]
        if part.dtype == np.float16:  # which orjson does not know
            part = part.astype(np.float32)
        piece = orjson.dumps(part, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        if start:
            pieces.append(b",")
        if flat.size > _PART:
            held.grow(len(piece))
            await asyncio.sleep(0)
        pieces.append(piece)
    return pieces


class Pieces(Response):  # type: ignore[misc]
    """A response that is sent no faster than its client reads."""

    def __init__(self, pieces: list[Any], headers: Mapping[str, str]) -> None:
        size = sum(map(len, pieces))
        super().__init__(headers={**headers, "content-length": str(size)})
        self._pieces = pieces
        self._small = b"".join(pieces) if size <= _PIECE else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        if self._small:
            await send({"type": "http.response.body", "body": self._small})
            return
        for piece in self._pieces:
            for start in range(0, len(piece), _PIECE):
                part = bytes(piece[start : start + _PIECE])
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
