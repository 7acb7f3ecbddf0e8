"""The server process: sockets, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import uvicorn
import uvloop

from sparse_tvm.errors import OptionError
from sparse_tvm.serving import logs
from sparse_tvm.serving.core import Core
from sparse_tvm.serving.http_guard import GuardedProtocol
from sparse_tvm.serving.listener import (
    descriptor_limit,
    listen,
    raise_descriptor_limit,
    refuse_new,
)
from sparse_tvm.serving.options import Options
from sparse_tvm.serving.rest import build_app
from sparse_tvm.serving.rpc import build_server

_KEEP_ALIVE_SECONDS = 75


def serve(sources: Sequence[Path], options: Options) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Parameters
    ----------
    sources : sequence of Path
        Artifacts, or directories of models.

    Raises
    ------
    OptionError
        When a port cannot be listened on, or two models have the same name.
    ArtifactError
        When a model given as a file cannot be loaded.
    """
    logs.configure()
    uvloop.run(_serve(sources, options))


async def _serve(sources: Sequence[Path], options: Options) -> None:
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    core = Core(sources, options)
    _check_tls(options)
    raise_descriptor_limit()
    listener = listen(options.host, options.port)
    http = _HttpServer(core)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    rpc = build_server(core)
    ports = {"http": listener.getsockname()[1]}
    if options.grpc_port is not None:
        ports["grpc"] = _add_port(rpc, options, options.grpc_port)
        await rpc.start()
    logs.info(
        "listening",
        host=options.host,
        **ports,
        tls=options.tls_cert is not None,
        tokens=core.access.has_tokens,
        control=core.access.control,
    )
    try:
        await _until(ending, core.start())
        if not ending.is_set():
            logs.info("ready", models=core.repository.names())
        await ending.wait()
        await _drain(core, listener)
        http.should_exit = True
        await asyncio.gather(serving, rpc.stop(options.timeout))
    finally:
        http.should_exit = http.force_exit = True
        await asyncio.gather(serving, rpc.stop(0), return_exceptions=True)
        await core.stop()
    logs.info("stopped")


async def _until(ending: asyncio.Event, work: Any) -> None:
    """Do `work`, unless the end comes first."""
    task = asyncio.ensure_future(work)
    end = asyncio.ensure_future(ending.wait())
    await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
    end.cancel()
    if task.done():
        task.result()
    else:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _drain(core: Core, listener: socket.socket) -> None:
    """Turn clients away without losing what they have sent.

    First the server says that it is not ready and asks clients to close their connections, while
    it still answers: load balancers turn away, and no request meets a closing socket. Then it
    lets no new connection in.
    """
    logs.info("draining", seconds=core.options.drain)
    core.draining = True
    await asyncio.sleep(core.options.drain)
    await refuse_new(listener)


class _HttpServer(uvicorn.Server):  # type: ignore[misc]
    """uvicorn without its signal handlers: this process has its own order of ending."""

    def __init__(self, core: Core) -> None:
        options = core.options
        connections = min(options.max_connections, descriptor_limit() // 2)
        super().__init__(
            uvicorn.Config(
                build_app(core),
                http=partial(
                    GuardedProtocol, patience=options.patience, max_connections=connections
                ),
                ssl_certfile=options.tls_cert,
                ssl_keyfile=options.tls_key,
                ssl_ca_certs=options.tls_client_ca,
                ssl_cert_reqs=ssl.CERT_REQUIRED if options.tls_client_ca else ssl.CERT_NONE,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(options.timeout) + 1,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def _add_port(rpc: Any, options: Options, port: int) -> int:
    host = options.host
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    credentials = _credentials(options)
    try:
        bound: int = (
            rpc.add_insecure_port(address)
            if credentials is None
            else rpc.add_secure_port(address, credentials)
        )
    except RuntimeError as error:
        raise OptionError(f"cannot listen on {address}: {error}") from error
    if not bound:
        raise OptionError(f"cannot listen on {address}")
    return bound


def _check_tls(options: Options) -> None:
    """Read certificates and key before anything starts.

    Raises
    ------
    OptionError
        When they cannot be used.
    """
    if options.tls_cert is None or options.tls_key is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without the password nobody is asked for one.
        context.load_cert_chain(options.tls_cert, options.tls_key, password="")
        if options.tls_client_ca is not None:
            context.load_verify_locations(options.tls_client_ca)
    except OSError as error:  # an ssl.SSLError is one
        raise OptionError(f"cannot use the certificate, its key or the CA: {error}") from error


def _credentials(options: Options) -> Any:
    """Return what gRPC needs for TLS, or None without."""
    if options.tls_cert is None or options.tls_key is None:
        return None
    ca = options.tls_client_ca
    return grpc.ssl_server_credentials(
        [(options.tls_key.read_bytes(), options.tls_cert.read_bytes())],
        root_certificates=ca.read_bytes() if ca is not None else None,
        require_client_auth=ca is not None,
    )
