"""Candidates that are built here and run on another machine, which has no sparse-tvm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tvm
from pretended import NATIVE, job, layer_of, sparse_weight
from tvm import te

from sparse_tvm.cli import main
from sparse_tvm.errors import OptionError
from sparse_tvm.operators import Layout, to_json
from sparse_tvm.tuning.job import this_machine
from sparse_tvm.tuning.provenance import here
from sparse_tvm.tuning.records import read_records
from sparse_tvm.tuning.remote import RemoteMeasurer
from sparse_tvm.tuning.runner import BOOT, bundle
from sparse_tvm.tuning.schedule_records import GENERIC, NAIVE

W = sparse_weight()
OP = layer_of(W)


FAKE_SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
[ "$2" = lost ] && { echo "connect: no route" >&2; exit 255; }
[ "$2" = strange ] && { echo "python3: not found" >&2; exit 127; }
exec sh -c "$3"
"""


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """An ssh that runs the command here, whatever the host."""
    fake = tmp_path / "bin" / "ssh"
    fake.parent.mkdir()
    fake.write_text(FAKE_SSH)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")


@pytest.mark.usefixtures("ssh")
def test_another_machine_measures(tmp_path, model):
    with RemoteMeasurer("board", sys.executable) as measurer:
        assert measurer.machine() == this_machine()
        assert len(measurer(job(OP, Layout("matmul", "csr")), W)["results"]) == 2
    records = tmp_path / "records.jsonl"
    command = ["tune", model, "-o", str(records), "--host", "board", "--python", sys.executable]
    command += ["--layer", "w1", "--tokens", "16", "--threads", "1", "--trials", "1"]
    assert main(command) == 0
    assert len(read_records([records], here().cpu)) == 1


@pytest.mark.usefixtures("ssh")
@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("lost", "lost: the connection is lost"),
        ("strange", "no runner starts there: ended with"),
    ],
)
def test_a_machine_that_does_not_answer(tmp_path, model, capsys, host, message):
    assert main(["tune", model, "-o", str(tmp_path / "r.jsonl"), "--host", host]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("ssh")
def test_a_crash_on_another_machine_is_no_lost_connection(tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -ILL $$\n")
    script.chmod(0o755)
    with RemoteMeasurer("board", str(script)) as measurer:
        answer = measurer(job(OP, Layout("matmul", "csr")), W)
    assert answer["failure"].startswith("killed by SIGILL")


@pytest.mark.usefixtures("ssh")
def test_a_candidate_takes_turns_with_another_there():
    csr, dense = Layout("matmul", "csr"), Layout("matmul", "dense", (6, 1))
    w = sparse_weight(512, 512, 0.99)
    op = layer_of(w)
    beside = to_json(replace(op, layer="", layout=dense))
    against = {**job(op, csr, tokens=(128,)), "beside": beside}
    with RemoteMeasurer("board", sys.executable) as measurer:
        for _ in range(2):  # the one that it is held against is there already
            (result,) = measurer(against, w)["results"]
            assert 0 < result["relative"] < 0.5  # a hundredth of the products


@pytest.mark.usefixtures("ssh")
def test_an_operator_without_a_kernel():
    x = te.placeholder((64, 128), name="x")
    function = te.create_prim_func([x, te.compute(x.shape, lambda i, j: te.exp(x[i, j]))])
    asked = {
        "backend": "cpu",
        "target": NATIVE,
        "function": tvm.ir.save_json(function),
        "schedule": None,
        "arguments": None,
        "expected": NAIVE,
        "samples": 1,
        "tokens": [1],
        "threads": [1],
        "copies": 1,
        "seconds": 0.01,
        "beside": None,
    }
    with RemoteMeasurer("board", sys.executable) as measurer:
        assert measurer.schedule(asked)["schedules"][:2] == [GENERIC, NAIVE]
        (alone,) = measurer.schedule({**asked, "schedule": GENERIC})["results"]
        (paired,) = measurer.schedule({**asked, "schedule": NAIVE, "beside": GENERIC})["results"]
        wrong = {**asked, "schedule": json.dumps([[["GetSBlock", [], ["no", "main"], ["b0"]]], []])}
        assert "failure" in measurer.schedule(wrong)
    assert alone["seconds"] > 0
    assert paired["relative"] > 0


def booted(*lines, before=""):
    files = bundle()
    told = f"{len(files)}\n".encode() + files + "".join(line + "\n" for line in lines).encode()
    command = [sys.executable, "-c", before + BOOT + "; " + SAYS]
    return subprocess.run(command, input=told, capture_output=True, check=False)


SAYS = "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"


def test_a_runner_needs_numpy_and_tvms_runtime_only():
    run = booted("{}")
    assert json.loads(run.stdout)["cpu"] == this_machine()["cpu"]
    loaded = set(run.stderr.decode().split()) - sys.stdlib_module_names
    needed = {"numpy", "sparse_tvm", "tvm_ffi"}
    assert needed < loaded
    assert not loaded & {"tvm", "onnx", "scipy", "torch", "rich", "typer"}


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("numpy", "numpy"),
        ("tvm_ffi", "TVM's runtime cannot be loaded"),
    ],
)
def test_a_machine_that_lacks_something_says_what(missing, message):
    run = booted("{}", before=f"import sys; sys.modules[{missing!r}] = None; ")
    assert run.returncode == 1
    assert message in run.stderr.decode().splitlines()[-1]


@pytest.mark.usefixtures("ssh")
def test_a_full_disk_ends_it(monkeypatch):
    failure = "OSError: [Errno 28] No space left on device"
    measurer = RemoteMeasurer("board", sys.executable)
    monkeypatch.setattr(measurer, "_ask", lambda *messages: list(messages) and {"failure": failure})
    with measurer, pytest.raises(OptionError, match="board: no space is left"):
        measurer(job(OP, Layout("matmul", "csr")), W)


@pytest.mark.usefixtures("ssh")
def test_a_board_that_is_throttled_ends_it(tmp_path, monkeypatch, model, capsys):
    throttled = tmp_path / "devices/platform/soc/soc:firmware/get_throttled"
    throttled.parent.mkdir(parents=True)
    throttled.write_text("5\n")
    there = "from sparse_tvm import machine_state; from pathlib import Path; "
    there += f"machine_state.SYSFS = Path({str(tmp_path)!r}); serve()"
    monkeypatch.setattr("sparse_tvm.tuning.remote.BOOT", BOOT.replace("serve()", there))
    monkeypatch.setattr("sparse_tvm.tuning.throttling._PAUSES", (0.01,))
    command = ["tune", model, "-o", str(tmp_path / "r.jsonl"), "--host", "board", "--threads", "1"]
    assert main([*command, "--python", sys.executable]) == 1
    told = capsys.readouterr().err
    assert "error: board is still slowed down after 0 s of waiting: " in told
    assert "firmware says undervoltage, throttled (0x5)" in told
    assert "stronger power supply" in told


@pytest.mark.usefixtures("ssh")
def test_a_library_that_does_not_load_costs_its_candidate(monkeypatch):
    monkeypatch.setattr(RemoteMeasurer, "_loads", lambda self, keys: [damaged(key) for key in keys])
    with RemoteMeasurer("board", sys.executable) as measurer:
        answer = measurer(job(OP, Layout("matmul", "csr")), W)
    assert "failure" in answer


def damaged(key):
    return {"load": key, "library": "", "weight": ""}


@pytest.mark.usefixtures("ssh")
def test_another_version_of_tvm_is_refused(monkeypatch):
    monkeypatch.setattr("sparse_tvm.tuning.remote.metadata.version", lambda name: "9.9")
    with (
        RemoteMeasurer("board", sys.executable) as measurer,
        pytest.raises(OptionError, match=r"board has TVM .*, which does not run what 9.9 builds"),
    ):
        measurer.machine()
