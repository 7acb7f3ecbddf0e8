"""How much memory a protobuf message takes once it is parsed, known before it is parsed.

Two bytes can become a message of a hundred, so 64 MB become gigabytes, in one step that nobody
can interrupt. A walk over the fields tells how many there are, and gives up early.
"""

from __future__ import annotations

from typing import Any

from sparse_tvm.serving.refusal import invalid

_MAX_FIELDS = 10_000
_FIELD_BYTES = 256
"""What one field takes at most beside its own bytes."""

_VARINT_BYTES = 16
"""What one byte of packed integers becomes at most: eight, and again while their array grows."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}


class Malformed(Exception):
    """The bytes are no protobuf message."""


def parsed_bytes(descriptor: Any, data: memoryview) -> int:
    """Return an upper bound of the memory that parsing `data` takes.

    Parameters
    ----------
    descriptor : google.protobuf.descriptor.Descriptor
        The message's type.

    Raises
    ------
    Malformed
        When this cannot be such a message.
    Refusal
        When there are more fields than any sound request has.
    """
    walk = _Walk()
    walk.message(descriptor, data)
    return walk.fields * _FIELD_BYTES + walk.payload


class _Walk:
    """Counts the fields of a message and of those in it, and the bytes of their values."""

    def __init__(self) -> None:
        self.fields = 0
        self.payload = 0

    def message(self, descriptor: Any, data: memoryview) -> None:
        known = descriptor.fields_by_number
        at, end = 0, len(data)
        while at < end:
            self.fields += 1
            if self.fields > _MAX_FIELDS:
                raise invalid(f"the message has more than {_MAX_FIELDS} fields")
            key, at = _varint(data, at)
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                _, at = _varint(data, at)
            elif kind in _SIZES:
                at += _SIZES[kind]
            elif kind == _BYTES:
                length, at = _varint(data, at)
                self.value(known.get(number), data[at : at + length])
                at += length
            else:
                raise Malformed
        if at > end:
            raise Malformed

    def value(self, field: Any, data: memoryview) -> None:
        if field is None or field.type in (field.TYPE_STRING, field.TYPE_BYTES):
            self.payload += len(data)
        elif field.message_type is not None:
            self.message(field.message_type, data)
        else:
            self.payload += _VARINT_BYTES * len(data)


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number at this place, and the place after it."""
    value = 0
    for index in range(10):
        if at + index >= len(data):
            raise Malformed
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise Malformed
