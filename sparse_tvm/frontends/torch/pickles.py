"""PyTorch files that may hold pickles: nothing is unpickled unless the user asks for it.

Unpickling runs whatever code is in the file. ``torch.export.load`` falls back to it silently,
so an archive is checked before that sees it.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.read import one_line
from sparse_tvm.frontends.source import require

_HINT = "--allow-pickle (allow_pickle=True) unpickles it: do that only if you trust its author"


def check_archive(path: Path) -> None:
    """Refuse a ``.pt2`` archive in which anything but plain tensors is pickled.

    Raises
    ------
    ModelError
        When it is damaged, or holds such a pickle.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                inner = entry.partition("/")[2]
                if inner.startswith("data/constants/custom_obj") or "opaque_obj" in inner:
                    raise ModelError(f"{path}: holds a pickled object: {inner}", hint=_HINT)
                if inner.endswith("_config.json"):
                    _check_payloads(path, archive, entry)
                elif entry.endswith(".pt"):
                    _check_pickle(path, inner or entry, archive.read(entry))
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ModelError(f"{path}: truncated or damaged: {one_line(error)}") from error


def _check_payloads(path: Path, archive: zipfile.ZipFile, config: str) -> None:
    folder = config.rpartition("/")[0]
    for name, payload in json.loads(archive.read(config)).get("config", {}).items():
        if payload.get("use_pickle"):
            _check_pickle(path, name, archive.read(f"{folder}/{payload['path_name']}"))


def _check_pickle(path: Path, name: str, data: bytes) -> None:
    """Refuse a pickle that PyTorch's own restricted unpickler, of tensors alone, refuses."""
    torch = require("torch", "torch", f"{path}")
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        raise ModelError(
            f"{path}: {name} is a pickle of more than tensors: {one_line(error, 120)}", hint=_HINT
        ) from error


def load_pickle(path: Path, *, allowed: bool) -> Any:
    """Unpickle an ``nn.Module`` saved whole with ``torch.save``, if the user allowed it.

    Raises
    ------
    ModelError
        When they did not, or it holds something else.
    """
    if not allowed:
        raise ModelError(
            f"{path}: is a Python pickle, which can run any code when it is read: not opened",
            hint="save the model with torch.export.save; or, if you trust its author, "
            "--allow-pickle (allow_pickle=True)",
        )
    torch = require("torch", "torch", f"{path}")
    try:
        module = torch.load(path, weights_only=False, map_location="cpu")
    except Exception as error:
        raise ModelError(f"{path}: cannot be unpickled: {one_line(error)}") from error
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"{path}: holds a {type(module).__name__}, not a model",
            hint="weights alone have no graph: export the model with torch.export",
        )
    return module
