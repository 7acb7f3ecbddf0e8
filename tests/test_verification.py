"""What is compared, how often, and what is said where nothing could be."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser

import sparse_tvm
from sparse_tvm import emulation, verification
from sparse_tvm.cli import main
from sparse_tvm.cpu import architecture
from sparse_tvm.emulation import EmulatedCrash, Emulator
from sparse_tvm.errors import VerificationError
from sparse_tvm.reference import Reference
from sparse_tvm.report.content import verification_title


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) { y = Relu(x)  z = Exp(x) }"""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(parser.parse_model(text), path)
    return path


def relu_and_exp(emulator, artifact, inputs):
    return [{"y": np.maximum(i["x"], 0), "z": np.exp(i["x"])} for i in inputs]


if architecture() == "aarch64":
    pytest.skip("nothing is emulated here", allow_module_level=True)


def for_arm(model, tmp_path):
    return sparse_tvm.compile(model, tmp_path / "model.so", target="cortex-a72").manifest


def test_the_reference_runs_once_per_size(model, tmp_path, monkeypatch):
    runs = []
    run = Reference.run
    monkeypatch.setattr(
        Reference, "run", lambda self, *args: runs.append(args[0]["x"].shape) or run(self, *args)
    )
    manifest = sparse_tvm.compile(model, tmp_path / "model.so").manifest
    assert runs == [(1, 4), (3, 4)]
    assert set(manifest["verification"]["max_abs_diff"]) == {"y", "z"}
    assert manifest["unverified"] is None
    assert "emulated" not in manifest["verification"]


def test_no_verify_is_said(model, tmp_path):
    manifest = sparse_tvm.compile(model, tmp_path / "model.so", verify=False).manifest
    assert verification_title(manifest) == "Not verified (compiled with --no-verify)"


@pytest.mark.parametrize(
    ("qemu", "reason"),
    [
        ("no-such-qemu", "has no no-such-qemu"),
        ("sh", "there is no Python for aarch64 in "),
    ],
)
def test_without_an_emulator_it_says_not_verified(
    model, tmp_path, monkeypatch, capsys, qemu, reason
):
    monkeypatch.setattr(emulation, "_EMULATORS", (qemu,))
    monkeypatch.setenv(emulation.PLACE_VARIABLE, str(tmp_path / "nothing"))
    assert main(["compile", str(model), "-o", str(tmp_path / "m.so"), "--target", "armv8-a"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Not verified (aarch64 code cannot run here: " in said
    assert reason in said


def test_an_emulator_verifies_another_architecture(model, tmp_path, monkeypatch):
    fake = Emulator("qemu", "cortex-a72", tmp_path)
    monkeypatch.setattr(Emulator, "of", lambda target: fake)
    monkeypatch.setattr(Emulator, "run", relu_and_exp)
    manifest = for_arm(model, tmp_path)
    assert manifest["verification"]["emulated"] == "qemu, cortex-a72"
    assert verification_title(manifest).endswith(", in an emulator (qemu, cortex-a72)")


def test_a_wrong_result_in_the_emulator_is_refused(model, tmp_path, monkeypatch):
    def wrong(emulator, artifact, inputs):
        return [{"y": i["x"] + 1, "z": i["x"]} for i in inputs]

    monkeypatch.setattr(Emulator, "of", lambda target: Emulator("qemu", "max", tmp_path))
    monkeypatch.setattr(Emulator, "run", wrong)
    with pytest.raises(VerificationError, match="output y differs from ONNX Runtime's by up to"):
        for_arm(model, tmp_path)
    assert not (tmp_path / "model.so").exists()


def test_a_crash_in_the_emulator_is_refused(model, tmp_path, monkeypatch):
    def crash(emulator, artifact, inputs):
        raise EmulatedCrash("Illegal instruction")

    monkeypatch.setattr(Emulator, "of", lambda target: Emulator("qemu", "max", tmp_path))
    monkeypatch.setattr(Emulator, "run", crash)
    with pytest.raises(VerificationError, match="emulator of cortex-a72: Illegal instruction"):
        for_arm(model, tmp_path)


def test_a_cpu_without_the_features_cannot_verify(model, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "host_features", lambda: frozenset())
    manifest = sparse_tvm.compile(model, tmp_path / "model.so").manifest
    assert manifest["verification"] is None
    assert manifest["unverified"].startswith("this machine's CPU lacks ")
