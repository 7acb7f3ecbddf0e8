"""Arrays by name in ``.npz`` files, with errors that name the file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping

import numpy as np

from sparse_tvm.errors import InputError
from sparse_tvm.files import replacing

_HINT = "make one with numpy.savez(FILE, input_name=array, ...)"


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return all arrays of a ``.npz`` file, by name.

    Raises
    ------
    InputError
        When the file is missing, damaged or something else, or holds Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                name.removesuffix(".npy"): _read_member(archive, name)
                for name in archive.namelist()
            }
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", hint=_HINT) from None
    except Exception as error:  # zipfile, its decompressors and NumPy raise whatever fits
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is not a sound .npz file: {reason}", hint=_HINT) from error


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as ``.npz``; unlike ``numpy.savez``, under any name.

    Raises
    ------
    OutputError
        When the file cannot be written.
    """
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as member:
        array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
        return array
