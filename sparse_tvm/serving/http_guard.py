"""uvicorn's HTTP connection, hardened: slow or endless requests cost a connection no more."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEADER_SECONDS = 15.0
_HEADER_BYTES = 64 << 10


class GuardedProtocol(HttpToolsProtocol):  # type: ignore[misc]
    """Closes connections whose headers take too long or grow too large.

    Without it a client that sends one byte a minute, or headers without end, keeps a connection
    and its memory for ever.
    """

    _timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _in_body = False

    def connection_made(self, transport: Any) -> None:
        """Expect the first request's headers in time."""
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse more data, unless headers have grown too large."""
        if not self._in_body:
            self._header_bytes += len(data)
        super().data_received(data)
        if not self._in_body and self._header_bytes > _HEADER_BYTES:
            self._give_up("headers too large")

    def on_message_begin(self) -> None:
        """Start a request; on a connection kept alive, its headers must come in time too."""
        super().on_message_begin()
        if self._timer is None:
            self._expect_headers()

    def on_headers_complete(self) -> None:
        """Start to answer."""
        self._stop_timer()
        self._in_body = True
        self._header_bytes = 0
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
