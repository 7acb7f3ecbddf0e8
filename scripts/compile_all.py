"""Compile and verify every ONNX file in some directories, as it is, and say what becomes of each.

python scripts/compile_all.py DIRECTORY...

For models that others trained and exported, such as those inside of wheels:
`pip download --no-deps silero-vad`, then unpack the wheel.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 1200


def main(directories: list[str]) -> int:
    files = sorted(path for each in directories for path in Path(each).rglob("*.onnx"))
    works = 0
    with tempfile.TemporaryDirectory() as directory:
        for file in files:
            started = time.perf_counter()
            error = compiled(file, Path(directory) / "model.so")
            works += error is None
            seconds = time.perf_counter() - started
            print(f"{file.name} ({seconds:.0f} s): {error or 'works'}", flush=True)
    print(f"{works} of {len(files)}")
    return 0 if works == len(files) else 1


def compiled(file: Path, artifact: Path) -> str | None:
    """Compile in a process of its own; return the error, None if there is none."""
    command = [sys.executable, "-m", "sparse_tvm", "compile", str(file), "-o", str(artifact)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not done in {SECONDS} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error:")), f"ended in {lines[-1:]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
