"""The Open Inference Protocol over HTTP, with the binary tensor extension."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

import sparse_tvm
from sparse_tvm.serving import logs
from sparse_tvm.serving.access import Needs
from sparse_tvm.serving.budget import Hold
from sparse_tvm.serving.core import Core
from sparse_tvm.serving.embeddings import MAX_BODY, embeddings, parse
from sparse_tvm.serving.http_codec import HEADER_LENGTH, decode, encode
from sparse_tvm.serving.protocol import describe, quoted
from sparse_tvm.serving.refusal import Kind, Refusal
from sparse_tvm.serving.version import Version

EXTENSIONS = ["binary_tensor_data", "model_repository"]
PLATFORM = "sparse_tvm"
_CLIENT_GONE = 499

_OPERATORS = Needs.TOKEN | Needs.CONTROL

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

    def route(path: str, handler: Handler, method: str, needs: Needs = Needs.TOKEN) -> Route:
        return Route(path, _Endpoint(handler, core, needs), methods=[method])

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
            route("/v2/health/live", _live, "GET", Needs.NOTHING),
            route("/v2/health/ready", _ready, "GET", Needs.NOTHING),
            route("/v2/models", _models, "GET"),
            route(model, _metadata, "GET"),
            route(version, _metadata, "GET"),
            route(f"{model}/ready", _model_ready, "GET"),
            route(f"{version}/ready", _model_ready, "GET"),
            route(f"{repository}/index", _index, "POST"),
            route(f"{repository}/models/{{model}}/load", _load, "POST", _OPERATORS),
            route(f"{repository}/models/{{model}}/unload", _unload, "POST", _OPERATORS),
        ],
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=list(core.access.origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=[HEADER_LENGTH],
            )
        ]
        if core.access.origins
        else [],
        exception_handlers={HTTPException: _unknown_route},
        lifespan=lifespan if owns_core else None,
    )


class _Endpoint:
    """A route's ASGI application; a request's memory is its own until the answer is sent."""

    def __init__(self, handler: Handler, core: Core, needs: Needs) -> None:
        self._handler = handler
        self._core = core
        self._needs = needs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        with self._core.budget.hold() as request.state.held:
            response = await _answer(self._checked, request, self._core)
            await response(scope, receive, send)

    async def _checked(self, request: Request, core: Core) -> Response:
        headers = request.headers
        core.access.check(self._needs, headers.get("authorization", ""), headers.get("origin"))
        return await self._handler(request, core)


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
    held = request.state.held
    with core.repository.use(name, version) as loaded:
        body = await _body(request, core.options.max_body, core.options.patience, held)
        call = await decode(body, request.headers.get(HEADER_LENGTH), loaded, held)
        del body
        held.grow(loaded.result_bytes(call.sizes))
        with _watch(request):
            outputs = await loaded.infer(call.arrays, call.sizes, core.timeout(call.timeout))
        return await encode(call, outputs, loaded, held)


async def _embeddings(request: Request, core: Core) -> Response:
    held = request.state.held
    body = await _body(request, min(core.options.max_body, MAX_BODY), core.options.patience, held)
    request.state.model, wanted = await parse(body, held)
    with _watch(request):
        return _reply(await embeddings(wanted, core, held))


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
        why = core.repository.troubles or "it starts, or ends"
        raise Refusal(Kind.UNAVAILABLE, f"not ready: {why}", retry_after=1)
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
            why = f": {loaded.trouble}" if loaded.trouble else ""
            raise Refusal(Kind.UNAVAILABLE, f"no worker is ready{why}", retry_after=1)
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


async def _body(request: Request, limit: int, seconds: float, held: Hold) -> bytearray:
    """Read the body, within the limits of its size, of all bodies together, and of time."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Refusal(Kind.UNSUPPORTED, "content-encoding is not supported; send plain bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:18]) > limit:
        raise Refusal(
            Kind.TOO_LARGE, f"the body has {quoted(announced)} bytes, the limit is {limit}"
        )
    body = bytearray()
    gave_way = False

    def give_way() -> None:
        nonlocal gave_way
        gave_way = True
        deadline.reschedule(asyncio.get_running_loop().time())

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds) as deadline:
            with held.arriving(give_way):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > limit:
                        raise Refusal(
                            Kind.TOO_LARGE, f"the body exceeds the limit of {limit} bytes"
                        )
                    held.grow(len(chunk))
                    body.extend(chunk)
            if not gave_way:
                return body
    if gave_way:
        raise Refusal(Kind.TOO_SLOW, "the body took long and gave way to others", retry_after=1)
    raise Refusal(Kind.TOO_SLOW, f"the body took longer than {seconds:g} s")


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


def _reply(document: Any, status: int = 200) -> Response:
    return Response(
        orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY),
        status,
        media_type="application/json",
    )


def _refused(request: Request, refusal: Refusal) -> Response:
    """Return an error in the shape that clients of this route expect."""
    error: Any = refusal.message
    if request.url.path.startswith("/v1/"):
        kind = "invalid_request_error" if refusal.kind.status < 500 else "server_error"
        error = {"message": refusal.message, "type": kind, "param": None, "code": None}
    response = _reply({"error": error}, refusal.kind.status)
    if refusal.kind is Kind.UNAUTHENTICATED:
        response.headers["www-authenticate"] = "Bearer"
    if refusal.retry_after is not None:
        response.headers["retry-after"] = str(refusal.retry_after)
    return response


async def _unknown_route(request: Request, error: HTTPException) -> Response:
    reply = _reply(
        {"error": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code
    )
    reply.headers.update(error.headers or {})
    return reply
