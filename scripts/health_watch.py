"""How long a server's health takes while something else happens to it."""

from __future__ import annotations

import subprocess
import sys

from sparse_tvm.serving.local import LocalServer

_ASK = """
import http.client, select, sys, time
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
longest = 0.0
print("watching", flush=True)
while not select.select([sys.stdin], [], [], 0.01)[0]:
    started = time.perf_counter()
    connection.request("GET", "/v2/health/live")
    connection.getresponse().read()
    longest = max(longest, time.perf_counter() - started)
print(longest)
"""


class Watch:
    """Asks for a server's health all the time, from a process of its own.

    Attributes
    ----------
    longest : float
        The longest that it took, in seconds; known at the end.
    """

    def __init__(self, server: LocalServer) -> None:
        self._command = [sys.executable, "-c", _ASK, str(server.http)]
        self.longest = float("nan")

    def __enter__(self) -> Watch:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        self.longest = float(self._process.communicate()[0])
