"""Run artifacts for another architecture: qemu's user mode, and a Python of that architecture.

``scripts/setup_arm.sh`` makes the place where such a Python lives, with NumPy and TVM's runtime:
``root`` is a root directory, ``site`` holds packages. In the emulator this file is the program:
``python -m sparse_tvm.emulation ARTIFACT DIRECTORY`` runs the artifact on each ``inputs_*.npz``
there is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparse_tvm.cpu import architecture
from sparse_tvm.errors import SparseTvmError
from sparse_tvm.npz import read_npz, write_npz
from sparse_tvm.targets import Target

PLACE_VARIABLE = "SPARSE_TVM_AARCH64"
_EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
_READY = "ready"
_ANY_CPU = "max"


class NoEmulator(Exception):
    """There is none for this architecture, or it does not work; the text says which."""


class EmulatedCrash(Exception):
    """The artifact itself failed; the text says how."""


@dataclass(frozen=True)
class Emulator:
    """How to run Python for a target on this machine.

    Attributes
    ----------
    program : str
        qemu's.
    cpu : str
        The CPU it plays.
    place : Path
        Where the Python lives.
    """

    program: str
    cpu: str
    place: Path

    @classmethod
    def of(cls, target: Target) -> Emulator:
        """The emulator for a target of another architecture.

        Raises
        ------
        NoEmulator
            When qemu or the Python is missing.
        """
        if target.architecture != "aarch64":
            raise NoEmulator(f"this machine is {architecture()}")
        program = next(filter(shutil.which, _EMULATORS), None)
        if program is None:
            raise NoEmulator(f"this machine is {architecture()} and has no {_EMULATORS[0]}")
        place = place_of_python()
        if not (place / "root").is_dir():
            raise NoEmulator(f"there is no Python for aarch64 in {place}")
        known = subprocess.run([program, "-cpu", "help"], capture_output=True, text=True).stdout
        return cls(program, target.name if target.name in known.split() else _ANY_CPU, place)

    def run(
        self, artifact: Path, inputs: Sequence[Mapping[str, np.ndarray]]
    ) -> list[dict[str, np.ndarray]]:
        """Run an artifact on each of ``inputs``.

        Raises
        ------
        NoEmulator
            When Python or TVM's runtime does not start there.
        EmulatedCrash
            When the artifact does not load, or crashes.
        """
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            for i, arrays in enumerate(inputs):
                write_npz(directory / f"inputs_{i}.npz", arrays)
            done = subprocess.run(
                self.command(["-m", "sparse_tvm.emulation", str(artifact), name]),
                env=self.environment(),
                capture_output=True,
                text=True,
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                reason = lines[-1] if lines else f"exit status {done.returncode}"
                raise (EmulatedCrash if _READY in done.stdout else NoEmulator)(reason)
            return [read_npz(directory / f"outputs_{i}.npz") for i in range(len(inputs))]

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Python with these arguments, in the emulator."""
        root = self.place / "root"
        python = str(root / "usr" / "bin" / "python3")
        return [self.program, "-cpu", self.cpu, "-L", str(root), python, *arguments]

    def environment(self) -> dict[str, str]:
        """The environment in which that Python finds its packages, and this one."""
        ours = Path(__file__).parent.parent
        path = f"{self.place / 'site'}{os.pathsep}{ours}"
        return {**os.environ, "PYTHONPATH": path, "PYTHONNOUSERSITE": "1"}


def place_of_python() -> Path:
    """Where the Python for aarch64 is, or would be: ``$SPARSE_TVM_AARCH64``, or in the cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(PLACE_VARIABLE) or Path(cache) / "sparse-tvm" / "aarch64")


def main(artifact: str, directory: str) -> None:
    """What runs in the emulator."""
    from sparse_tvm.runtime import load
    from sparse_tvm.vm import runtime

    runtime()
    print(_READY, flush=True)
    try:
        model = load(artifact, threads=1)
        for inputs in sorted(Path(directory).glob("inputs_*.npz")):
            outputs = inputs.with_name(inputs.name.replace("inputs", "outputs"))
            write_npz(outputs, model.run(read_npz(inputs)))
    except SparseTvmError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(*sys.argv[1:])
