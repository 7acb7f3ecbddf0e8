"""The Open Inference Protocol over HTTP, with the binary tensor extension."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

import sparse_tvm
from sparse_tvm.serving import logs
from sparse_tvm.serving.core import Core
from sparse_tvm.serving.embeddings import embeddings
from sparse_tvm.serving.protocol import (
    DATATYPES,
    Call,
    Shapes,
    check_outputs,
    describe,
    from_bytes,
    from_list,
    timeout_of,
)
from sparse_tvm.serving.refusal import Kind, Refusal, invalid
from sparse_tvm.serving.version import Version

EXTENSIONS = ["binary_tensor_data", "model_repository"]
PLATFORM = "sparse_tvm"
_HEADER_LENGTH = "inference-header-content-length"
_CLIENT_GONE = 499
_BODY_SECONDS = 30.0

Handler = Callable[[Request, Core], Awaitable[Response]]


def build_app(core: Core, *, owns_core: bool = False) -> Starlette:
    """Return the ASGI application that serves the models of `core`.

    Parameters
    ----------
    core : Core
        Its models; loaded already, unless the application is to do it.
    owns_core : bool
        Start `core` with the application's lifespan, and stop it with it.
    """

    def route(path: str, handler: Handler, *methods: str) -> Route:
        async def endpoint(request: Request) -> Response:
            return await _answer(handler, request, core)

        return Route(path, endpoint, methods=list(methods))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await core.start()
        yield
        await core.stop()

    model = "/v2/models/{model}"
    version = model + "/versions/{version}"
    repository = "/v2/repository"
    return Starlette(
        routes=[
            route(f"{model}/infer", _infer, "POST"),
            route(f"{version}/infer", _infer, "POST"),
            route("/v1/embeddings", _embeddings, "POST"),
            route("/v1/models", _openai_models, "GET"),
            route("/metrics", _metrics, "GET"),
            route("/v2", _server, "GET"),
            route("/v2/health/live", _live, "GET"),
            route("/v2/health/ready", _ready, "GET"),
            route("/v2/models", _models, "GET"),
            route(model, _metadata, "GET"),
            route(version, _metadata, "GET"),
            route(f"{model}/ready", _model_ready, "GET"),
            route(f"{version}/ready", _model_ready, "GET"),
            route(f"{repository}/index", _index, "POST"),
            route(f"{repository}/models/{{model}}/load", _load, "POST"),
            route(f"{repository}/models/{{model}}/unload", _unload, "POST"),
        ],
        exception_handlers={HTTPException: _unknown_route},
        lifespan=lifespan if owns_core else None,
    )


async def _answer(handler: Handler, request: Request, core: Core) -> Response:
    """Run a handler and make a response of whatever comes out of it."""
    started = monotonic()
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True

    request.state.on_disconnect = leave
    try:
        response = await handler(request, core)
    except Refusal as refusal:
        response = _refused(request, refusal)
    except ClientDisconnect:
        response = Response(status_code=_CLIENT_GONE)
    except asyncio.CancelledError:
        if not gone:
            raise
        response = Response(status_code=_CLIENT_GONE)
    except Exception as error:
        logs.exception("request failed", error)
        response = _refused(request, Refusal(Kind.FAILED, "internal error; see the server's log"))
    if core.draining:
        response.headers["connection"] = "close"
    if request.method == "POST":
        model = request.path_params.get("model") or getattr(request.state, "model", "")
        core.count(model, "http", response.status_code, monotonic() - started)
    return response


async def _infer(request: Request, core: Core) -> Response:
    name, version = request.path_params["model"], request.path_params.get("version", "")
    with core.repository.use(name, version) as loaded:
        async with core.budget.hold() as held:
            body = await _body(request, core.options.max_body, held.grow)
            call = _decode(body, request.headers.get(_HEADER_LENGTH), loaded)
            del body
            with _watch(request):
                outputs = await loaded.infer(call.arrays, call.sizes, core.timeout(call.timeout))
        return _encode(call, outputs, loaded)


async def _embeddings(request: Request, core: Core) -> Response:
    async with core.budget.hold() as held:
        body = await _body(request, core.options.max_body, held.grow)
        with _watch(request):
            document = _json(body)
            request.state.model = str(document.get("model"))
            answer = await embeddings(document, core)
    return _reply(answer)


async def _openai_models(_: Request, core: Core) -> Response:
    models = [{"id": n, "object": "model", "owned_by": PLATFORM} for n in core.repository.names()]
    return _reply({"object": "list", "data": models})


async def _metrics(_: Request, core: Core) -> Response:
    text = await asyncio.to_thread(core.metrics.render)
    return Response(text, media_type=core.metrics.content_type)


async def _server(_: Request, core: Core) -> Response:
    return _reply({"name": PLATFORM, "version": sparse_tvm.__version__, "extensions": EXTENSIONS})


async def _live(_: Request, core: Core) -> Response:
    return _reply({"live": True})


async def _ready(_: Request, core: Core) -> Response:
    if not core.ready:
        raise Refusal(Kind.UNAVAILABLE, "not ready", retry_after=1)
    return _reply({"ready": True})


async def _models(_: Request, core: Core) -> Response:
    return _reply({"models": core.repository.names()})


async def _metadata(request: Request, core: Core) -> Response:
    parameters = request.path_params
    with core.repository.use(parameters["model"], parameters.get("version", "")) as loaded:
        return _reply(metadata(loaded))


async def _model_ready(request: Request, core: Core) -> Response:
    parameters = request.path_params
    with core.repository.use(parameters["model"], parameters.get("version", "")) as loaded:
        if not loaded.ready:
            raise Refusal(Kind.UNAVAILABLE, "no worker is ready", retry_after=1)
        return _reply({"name": loaded.model, "ready": True})


async def _index(_: Request, core: Core) -> Response:
    return _reply(core.repository.index())


async def _load(request: Request, core: Core) -> Response:
    await core.repository.load(request.path_params["model"])
    return _reply({"name": request.path_params["model"], "load": True})


async def _unload(request: Request, core: Core) -> Response:
    await core.repository.unload(request.path_params["model"])
    return _reply({"name": request.path_params["model"], "unload": True})


def metadata(version: Version) -> dict[str, Any]:
    """Return a model's metadata, as the manifest gives it."""
    return {
        "name": version.model,
        "versions": [version.version],
        "platform": PLATFORM,
        "inputs": [describe(spec) for spec in version.inputs],
        "outputs": [describe(spec) for spec in version.outputs],
    }


async def _body(request: Request, limit: int, grow: Callable[[int], None]) -> bytes:
    """Read the body, within the limits of its size, of all bodies together, and of time."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Refusal(Kind.UNSUPPORTED, "content-encoding is not supported; send plain bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:18]) > limit:
        raise Refusal(Kind.TOO_LARGE, f"the body has {announced} bytes, the limit is {limit}")
    chunks: list[bytes] = []
    size = 0

    async def read() -> None:
        nonlocal size
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise Refusal(Kind.TOO_LARGE, f"the body exceeds the limit of {limit} bytes")
            grow(len(chunk))
            chunks.append(chunk)

    try:
        await asyncio.wait_for(read(), _BODY_SECONDS)
    except (asyncio.TimeoutError, TimeoutError):
        raise Refusal(Kind.TOO_SLOW, f"the body took longer than {_BODY_SECONDS:g} s") from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class _watch:
    """Cancels the surrounding task when the client goes away."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._watcher = asyncio.create_task(self._wait(task))

    def __exit__(self, *_: object) -> None:
        self._watcher.cancel()

    async def _wait(self, task: asyncio.Task[Any]) -> None:
        with suppress(asyncio.CancelledError):
            while (await self._request.receive())["type"] != "http.disconnect":
                pass
            self._request.state.on_disconnect()
            task.cancel()


def _json(body: Any) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise invalid("the body is not a JSON object")
    return document


def _decode(body: bytes, header_length: str | None, version: Version) -> Call:
    """Check and decode an inference request."""
    view = memoryview(body)
    if header_length is None:
        document, tail = _json(body), view[:0]
    else:
        if not header_length.isdecimal() or int(header_length[:18]) > len(body):
            raise invalid(f"{_HEADER_LENGTH}: {header_length[:40]!r} does not fit the body")
        document, tail = _json(view[: int(header_length)]), view[int(header_length) :]
    shapes = Shapes(version.inputs, version.limits)
    for entry in _objects(document, "inputs"):
        spec, shape = shapes.expect(entry.get("name"), entry.get("datatype"), entry.get("shape"))
        nbytes = _parameters(entry).get("binary_data_size")
        if nbytes is None:
            shapes.add(spec, from_list(spec, entry.get("data"), shape))
            continue
        if type(nbytes) is not int or not 0 <= nbytes <= len(tail):
            raise invalid(f"binary_data_size of input {spec.name!r} does not fit the body")
        shapes.add(spec, from_bytes(spec, tail[:nbytes], shape))
        tail = tail[nbytes:]
    if tail:
        raise invalid(f"{len(tail)} bytes follow the last input")
    arrays = shapes.complete()
    parameters = _parameters(document)
    wanted = {
        entry.get("name"): _parameters(entry).get("binary_data")
        for entry in (_objects(document, "outputs") if document.get("outputs") else [])
    }
    check_outputs(list(wanted), version.outputs)
    name = document.get("id")
    return Call(
        arrays,
        shapes.sizes,
        wanted,  # type: ignore[arg-type]
        parameters.get("binary_data_output") is True,
        name if isinstance(name, str) else "",
        timeout_of(parameters),
    )


def _objects(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = document.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise invalid(f"{key} must be a list of objects")
    for entry in entries:
        if not isinstance(entry.get("name"), str):
            raise invalid(f"an entry of {key} has no name")
    return entries


def _parameters(entry: Mapping[str, Any]) -> dict[str, Any]:
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise invalid("parameters must be an object")
    return parameters


def _encode(call: Call, outputs: Mapping[str, np.ndarray], version: Version) -> Response:
    """Return the results as JSON, those asked for in binary after it."""
    entries = []
    tail: list[Any] = []
    for name in call.outputs or outputs:
        array = outputs[name]
        entry: dict[str, Any] = {
            "name": name,
            "datatype": DATATYPES[array.dtype.name],
            "shape": array.shape,
        }
        wanted = call.outputs.get(name)
        if call.binary if wanted is None else wanted:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            tail.append(array.tobytes())
        else:
            entry["data"] = _plain(array)
        entries.append(entry)
    document: dict[str, Any] = {
        "model_name": version.model,
        "model_version": version.version,
        "outputs": entries,
    }
    if call.id:
        document["id"] = call.id
    header = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not tail:
        return Response(header, media_type="application/json")
    return Response(
        b"".join([header, *tail]),
        media_type="application/octet-stream",
        headers={_HEADER_LENGTH: str(len(header))},
    )


def _plain(array: np.ndarray) -> Any:
    """Return an array as orjson takes it: flat and contiguous."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.astype(np.float32) if array.dtype == np.float16 else flat


def _reply(document: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")


def _refused(request: Request, refusal: Refusal) -> Response:
    """Return an error in the shape that clients of this route expect."""
    error: Any = refusal.message
    if request.url.path.startswith("/v1/"):
        kind = "invalid_request_error" if refusal.kind.status < 500 else "server_error"
        error = {"message": refusal.message, "type": kind, "param": None, "code": None}
    response = _reply({"error": error}, refusal.kind.status)
    if refusal.retry_after is not None:
        response.headers["retry-after"] = str(refusal.retry_after)
    return response


async def _unknown_route(request: Request, error: HTTPException) -> Response:
    reply = _reply(
        {"error": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code
    )
    reply.headers.update(error.headers or {})
    return reply
