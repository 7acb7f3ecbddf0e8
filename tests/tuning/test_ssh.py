"""Tuning over a real ssh: a server of OpenSSH's on the loopback address, if it is installed."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_tvm.cli import main
from sparse_tvm.tuning.provenance import here
from sparse_tvm.tuning.records import read_records

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin")
pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="apt-get install openssh-server"
)
SERVER = """
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
"""
CLIENT = """
Host board
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile {directory}/key
  IdentitiesOnly yes
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that takes one key, and an ``ssh`` that knows it as ``board``."""
    for name in ("host_key", "key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(command, check=True)
    values = {
        "port": free_port(),
        "directory": tmp_path,
        "user": getpass.getuser(),
    }
    (tmp_path / "sshd_config").write_text(SERVER.format(**values))
    (tmp_path / "ssh_config").write_text(CLIENT.format(**values))
    client = tmp_path / "bin" / "ssh"
    client.parent.mkdir()
    client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/ssh_config "$@"\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
    if Path("/run").is_dir():
        Path("/run/sshd").mkdir(exist_ok=True)  # where it gives up its rights, if it is root's
    process = subprocess.Popen(
        [str(SSHD), "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 10
    while not answers(values["port"]):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, "sshd does not listen"
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


def command(model, records, *more):
    return ["tune", model, "-o", str(records), "--host", "board", "--python", sys.executable, *more]


def test_kernels_are_measured_over_ssh(tmp_path, model, server):
    records = tmp_path / "records.jsonl"
    some = ["--tokens", "1,16", "--threads", "1", "--trials", "1"]
    assert main(command(model, records, *some)) == 0
    found = list(read_records([records], here().cpu))
    assert len(found) == 4  # two kernels, two numbers of tokens
    assert all(record.seconds for record in found)


def test_a_key_that_the_server_does_not_know(tmp_path, model, server, capsys):
    (tmp_path / "key.pub").write_text("")
    assert main(command(model, tmp_path / "records.jsonl")) == 2
    error = capsys.readouterr().err
    assert "board: the connection is lost: " in error
    assert "Permission denied (publickey" in error
