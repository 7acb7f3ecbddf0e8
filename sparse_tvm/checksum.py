"""CRC-32 by the fastest library at hand: all of them give the same number.

An artifact of hundreds of megabytes is checked whenever a server loads it. zlib-ng, which the extra
``serve`` brings, uses the CPU's carry-less multiplication and reads about as fast as memory gives.
"""

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
