"""``sparse-tvm serve``: serve compiled models over HTTP and gRPC."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_tvm.cli.options import HugePages


def serve(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL.so...|DIR",
            help="Compiled models, or a directory in Triton's layout: DIR/NAME/VERSION/model.so.",
        ),
    ],
    host: Annotated[str, typer.Option(help="0.0.0.0 for all networks.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP; 0: any free one.")] = 8000,
    grpc_port: Annotated[
        int, typer.Option(min=-1, max=65535, help="gRPC; 0: any free one, -1: none.")
    ] = 8001,
    workers: Annotated[int, typer.Option(min=1, help="Processes per model.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Per worker; by default the cores are divided.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Such as cuda:1; repeatable, workers are spread over them. By default the first "
            "that a model is for.",
        ),
    ] = None,
    huge_pages: HugePages = False,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Rows that one run may join; 1: no dynamic batching.")
    ] = 8,
    max_delay_ms: Annotated[
        float, typer.Option(min=0, help="How long a request may wait for others, if none waits.")
    ] = 0.0,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests that may wait per model; more are refused.")
    ] = 256,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds until a request is given up.")
    ] = 60.0,
    max_body_mb: Annotated[int, typer.Option(min=1, help="MiB that one request may have.")] = 64,
    max_pending_mb: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="MiB of all requests together, with their results; by default four of the "
            "largest, or 256.",
        ),
    ] = None,
    max_connections: Annotated[int, typer.Option(min=1, help="HTTP connections.")] = 1024,
    patience: Annotated[
        float,
        typer.Option(min=0.001, help="Seconds for a request's body, and to read more of a reply."),
    ] = 30.0,
    allow_control: Annotated[
        bool | None,
        typer.Option(
            "--allow-control/--no-allow-control",
            help="Load and unload models on request; by default on loopback hosts only.",
            show_default=False,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A site whose pages may use the server; repeatable."),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Tokens, one a line: requests must bear one.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM; with it, TLS only.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM, of the certificate.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM; with it, clients must show a certificate.")
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds from SIGTERM until the sockets close.")
    ] = 1.0,
    poll: Annotated[
        float, typer.Option(min=0, help="Seconds between looks for new versions; 0: never.")
    ] = 2.0,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log a line for every request.")
    ] = False,
) -> None:
    """Serve MODEL.so over the Open Inference Protocol, HTTP and gRPC, until SIGTERM.

    Loading a model runs its code: serve only files that you would run as programs.
    """
    from sparse_tvm.errors import ArtifactError, SparseTvmError
    from sparse_tvm.extras import install_command

    for model in models:
        if not model.exists():
            raise ArtifactError(f"{model}: no such file or directory")
    try:
        from sparse_tvm.serving.options import Options
        from sparse_tvm.serving.server import serve as run_server
    except ImportError as error:
        raise SparseTvmError(
            f"{error.name} is not installed", hint=install_command("serve")
        ) from error
    options = Options(
        host=host,
        port=port,
        grpc_port=None if grpc_port < 0 else grpc_port,
        workers=workers,
        threads=threads,
        devices=tuple(device or ()),
        huge_pages=huge_pages,
        max_batch=max_batch,
        max_delay=max_delay_ms / 1e3,
        max_queue=max_queue,
        timeout=timeout,
        max_body=max_body_mb << 20,
        max_pending=(max_pending_mb or max(4 * max_body_mb, 256)) << 20,
        max_connections=max_connections,
        patience=patience,
        allow_control=allow_control,
        origins=tuple(allow_origin or ()),
        token_file=token_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        drain=drain,
        poll=poll,
        access_log=access_log,
    )
    run_server(models, options)
