"""Whatever bytes come in, decoding ends in a request that fits the model, or in a refusal."""

from __future__ import annotations

import asyncio
import json
import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("gevent")  # of the extra for tests, beyond the server's own
pytest.importorskip("uvicorn")

from google.protobuf.message import DecodeError
from hostile import hostile_json, hostile_message
from serving_fixtures import infer_body
from tritonclient.grpc import service_pb2 as pb

from sparse_tvm.serving import embeddings, http_codec, rpc
from sparse_tvm.serving.budget import Budget, Hold
from sparse_tvm.serving.limits import Limits
from sparse_tvm.serving.protocol import Call
from sparse_tvm.serving.refusal import Refusal
from sparse_tvm.serving.wire import Malformed, parsed_bytes
from sparse_tvm.spec import TensorSpec

INPUTS = [
    TensorSpec("input_ids", "int64", ("batch", "sequence")),
    TensorSpec("attention_mask", "int64", ("batch", "sequence")),
]
VERSION: Any = SimpleNamespace(
    inputs=INPUTS,
    outputs=[TensorSpec("hidden", "float32", ("batch", "sequence", 16))],
    limits=Limits(values={"input_ids": (0, 99)}, sizes={"sequence": (1, 512)}),
)
SOUND = infer_body(np.array([[1, 2, 3, 99]]))
DTYPES = {"bool": "BOOL", "int8": "INT8", "uint8": "UINT8", "int64": "INT64", "uint64": "UINT64"}
DTYPES |= {"float16": "FP16", "float32": "FP32", "float64": "FP64"}
many = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def hold() -> Hold:
    return Hold(Budget(1 << 30))


def decode(body: bytes, header_length: str | None = None, version: Any = VERSION) -> Call | None:
    """Return what comes out, or None for a refusal; anything else fails the test."""
    try:
        return asyncio.run(http_codec.decode(body, header_length, version, hold()))
    except Refusal as refusal:
        check_refusal(refusal)
        return None


def check_refusal(refusal: Refusal) -> None:
    assert refusal.kind.status in (400, 413)
    assert len(refusal.message) < 1000


def check(call: Call | None) -> None:
    """Check that what passed fits the model."""
    if call is None:
        return
    ids, mask = call.arrays["input_ids"], call.arrays["attention_mask"]
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape == (call.sizes["batch"], call.sizes["sequence"])
    assert 1 <= ids.shape[1] <= 512
    assert ids.size
    assert ids.min() >= 0
    assert ids.max() <= 99


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
fields = st.dictionaries(
    st.sampled_from(["name", "datatype", "shape", "data", "parameters", "binary_data_size"]),
    json_values | st.sampled_from(["input_ids", "attention_mask", "INT64", [1, 4], [1, 2, 3, 4]]),
)
documents = st.dictionaries(
    st.sampled_from(["inputs", "outputs", "parameters", "id", "x"]),
    json_values | st.lists(fields, max_size=3),
)


@many
@given(st.binary(max_size=300), st.none() | st.text(max_size=30))
def test_any_bytes(body: bytes, header_length: str | None) -> None:
    check(decode(body, header_length))


@many
@given(documents)
def test_any_document(document: dict[str, Any]) -> None:
    check(decode(json.dumps(document).encode("utf-8", "surrogatepass")))


@many
@given(st.integers())
def test_hostile_documents(seed: int) -> None:
    check(decode(hostile_json(random.Random(seed), SOUND)))


@many
@given(st.data(), st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 5), max_size=3))
def test_sound_numbers_arrive_as_they_are(data: Any, dtype: str, shape: list[int]) -> None:
    """Flat or nested, and cut into parts at any place."""
    kind = np.dtype(dtype)
    if kind.kind == "b":
        numbers: Any = st.booleans()
    elif kind.kind in "iu":
        numbers = st.integers(int(np.iinfo(kind).min), int(np.iinfo(kind).max))
    else:
        width = 8 * kind.itemsize
        numbers = st.floats(width=width, allow_nan=False, allow_infinity=False)
    values = data.draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))
    array = np.array(values, kind).reshape(shape)
    written = array.reshape(-1).tolist() if data.draw(st.booleans()) else array.tolist()
    assume(isinstance(written, list))
    version = SimpleNamespace(
        inputs=[TensorSpec("x", dtype, tuple(shape))], outputs=[], limits=Limits()
    )
    indent = data.draw(st.none() | st.just(1))
    tensor = {"name": "x", "datatype": DTYPES[dtype], "shape": shape, "data": written}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_tvm.serving.json_numbers._PART", data.draw(st.integers(1, 20)))
        call = decode(json.dumps({"inputs": [tensor]}, indent=indent).encode(), version=version)
    assert call is not None
    np.testing.assert_array_equal(call.arrays["x"], array)


@many
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), json_values)
def test_data_of_another_shape_are_refused(shape: list[int], data: Any) -> None:
    try:
        array = np.array(data)
        fits = array.dtype.kind in "iu" and array.size == math.prod(shape)
    except (ValueError, OverflowError):
        fits = False
    assume(not fits)
    version = SimpleNamespace(
        inputs=[TensorSpec("x", "int64", tuple(shape))], outputs=[], limits=Limits()
    )
    tensor = {"name": "x", "datatype": "INT64", "shape": shape, "data": data}
    text = json.dumps({"inputs": [tensor]}).encode("utf-8", "surrogatepass")
    assert decode(text, version=version) is None


def message() -> Any:
    request = pb.ModelInferRequest(model_name="encoder")
    for name in ("input_ids", "attention_mask"):
        tensor = request.inputs.add(name=name, datatype="INT64", shape=[1, 4])
        tensor.contents.int64_contents.extend([1, 2, 3, 4])
    return request


def decode_message(data: bytes) -> None:
    try:
        request = rpc._parse(pb.ModelInferRequest, data, hold())
        call = asyncio.run(rpc._decode(request, VERSION, hold()))
    except Refusal as refusal:
        check_refusal(refusal)
        return
    check(call)


@many
@given(st.binary(max_size=300))
def test_any_message(data: bytes) -> None:
    decode_message(data)


@many
@given(st.integers())
def test_hostile_messages(seed: int) -> None:
    decode_message(hostile_message(random.Random(seed), message()))


@many
@given(st.data())
def test_a_message_with_flipped_bytes(data: Any) -> None:
    damaged = bytearray(message().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    decode_message(bytes(damaged))


@many
@given(st.binary(max_size=200))
def test_the_walk_over_fields_refuses_nothing_that_can_be_parsed(data: bytes) -> None:
    try:
        pb.ModelInferRequest.FromString(data)
    except DecodeError:
        return
    try:
        parsed_bytes(pb.ModelInferRequest.DESCRIPTOR, memoryview(data))
    except Malformed:
        # Groups, which protobuf skips, are in no message that anybody sends.
        assert any(byte & 7 in (3, 4) for byte in data)


@many
@given(
    st.binary(max_size=200)
    | st.dictionaries(
        st.sampled_from(["model", "input", "encoding_format", "dimensions"]), json_values
    ).map(lambda document: json.dumps(document).encode("utf-8", "surrogatepass"))
)
def test_any_embeddings_request(body: bytes) -> None:
    try:
        _, request = asyncio.run(embeddings.parse(body, hold()))
        texts = embeddings._texts(request.input)
    except Refusal as refusal:
        check_refusal(refusal)
        return
    assert texts
    assert all(isinstance(text, str) or all(type(i) is int for i in text) for text in texts)
    assert all(texts)
