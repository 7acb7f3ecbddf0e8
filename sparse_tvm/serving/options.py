"""What one server may do: sizes, times and limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparse_tvm.cpu import usable_cores
from sparse_tvm.devices import parse_device
from sparse_tvm.errors import OptionError

_POSITIVE = (
    *("workers", "max_batch", "max_queue", "timeout", "max_body", "max_pending"),
    *("max_connections", "patience"),
)


@dataclass(frozen=True)
class Options:
    """Options of a server; the command line's are the same, with times in other units.

    Parameters
    ----------
    host, port, grpc_port : str, int, int | None
        Where to listen; port 0 takes any free one, ``grpc_port=None`` none.
    workers : int
        Processes per model. They share the pages of its weights.
    threads : int | None
        Threads per worker; by default the cores are divided among the workers.
    devices : tuple[str, ...]
        Where models run, such as ``cuda:1``; workers are spread over them. By default each runs on
        the first device of the kind that it was compiled for.
    huge_pages : bool
        Whether each worker has a model's weights in memory of its own, as :func:`sparse_tvm.load`
        has it.
    max_batch : int
        Rows that one run may take; 1 turns dynamic batching off.
    max_delay : float
        Seconds that a request may wait for others to join its batch while a worker is idle.
    max_queue : int
        Requests of one model that may wait; those beyond are refused.
    timeout : float
        Seconds after which a request is given up, and a worker that is still running it is
        killed. Clients may ask for less.
    max_body : int
        Bytes of one request.
    max_pending : int
        Bytes of all requests together, from their first byte to the last of their results.
    max_connections : int
        HTTP connections at a time.
    patience : float
        Seconds that a client may take to send a request's body, or to read more of its answer.
    allow_control : bool | None
        Load and unload models when clients ask; by default where only this machine can ask.
    origins : tuple[str, ...]
        Sites whose pages may use the server in their readers' browsers.
    token_file : Path | None
        One of these tokens, one on each line, is asked of every request but for health.
    tls_cert, tls_key, tls_client_ca : Path | None
        PEM files: the server's certificate and key, and those that sign clients' certificates,
        which are demanded then.
    drain : float
        Seconds between SIGTERM and closing the listening sockets; time for load balancers to
        see that the server is not ready any more.
    poll : float
        Seconds between looks at the model files for new versions; 0 looks only when asked to
        load.
    access_log : bool
        Log a line for every request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8001
    workers: int = 1
    threads: int | None = None
    devices: tuple[str, ...] = ()
    huge_pages: bool = False
    max_batch: int = 8
    max_delay: float = 0.0
    max_queue: int = 256
    timeout: float = 60.0
    max_body: int = 64 << 20
    max_pending: int = 256 << 20
    max_connections: int = 1024
    patience: float = 30.0
    allow_control: bool | None = None
    origins: tuple[str, ...] = ()
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    drain: float = 1.0
    poll: float = 2.0
    access_log: bool = False

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            # Written so that NaN is refused too.
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("max_delay", "drain", "poll"):
            if not getattr(self, name) >= 0:
                raise OptionError(f"{name} must not be negative, not {getattr(self, name)}")
        for device in self.devices:
            parse_device(device)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise OptionError("TLS takes both a certificate and its key")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise OptionError("clients show certificates over TLS only; give the server's, too")

    @property
    def threads_per_worker(self) -> int:
        """Threads of each worker."""
        return self.threads or max(1, usable_cores() // self.workers)
