"""Who may ask for what: browsers, bearers of a token, and operators.

Requests prove nothing about their sender by themselves. A token does; the ``Origin`` that browsers
add says that a page of another site is behind a request, which its reader has not asked for; and
loading and unloading models is for those who may change what is served.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from enum import Flag, auto
from pathlib import Path

from sparse_tvm.errors import OptionError
from sparse_tvm.serving.options import Options
from sparse_tvm.serving.protocol import quoted
from sparse_tvm.serving.refusal import Kind, Refusal


class Needs(Flag):
    """What a route or method asks of a request, beside not coming from another site's page."""

    NOTHING = 0
    TOKEN = auto()
    CONTROL = auto()


class Access:
    """The rules of one server.

    Parameters
    ----------
    options : Options
        The server's.

    Raises
    ------
    OptionError
        When the file of tokens cannot be read, or is empty.
    """

    def __init__(self, options: Options) -> None:
        self.origins: Sequence[str] = options.origins
        self.control = options.allow_control
        if self.control is None:
            self.control = is_loopback(options.host)
        self._tokens = _read_tokens(options.token_file) if options.token_file else []

    @property
    def has_tokens(self) -> bool:
        """Whether requests need a token."""
        return bool(self._tokens)

    def check(self, needs: Needs, authorization: str, origin: str | None) -> None:
        """Refuse a request that may not be answered.

        Parameters
        ----------
        authorization, origin : str, str | None
            The headers.

        Raises
        ------
        Refusal
            With what is missing.
        """
        if origin is not None and origin not in self.origins:
            raise Refusal(
                Kind.FORBIDDEN,
                f"pages of {quoted(origin)} may not use this server; see --allow-origin",
            )
        if Needs.TOKEN in needs and self._tokens and not self._bears_token(authorization):
            raise Refusal(Kind.UNAUTHENTICATED, "the request bears no token that is known here")
        if Needs.CONTROL in needs and not self.control:
            raise Refusal(
                Kind.FORBIDDEN,
                "models are not loaded and unloaded over this network; see --allow-control",
            )

    def _bears_token(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        given = token.strip().encode(errors="replace")
        # Each is compared in full, so that the time it takes says nothing about the tokens.
        equal = [hmac.compare_digest(given, known) for known in self._tokens]
        return scheme.lower() == "bearer" and any(equal)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_tokens(path: Path) -> list[bytes]:
    try:
        tokens = [line.strip() for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise OptionError(f"cannot read the tokens in {path}: {error.strerror}") from error
    if not tokens:
        raise OptionError(f"{path} holds no token", hint="put one on each line")
    return tokens
