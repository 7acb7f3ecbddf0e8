"""Requests that are wrong in one of many ways, made from one that is right."""

from __future__ import annotations

import json
import random
from typing import Any

from tritonclient.grpc import service_pb2 as pb

_JUNK: list[Any] = [
    *(None, True, -1, 10**30, 1.5, "x", "\0", "\ud800", [], {}, [[]], ["a"], [1, [2]]),
    *(1e308, "é" * 100, {"a": {"b": [{}]}}),
]
_SHAPES = [[-1, 4], [0, 4], [2**31, 2**31], [2**62, 4], [1] * 40, [1.5, 2], ["1"], *_JUNK]
_TYPES = ["INT32", "FP32", "BYTES", "BOOL", "int64", "", "x" * 1000, *_JUNK]
_TIMEOUTS = [-5, "soon", float("-inf"), 1e300, True, [1], {}]
_OUTPUTS = [[{"name": "none"}], [{"name": 3}], [[]], 7, {"name": "x"}, [{"parameters": 3}]]
_SIZES = [-1, 1, 10**12, 2**63, "x", 2.5, True, [], 10**400]


def hostile_json(rng: random.Random, sound: dict[str, Any]) -> bytes:
    """Return a request's body that is wrong in one of many ways.

    Parameters
    ----------
    sound : dict
        The JSON of a request that is right; its first input holds indices into a table.
    """
    body = json.loads(json.dumps(sound))
    tensor = rng.choice(body["inputs"])
    count = len(tensor["data"])
    kind = rng.randrange(16)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        text = json.dumps(body).encode()
        return text[: rng.randrange(1, len(text))]
    if kind == 2:
        return _plain(rng.choice([None, [], 1, "x", {"inputs": rng.choice(_JUNK)}]))
    if kind == 3:
        tensor["shape"] = rng.choice(_SHAPES)
    elif kind == 4:
        tensor["datatype"] = rng.choice(_TYPES)
    elif kind == 5:
        body["inputs"][0]["data"][0] = rng.choice([-1, 2**40, -(2**63), 2**63, 2**64, 10**4000])
    elif kind == 6:
        numbers = [[1] * (count + 1), [1] * (count - 1), [1.5] * count, [True] * count]
        tensor["data"] = rng.choice([*numbers, [[1]] * count, ["1"] * count, *_JUNK])
    elif kind == 7:
        del tensor[rng.choice(["name", "shape", "datatype", "data"])]
    elif kind == 8:
        tensor["name"] = rng.choice(["x" * 10_000, tensor["name"] + "\n", "\x1b[31m", *_JUNK])
    elif kind == 9:
        body["inputs"].append(rng.choice([tensor, *_JUNK]))
    elif kind == 10:
        body["outputs"] = rng.choice(_OUTPUTS)
    elif kind == 11:
        body["parameters"] = rng.choice(
            [3, "x", [1], {"timeout": rng.choice(_TIMEOUTS)}, {"binary_data_output": 3}]
        )
    elif kind == 12:
        tensor["parameters"] = {"binary_data_size": rng.choice(_SIZES)}
    elif kind == 13:
        return b"[" * rng.randrange(5000) + b'"' + rng.randbytes(20)
    elif kind == 14:
        text = bytearray(json.dumps(body).encode())
        # Brackets and quotes; a flipped digit may be another sound request.
        places = [index for index, byte in enumerate(text) if byte in b'[]{}":']
        text[rng.choice(places)] ^= 1 << rng.randrange(8) | 0x80
        return bytes(text)
    else:
        del body["inputs"][rng.randrange(len(body["inputs"]))]
    return _plain(body)


def _plain(document: Any) -> bytes:
    return json.dumps(document).encode()


def hostile_message(rng: random.Random, sound: Any) -> bytes:
    """Return a gRPC inference request that is wrong in one of many ways.

    Parameters
    ----------
    sound : ModelInferRequest
        One that is right, its numbers in ``int64_contents``.
    """
    request = pb.ModelInferRequest()
    request.CopyFrom(sound)
    tensor = rng.choice(request.inputs)
    kind = rng.randrange(12)
    if kind == 0:
        return b"\xff" + rng.randbytes(rng.randrange(200))
    if kind == 1:
        message = request.SerializeToString()
        return message[: rng.randrange(1, len(message) - 1)]
    if kind == 2:
        tensor.shape[0] = rng.choice([-1, 0, 2**40, -(2**63), 2**63 - 1])
    elif kind == 3:
        tensor.datatype = rng.choice(["INT32", "BYTES", "", "FP32", "é" * 1000])
    elif kind == 4:
        request.inputs[0].contents.int64_contents[0] = rng.choice([-1, 2**40, 2**62])
    elif kind == 5:
        request.raw_input_contents.extend([b"x"] * rng.randrange(1, 4))
    elif kind == 6:
        tensor.name = rng.choice(["", "x" * 1000, "\0"])
    elif kind == 7:
        tensor.contents.int64_contents.pop()
    elif kind == 8:
        value = request.parameters["timeout"]
        if rng.randrange(2):
            value.double_param = rng.choice([float("nan"), float("inf"), -1.0, 1e300])
        else:
            value.string_param = rng.choice(["soon", "-1", "9" * 5000, "nan"])
    elif kind == 9:
        request.outputs.add(name=rng.choice(["none", "", "x" * 1000]))
    elif kind == 10:
        del request.inputs[rng.randrange(len(request.inputs))]
    else:
        request.model_name = rng.choice(["", "none", "x" * 10_000, "../../etc"])
    return request.SerializeToString()
