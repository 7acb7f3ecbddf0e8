"""Link object files into a shared library, with whatever linker the machine has."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sparse_tvm.cpu import architecture
from sparse_tvm.errors import BuildError

_COMPILERS = ("gcc", "clang", "cc")
_HINT = "install gcc or clang, or run `pip install ziglang`, which brings a linker"
_CROSS_HINT = "install gcc-{}-linux-gnu, or run `pip install ziglang`, which links for any machine"


def link(
    objects: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    triple: str | None = None,
) -> None:
    """Link `objects` into the shared library `output`, without debug information.

    The linker is ``$CC`` when set; otherwise the first that works of gcc, clang, cc and the
    ``ziglang`` package. For another architecture than this machine's, which `triple` tells, it
    is the cross gcc (``aarch64-linux-gnu-gcc``), clang or ``ziglang``.

    Raises
    ------
    BuildError
        When no linker works; the message says what became of each.
    """
    arguments = ["-shared", "-fPIC", "-s", "-o", os.fspath(output)]
    arguments += [os.fspath(path) for path in objects]
    arguments += ["-lm"]
    failures = []
    wanted = triple or _host_triple()
    for name, command in linkers(wanted):
        failure = _run([*command, *arguments]) if command else "not found"
        if failure is None:
            return
        failures.append(f"{name}: {failure}")
    machine = wanted.split("-")[0]
    raise BuildError(
        f"cannot link the model for {machine}; tried {'; '.join(failures)}",
        hint=_HINT if machine == architecture() else _CROSS_HINT.format(machine),
    )


@dataclass(frozen=True)
class Linker:
    """Links the way ``tvm.runtime.Module.export_library(output, fcompile=...)`` asks for it."""

    triple: str | None = None

    def __call__(
        self, output: str, objects: Sequence[str], options: Sequence[str] | None = None
    ) -> None:
        """Link `objects`; `options` are for C sources, which our modules do not hold."""
        link(objects, output, self.triple)

    def get_target_triple(self) -> str:
        """What TVM packs data for where no module has LLVM's code."""
        return self.triple or _host_triple()


def linkers(triple: str) -> list[tuple[str, list[str]]]:
    """Return (name, command) in order of preference; the command is empty where missing."""
    if chosen := os.environ.get("CC"):
        return [(f"$CC ({chosen})", _found(shlex.split(chosen)))]
    machine = triple.split("-")[0]
    if machine == architecture():
        found = [(name, _found([name])) for name in _COMPILERS]
    else:
        clang = ["clang", f"--target={triple}", "-fuse-ld=lld"]
        cross = [f"{machine}-linux-gnu-gcc"]
        found = [(command[0], _found(command)) for command in (cross, clang)]
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", _zig_target(triple)]
    found.append(("ziglang", zig if find_spec("ziglang") else []))
    return found


def _host_triple() -> str:
    return f"{architecture()}-linux-gnu"


def _found(command: list[str]) -> list[str]:
    return command if command and shutil.which(command[0]) else []


def _zig_target(triple: str) -> str:
    """Drop the vendor, which zig does not take: x86_64-unknown-linux-gnu -> x86_64-linux-gnu."""
    parts = triple.split("-")
    return "-".join([parts[0], *parts[-2:]])


def _run(command: list[str]) -> str | None:
    """Run `command`; return the last line it printed when it fails."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        return error.strerror or str(error)
    if done.returncode == 0:
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode} ({Path(command[0]).name})"
