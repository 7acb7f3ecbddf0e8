"""When Python looks for garbage, and when it need not."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause the garbage collector: loading and tracing make many objects, most of which stay.

    A search among them finds nothing, and takes as long as all the rest of loading an artifact.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
