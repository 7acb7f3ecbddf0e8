"""Structured logs: one JSON object per line on stderr."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

_logger = logging.getLogger("sparse_tvm.serving")


def configure() -> None:
    """Send everything logged in this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    _logger.setLevel(logging.INFO)
    # It warns of every malformed request: a line for each that a stranger sends.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)


def info(event: str, **fields: Any) -> None:
    """Log something that is as it should be."""
    _logger.info(event, extra={"fields": fields})


def warning(event: str, **fields: Any) -> None:
    """Log something that its operator should look at."""
    _logger.warning(event, extra={"fields": fields})


def exception(event: str, error: BaseException) -> None:
    """Log a bug with its traceback."""
    _logger.error(event, exc_info=error)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
