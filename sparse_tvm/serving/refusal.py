"""Every answer that is not a result, with its status in HTTP and in gRPC."""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """Why a request gets no result: HTTP status, name of the gRPC status."""

    INVALID = (400, "INVALID_ARGUMENT")
    UNAUTHENTICATED = (401, "UNAUTHENTICATED")
    FORBIDDEN = (403, "PERMISSION_DENIED")
    NOT_FOUND = (404, "NOT_FOUND")
    TOO_SLOW = (408, "DEADLINE_EXCEEDED")
    TOO_LARGE = (413, "RESOURCE_EXHAUSTED")
    UNSUPPORTED = (415, "UNIMPLEMENTED")
    BUSY = (429, "RESOURCE_EXHAUSTED")
    FAILED = (500, "INTERNAL")
    UNAVAILABLE = (503, "UNAVAILABLE")
    TIMEOUT = (504, "DEADLINE_EXCEEDED")

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.value[0]

    @property
    def code(self) -> str:
        """The name of the gRPC status code."""
        return self.value[1]


class Refusal(Exception):
    """A request that gets no result.

    Parameters
    ----------
    kind : Kind
        The class of reasons, which decides the status.
    message : str
        What is wrong, for the client.
    retry_after : int | None
        Seconds after which trying again makes sense.
    """

    def __init__(self, kind: Kind, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.retry_after = retry_after


def invalid(message: str) -> Refusal:
    """Return the refusal of a request that is wrong in itself."""
    return Refusal(Kind.INVALID, message)
