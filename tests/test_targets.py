"""Targets: names users know, what this machine can run, and what TVM makes of each."""

from __future__ import annotations

import json

import pytest
import tvm

from sparse_tvm import cpu, targets
from sparse_tvm.backends import backends
from sparse_tvm.cli import main
from sparse_tvm.errors import TargetError
from sparse_tvm.targets import ALIASES, TARGETS, get_target, runs_here


def test_names_and_aliases_are_unique():
    names = [*TARGETS, *(alias for target in TARGETS.values() for alias in target.aliases)]
    assert len(names) == len(set(names))
    assert "native" not in names


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("raspberry-pi-4", "cortex-a72"),
        ("raspberry-pi-5", "cortex-a76"),
        ("graviton2", "neoverse-n1"),
        ("graviton3", "neoverse-v1"),
        ("graviton4", "neoverse-v2"),
        ("haswell", "x86-64-v3"),
        ("znver3", "x86-64-v3"),
        ("skylake-avx512", "x86-64-v4"),
        ("icelake-server", "avx512-vnni"),
        ("znver4", "avx512-bf16"),
        ("znver5", "znver5"),
        ("sapphire-rapids", "sapphirerapids"),
        ("x86-64-v2", "x86-64-v2"),
    ],
)
def test_known_by_the_names_of_machines(alias, name):
    assert get_target(alias).name == name


def test_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(TargetError, match="unknown target 'pentium'") as refusal:
        get_target("pentium")
    assert "native, sapphirerapids" in refusal.value.hint


def test_low_precision_kernels_can_ask():
    assert get_target("sapphirerapids").has("amx-int8", "amx-bf16", "avx512fp16", "avx512vnni")
    assert get_target("znver4").has("avx512vnni", "avx512bf16")
    assert not get_target("znver4").has("amx-int8")
    assert get_target("alderlake").has("avxvnni")
    assert get_target("neoverse-n1").has("dotprod", "fullfp16")
    assert not get_target("neoverse-n1").has("dotprod", "i8mm")
    assert get_target("graviton3").has("i8mm", "bf16")
    assert not get_target("raspberry-pi-4").has("dotprod")


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_llvm_knows_every_name(target):
    made = tvm.target.Target(target.tvm_target())
    has = tvm.get_global_func("target.target_has_feature")
    unknown = [feature for feature in target.features if not has(feature, made)]
    assert not unknown


@pytest.mark.parametrize(
    ("machine", "features", "part", "expected"),
    [
        ("x86_64", "sapphirerapids", None, "sapphirerapids"),
        ("x86_64", "avx-vnni", None, "avx-vnni"),
        ("x86_64", "x86-64-v2", None, "x86-64-v2"),
        ("aarch64", "neoverse-v1", 0xD40, "neoverse-v1"),
        ("aarch64", "neoverse-v1", None, "neoverse-v2"),
        ("aarch64", "neoverse-n1", 0xD0B, "cortex-a76"),
        ("aarch64", "cortex-a72", 0xD03, "cortex-a72"),
        ("aarch64", "cortex-a72", 0xD40, "cortex-a72"),  # what it cannot do decides
    ],
)
def test_native_is_the_best_that_fits(monkeypatch, machine, features, part, expected):
    monkeypatch.setattr(targets, "architecture", lambda: machine)
    monkeypatch.setattr(targets, "host_features", lambda: frozenset(TARGETS[features].features))
    monkeypatch.setattr(targets, "cpu_part", lambda: part)
    assert get_target().name == expected


def test_native_refuses_a_machine_that_none_fits(monkeypatch):
    monkeypatch.setattr(targets, "architecture", lambda: "riscv64")
    with pytest.raises(TargetError, match=r"no target fits this machine's CPU \(riscv64\)"):
        get_target()


def test_arm_features_come_from_the_kernel(monkeypatch):
    words = {16: 1 << 1 | 1 << 20 | 1 << 10, 26: 1 << 13}

    class Libc:
        @staticmethod
        def getauxval(word):
            return words[word]

    monkeypatch.setattr(cpu, "architecture", lambda: "aarch64")
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: Libc)
    assert cpu.host_features() == {"neon", "dotprod", "fullfp16", "i8mm"}


def test_part_number_of_an_arm_cpu(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nCPU part\t: 0xd08\n")
    monkeypatch.setattr(cpu, "_CPUINFO", cpuinfo)
    assert cpu.cpu_part() == 0xD08
    assert cpu.cpu_model() == "Cortex-A72"
    cpuinfo.write_text("model name\t: an x86\n")
    assert cpu.cpu_part() is None


def test_targets_verb(capsys):
    assert main(["targets"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in TARGETS)
    assert main(["targets", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found["targets"]] == [
        target.name for backend in backends().values() for target in backend.targets
    ]
    assert {"sapphirerapids", "cuda-sm90"} <= {entry["name"] for entry in found["targets"]}
    here = {e["name"] for e in found["targets"] if e["runs_here"] and e["name"] in TARGETS}
    assert found["machine"]["native"] == get_target().name
    assert here == {target.name for target in TARGETS.values() if runs_here(target)}
    assert get_target().name in here


def test_every_alias_is_listed(capsys):
    assert main(["targets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["targets"]
    cpus = [entry for entry in listed if entry["name"] in TARGETS]
    assert {alias for entry in cpus for alias in entry["aliases"]} == set(ALIASES)
