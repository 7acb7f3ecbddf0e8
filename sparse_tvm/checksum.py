"""CRC-32 by the fastest library at hand: all of them give the same number.

An artifact of hundreds of megabytes is checked whenever a server loads it. zlib-ng uses the CPU's
carry-less multiplication and reads about as fast as memory gives; zlib stands in for it on boards
that only tune, where nothing is installed but what runs a kernel.
"""

from __future__ import annotations

from typing import Any

try:
    from zlib_ng.zlib_ng import crc32 as _crc32
except ImportError:
    from zlib import crc32 as _crc32

LIBRARY: str = _crc32.__module__
"""What computes it."""


def crc32(data: Any) -> int:
    """Return the checksum of a buffer."""
    return int(_crc32(data))
