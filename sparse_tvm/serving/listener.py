"""The listening socket, closed without losing a connection."""

from __future__ import annotations

import asyncio
import ctypes
import resource
import socket
import struct

from sparse_tvm.errors import OptionError

_BACKLOG = 1024
_DESCRIPTORS = 65536
_SO_ATTACH_FILTER = 26
_REFUSE_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # a packet filter that returns 0: drop
_ACCEPT_QUEUE = struct.Struct("24xI")  # in Linux's struct tcp_info of a listening socket
_SETTLE_SECONDS = 0.25


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises
    ------
    OptionError
        When it cannot.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise OptionError(f"cannot listen on {host}:{port}: {error.strerror}") from error


async def refuse_new(listener: socket.socket) -> None:
    """Let no new connection be made, and return when all that were made are being read.

    Closing a listening socket resets the connections in its queue, which their clients believe
    to be accepted, so first new ones are dropped before they enter it.
    """
    program = ctypes.create_string_buffer(_REFUSE_ALL)
    filter = struct.pack("HxxxxxxP", 1, ctypes.addressof(program))
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter)
    while _queued(listener):
        await asyncio.sleep(0.001)
    await asyncio.sleep(_SETTLE_SECONDS)


def _queued(listener: socket.socket) -> int:
    """Return how many connections wait to be accepted."""
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACCEPT_QUEUE.size)
    queued: int = _ACCEPT_QUEUE.unpack(info)[0]
    return queued


def raise_descriptor_limit() -> None:
    """Let this process open as many files as the system allows it to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptor_limit() -> int:
    """Return how many files this process may open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
