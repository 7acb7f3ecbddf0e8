"""CRC-32 by the fastest library at hand: all of them give the same number.

An artifact of hundreds of megabytes is checked whenever a server loads it. zlib-ng, which the extra
``serve`` brings, uses the CPU's carry-less multiplication and reads about as fast as memory gives.
"""

from __future__ import annotations

from typing import Any

try:
    from zlib_ng import zlib_ng as library
except ImportError:
    import zlib as library

__all__ = ["crc32"]


def crc32(data: Any) -> int:
    """Return the checksum of a buffer."""
    return int(library.crc32(data))
