"""uvicorn's HTTP connection, hardened: slow or endless requests cost a connection no more."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEADER_SECONDS = 15.0
_HEADER_BYTES = 64 << 10
_LEAST_READ = 16 << 10  # bytes
_FRAMING = 16
"""Bytes around one byte of a body in chunks; a chunk of one byte takes five."""

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 1\r\n"
    b"connection: close\r\n\r\n"
)


class GuardedProtocol(HttpToolsProtocol):  # type: ignore[misc]
    """Closes connections that cost more than they bring.

    Without it a client that sends one byte a minute, or headers without end, or does not read
    its answer, keeps a connection and its memory for ever; and enough clients keep every
    descriptor, so that no worker can be started.

    Parameters
    ----------
    patience : float
        Seconds that a client may take to read more of its answer.
    max_connections : int
        Connections at a time; those beyond are told to come back later.
    """

    def __init__(self, *arguments: Any, patience: float, max_connections: int, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._patience = patience
        self._max_connections = max_connections
        self._timer: asyncio.TimerHandle | None = None
        self._reading_timer: asyncio.TimerHandle | None = None
        self._unread = 0
        self._header_bytes = self._framing_bytes = self._body_bytes = 0
        self._in_body = False

    def connection_made(self, transport: Any) -> None:
        """Expect the first request's headers in time."""
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            transport.write(_FULL)
            transport.close()
            return
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        self._stop_reading_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Hold the answer back, and see to it that the client reads on."""
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._reading_timer = self.loop.call_later(self._patience, self._check_reading)

    def resume_writing(self) -> None:
        """Go on with the answer."""
        self._stop_reading_timer()
        super().resume_writing()

    def _check_reading(self) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread > self._unread - _LEAST_READ:
            self.transport.abort()
            return
        self._unread = unread
        self._reading_timer = self.loop.call_later(self._patience, self._check_reading)

    def _stop_reading_timer(self) -> None:
        if self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None

    def data_received(self, data: bytes) -> None:
        """Parse more data, unless headers have grown too large."""
        if self._in_body:
            self._framing_bytes += len(data)
        else:
            self._header_bytes += len(data)
        super().data_received(data)
        if not self._in_body and self._header_bytes > _HEADER_BYTES:
            self._give_up("headers too large")
        if self._in_body and self._framing_bytes > _HEADER_BYTES + _FRAMING * self._body_bytes:
            self._give_up("chunks or trailers too large")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; what follows a body in chunks is read by nobody, and may have no end."""
        if not self._in_body:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._framing_bytes -= len(body)
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_begin(self) -> None:
        """Start a request; on a connection kept alive, its headers must come in time too."""
        super().on_message_begin()
        if self._timer is None:
            self._expect_headers()

    def on_headers_complete(self) -> None:
        """Start to answer."""
        self._stop_timer()
        self._in_body = True
        self._header_bytes = self._framing_bytes = self._body_bytes = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Be ready for the next request's headers."""
        self._in_body = False
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Let a client that was answered early finish its body, but not for ever."""
        super().on_response_complete()
        if self._in_body and not self.transport.is_closing():
            self._expect_headers()

    def _expect_headers(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(_HEADER_SECONDS, self._give_up, "request too slow")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self, why: str) -> None:
        if self.transport.is_closing():
            return
        if self._in_body:
            self.transport.close()
        else:
            self.send_400_response(why)
