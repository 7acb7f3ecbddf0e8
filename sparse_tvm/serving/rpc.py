"""The Open Inference Protocol over gRPC, by Triton's definition of the service.

Messages are parsed here rather than by the gRPC library, which would answer malformed ones with
an internal error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

import sparse_tvm
from sparse_tvm.serving import logs
from sparse_tvm.serving.core import Core
from sparse_tvm.serving.protocol import (
    DATATYPES,
    Call,
    Shapes,
    check_outputs,
    from_bytes,
    from_list,
    timeout_of,
)
from sparse_tvm.serving.refusal import Kind, Refusal, invalid
from sparse_tvm.serving.rest import EXTENSIONS, PLATFORM, metadata
from sparse_tvm.serving.version import Version

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

Method = Callable[[Any, Core, Any], Awaitable[Any]]


def build_server(core: Core) -> Any:
    """Return a gRPC server for the models of `core`, without a port yet."""
    limit = core.options.max_body
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ],
    )
    methods: dict[str, tuple[type, Method]] = {
        "ServerLive": (pb.ServerLiveRequest, _live),
        "ServerReady": (pb.ServerReadyRequest, _ready),
        "ModelReady": (pb.ModelReadyRequest, _model_ready),
        "ServerMetadata": (pb.ServerMetadataRequest, _server_metadata),
        "ModelMetadata": (pb.ModelMetadataRequest, _model_metadata),
        "ModelConfig": (pb.ModelConfigRequest, _model_config),
        "ModelInfer": (pb.ModelInferRequest, _infer),
        "RepositoryIndex": (pb.RepositoryIndexRequest, _index),
        "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, _load),
        "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, _unload),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            _handler(message, method, core), response_serializer=_serialize
        )
        for name, (message, method) in methods.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    return server


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _handler(message: type, method: Method, core: Core) -> Callable[[bytes, Any], Awaitable[Any]]:
    async def handle(data: bytes, context: Any) -> Any:
        started = monotonic()
        code, model = "OK", ""
        try:
            async with core.budget.hold() as held:
                held.grow(len(data))
                request = _parse(message, data)
                model = getattr(request, "model_name", "")
                return await method(request, core, context)
        except Refusal as refusal:
            code = refusal.kind.code
            if refusal.retry_after is not None:
                context.set_trailing_metadata((("retry-after", str(refusal.retry_after)),))
            await context.abort(grpc.StatusCode[code], refusal.message)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            code = "INTERNAL"
            logs.exception("request failed", error)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")
        finally:
            if method is _infer:
                core.count(model, "grpc", code, monotonic() - started)

    return handle


def _parse(message: type, data: bytes) -> Any:
    try:
        return message.FromString(data)  # type: ignore[attr-defined]
    except DecodeError:
        raise invalid(f"the message is no {message.__name__}") from None


async def _live(_request: Any, _core: Core, _context: Any) -> Any:
    return pb.ServerLiveResponse(live=True)


async def _ready(_request: Any, core: Core, _context: Any) -> Any:
    return pb.ServerReadyResponse(ready=core.ready)


async def _model_ready(request: Any, core: Core, _context: Any) -> Any:
    try:
        with core.repository.use(request.name, request.version) as version:
            return pb.ModelReadyResponse(ready=version.ready)
    except Refusal as refusal:
        if refusal.kind is Kind.UNAVAILABLE:
            return pb.ModelReadyResponse(ready=False)
        raise


async def _server_metadata(_request: Any, _core: Core, _context: Any) -> Any:
    return pb.ServerMetadataResponse(
        name=PLATFORM, version=sparse_tvm.__version__, extensions=EXTENSIONS
    )


async def _model_metadata(request: Any, core: Core, _context: Any) -> Any:
    with core.repository.use(request.name, request.version) as version:
        return pb.ModelMetadataResponse(**metadata(version))


async def _model_config(request: Any, core: Core, _context: Any) -> Any:
    """Answer Triton's extension, which its load generator asks before anything else."""
    with core.repository.use(request.name, request.version) as version:
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


async def _index(_request: Any, core: Core, _context: Any) -> Any:
    return pb.RepositoryIndexResponse(models=core.repository.index())


async def _load(request: Any, core: Core, _context: Any) -> Any:
    await core.repository.load(request.model_name)
    return pb.RepositoryModelLoadResponse()


async def _unload(request: Any, core: Core, _context: Any) -> Any:
    await core.repository.unload(request.model_name)
    return pb.RepositoryModelUnloadResponse()


async def _infer(request: Any, core: Core, context: Any) -> Any:
    with core.repository.use(request.model_name, request.model_version) as version:
        call = _decode(request, version)
        left = context.time_remaining()
        limits = [seconds for seconds in (call.timeout, left) if seconds is not None]
        timeout = core.timeout(min(limits) if limits else None)
        outputs = await version.infer(call.arrays, call.sizes, timeout)
    chosen = list(call.outputs or outputs)
    return pb.ModelInferResponse(
        model_name=version.model,
        model_version=version.version,
        id=call.id,
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


def _decode(request: Any, version: Version) -> Call:
    """Check and decode an inference request."""
    shapes = Shapes(version.inputs, version.limits)
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid(f"{len(request.inputs)} inputs, but {len(raw)} raw_input_contents")
    for index, tensor in enumerate(request.inputs):
        spec, shape = shapes.expect(tensor.name, tensor.datatype, list(tensor.shape))
        if raw:
            if tensor.HasField("contents"):
                raise invalid(f"input {spec.name!r} has contents and raw_input_contents")
            shapes.add(spec, from_bytes(spec, raw[index], shape))
            continue
        if spec.dtype not in _CONTENTS:
            raise invalid(f"input {spec.name!r} must come in raw_input_contents")
        values = getattr(tensor.contents, _CONTENTS[spec.dtype])
        plain = np.array(values, bool) if spec.dtype == "bool" else values
        shapes.add(spec, from_list(spec, plain, shape))
    arrays = shapes.complete()
    check_outputs([output.name for output in request.outputs], version.outputs)
    parameters = {
        name: getattr(value, value.WhichOneof("parameter_choice") or "int64_param")
        for name, value in request.parameters.items()
    }
    return Call(
        arrays,
        shapes.sizes,
        {output.name: True for output in request.outputs},
        id=request.id,
        timeout=timeout_of(parameters),
    )
