"""The Open Inference Protocol over gRPC, by Triton's definition of the service.

Messages are parsed here rather than by the gRPC library, which would answer malformed ones with
an internal error.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

import sparse_tvm
from sparse_tvm.serving import logs
from sparse_tvm.serving.access import Needs
from sparse_tvm.serving.budget import Hold
from sparse_tvm.serving.core import Core
from sparse_tvm.serving.options import Options
from sparse_tvm.serving.protocol import (
    DATATYPES,
    Call,
    Shapes,
    check_outputs,
    from_bytes,
    from_numbers,
    quoted,
    timeout_of,
)
from sparse_tvm.serving.refusal import Kind, Refusal, invalid
from sparse_tvm.serving.rest import EXTENSIONS, PLATFORM, metadata
from sparse_tvm.serving.version import Version
from sparse_tvm.serving.wire import Malformed, parsed_bytes
from sparse_tvm.spec import TensorSpec

SERVICE = "inference.GRPCInferenceService"
_CONTENTS = {
    "bool": "bool_contents",
    "int8": "int_contents",
    "int16": "int_contents",
    "int32": "int_contents",
    "int64": "int64_contents",
    "uint8": "uint_contents",
    "uint16": "uint_contents",
    "uint32": "uint_contents",
    "uint64": "uint64_contents",
    "float32": "fp32_contents",
    "float64": "fp64_contents",
}

_RESULT_COPIES = 3
"""Of the results: arrays, the fields of the message, and the message as it is sent."""

_MAX_RPCS = 1024
_MAX_CONNECTIONS = 256
_MAX_STREAMS = 256
_MAX_RANK = 32
_PART = 1 << 16


@dataclass(frozen=True)
class _Call:
    """What a method gets beside its request."""

    core: Core
    context: Any
    held: Hold


Method = Callable[[Any, _Call], Awaitable[Any]]


def build_server(core: Core) -> Any:
    """Return a gRPC server for the models of `core`, without a port yet."""
    server = grpc.aio.server(
        options=_channel_options(core.options), maximum_concurrent_rpcs=_MAX_RPCS
    )
    operators = Needs.TOKEN | Needs.CONTROL
    methods: dict[str, tuple[type, Method, Needs]] = {
        "ServerLive": (pb.ServerLiveRequest, _live, Needs.NOTHING),
        "ServerReady": (pb.ServerReadyRequest, _ready, Needs.NOTHING),
        "ModelReady": (pb.ModelReadyRequest, _model_ready, Needs.TOKEN),
        "ServerMetadata": (pb.ServerMetadataRequest, _server_metadata, Needs.TOKEN),
        "ModelMetadata": (pb.ModelMetadataRequest, _model_metadata, Needs.TOKEN),
        "ModelConfig": (pb.ModelConfigRequest, _model_config, Needs.TOKEN),
        "ModelInfer": (pb.ModelInferRequest, _infer, Needs.TOKEN),
        "RepositoryIndex": (pb.RepositoryIndexRequest, _index, Needs.TOKEN),
        "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, _load, operators),
        "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, _unload, operators),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            _handler(message, method, needs, core), response_serializer=_serialize
        )
        for name, (message, method, needs) in methods.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    return server


def _channel_options(options: Options) -> list[tuple[str, int]]:
    """Return limits on connections: none is kept by a client that is idle, silent or gone.

    The library buffers messages that are not complete, and gives a handler no say in it, so the
    age of a connection is what ends one that never becomes complete.
    """
    grace = int(options.timeout) + 10
    return [
        ("grpc.max_receive_message_length", options.max_body),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
        ("grpc.max_allowed_incoming_connections", _MAX_CONNECTIONS),
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
        ("grpc.server_handshake_timeout_ms", 15_000),
        ("grpc.max_connection_idle_ms", 5 * 60_000),
        ("grpc.max_connection_age_ms", 10 * 60_000),
        ("grpc.max_connection_age_grace_ms", grace * 1000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _handler(
    message: type, method: Method, needs: Needs, core: Core
) -> Callable[[bytes, Any], Awaitable[Any]]:
    async def handle(data: bytes, context: Any) -> Any:
        started = monotonic()
        code, model = "OK", ""
        try:
            metadata = dict(context.invocation_metadata() or ())
            core.access.check(needs, _text(metadata.get("authorization")), metadata.get("origin"))
            with core.budget.hold() as held:
                held.grow(len(data))
                async with held.turn(len(data)):
                    request = _parse(message, data, held)
                model = getattr(request, "model_name", "")
                return await method(request, _Call(core, context, held))
        except Refusal as refusal:
            code = refusal.kind.code
            if refusal.retry_after is not None:
                context.set_trailing_metadata((("retry-after", str(refusal.retry_after)),))
            await context.abort(grpc.StatusCode[code], refusal.message)
        except grpc.aio.AbortError:
            raise
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception as error:
            code = "INTERNAL"
            logs.exception("request failed", error)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")
        finally:
            if method is _infer:
                core.count(model, "grpc", code, monotonic() - started)

    return handle


def _text(value: str | bytes | None) -> str:
    return value if isinstance(value, str) else ""


def _parse(message: Any, data: bytes, held: Hold) -> Any:
    try:
        held.grow(parsed_bytes(message.DESCRIPTOR, memoryview(data)))
        return message.FromString(data)
    except (DecodeError, Malformed):
        raise invalid(f"the message is no {message.__name__}") from None


async def _live(_request: Any, call: _Call) -> Any:
    return pb.ServerLiveResponse(live=True)


async def _ready(_request: Any, call: _Call) -> Any:
    return pb.ServerReadyResponse(ready=call.core.ready)


async def _model_ready(request: Any, call: _Call) -> Any:
    try:
        with call.core.repository.use(request.name, request.version) as version:
            return pb.ModelReadyResponse(ready=version.ready)
    except Refusal as refusal:
        if refusal.kind is Kind.UNAVAILABLE:
            return pb.ModelReadyResponse(ready=False)
        raise


async def _server_metadata(_request: Any, call: _Call) -> Any:
    return pb.ServerMetadataResponse(
        name=PLATFORM, version=sparse_tvm.__version__, extensions=EXTENSIONS
    )


async def _model_metadata(request: Any, call: _Call) -> Any:
    with call.core.repository.use(request.name, request.version) as version:
        return pb.ModelMetadataResponse(**metadata(version))


async def _model_config(request: Any, call: _Call) -> Any:
    """Answer Triton's extension, which its load generator asks before anything else."""
    with call.core.repository.use(request.name, request.version) as version:
        described = metadata(version)
        tensors = {
            key: [
                {
                    "name": tensor["name"],
                    "data_type": f"TYPE_{tensor['datatype']}",
                    "dims": tensor["shape"],
                }
                for tensor in described[f"{key}s"]
            ]
            for key in ("input", "output")
        }
        config = {"name": version.model, "platform": PLATFORM, "max_batch_size": 0, **tensors}
        return pb.ModelConfigResponse(config=config)


async def _index(_request: Any, call: _Call) -> Any:
    return pb.RepositoryIndexResponse(models=call.core.repository.index())


async def _load(request: Any, call: _Call) -> Any:
    await call.core.repository.load(request.model_name)
    return pb.RepositoryModelLoadResponse()


async def _unload(request: Any, call: _Call) -> Any:
    await call.core.repository.unload(request.model_name)
    return pb.RepositoryModelUnloadResponse()


async def _infer(request: Any, call: _Call) -> Any:
    core = call.core
    with core.repository.use(request.model_name, request.model_version) as version:
        wanted = await _decode(request, version, call.held)
        call.held.grow(_RESULT_COPIES * version.result_bytes(wanted.sizes))
        left = call.context.time_remaining()
        limits = [seconds for seconds in (wanted.timeout, left) if seconds is not None]
        timeout = core.timeout(min(limits) if limits else None)
        outputs = await version.infer(wanted.arrays, wanted.sizes, timeout)
    chosen = list(wanted.outputs or outputs)
    return pb.ModelInferResponse(
        model_name=version.model,
        model_version=version.version,
        id=wanted.id,
        outputs=[
            {
                "name": name,
                "datatype": DATATYPES[outputs[name].dtype.name],
                "shape": outputs[name].shape,
            }
            for name in chosen
        ],
        raw_output_contents=[outputs[name].tobytes() for name in chosen],
    )


async def _decode(request: Any, version: Version, held: Hold) -> Call:
    """Check and decode an inference request."""
    shapes = Shapes(version.inputs, version.limits)
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid(f"{len(request.inputs)} inputs, but {len(raw)} raw_input_contents")
    for index, tensor in enumerate(request.inputs):
        if len(tensor.shape) > _MAX_RANK:
            raise invalid(f"an input has {len(tensor.shape)} dimensions")
        spec, shape = shapes.expect(tensor.name, tensor.datatype, list(tensor.shape))
        if raw:
            if tensor.HasField("contents"):
                raise invalid(f"input {spec.name!r} has contents and raw_input_contents")
            shapes.add(spec, from_bytes(spec, raw[index], shape))
            continue
        if spec.dtype not in _CONTENTS:
            raise invalid(f"input {spec.name!r} must come in raw_input_contents")
        values = getattr(tensor.contents, _CONTENTS[spec.dtype])
        shapes.add(spec, await _from_contents(spec, values, shape, held))
    arrays = shapes.complete()
    check_outputs([output.name for output in request.outputs], version.outputs)
    timeout = None
    if "timeout" in request.parameters:
        value = request.parameters["timeout"]
        timeout = getattr(value, value.WhichOneof("parameter_choice") or "int64_param")
    return Call(
        arrays,
        shapes.sizes,
        {output.name: True for output in request.outputs},
        id=request.id,
        timeout=timeout_of(timeout),
    )


async def _from_contents(
    spec: TensorSpec, values: Any, shape: Sequence[int], held: Hold
) -> np.ndarray:
    """Return the array of a message's numbers; others get their turn between parts of it."""
    count = len(values)
    if count != math.prod(shape):
        raise invalid(f"input {spec.name!r} has {count} elements, its shape says {quoted(shape)}")
    result = np.empty(count, spec.dtype)
    held.grow(result.nbytes)
    for start in range(0, count, _PART):
        async with held.turn(result[start : start + _PART].nbytes):
            part = values[start : start + _PART]
            result[start : start + len(part)] = from_numbers(spec, part, [len(part)])
    return result.reshape(shape)
