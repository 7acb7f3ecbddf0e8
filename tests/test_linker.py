from __future__ import annotations

import ctypes
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparse_tvm import linker
from sparse_tvm.errors import BuildError
from sparse_tvm.targets import get_target

LINKERS = [name for name in ("gcc", "clang", "cc") if shutil.which(name)]
ZIG = find_spec("ziglang") is not None
EM_AARCH64 = 183  # of ELF


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return an object file that needs libm, made by TVM without any C compiler."""
    import tvm
    from tvm.script import tirx as T

    @T.prim_func
    def one(x: T.Buffer((1,), "float32"), y: T.Buffer((1,), "float32")):
        T.func_attr({"global_symbol": "one"})
        y[0] = T.exp(x[0])

    path = tmp_path_factory.mktemp("objects") / "one.o"
    module = tvm.compile(one, target=tvm.target.Target({"kind": "llvm", "mcpu": "x86-64"})).mod
    module.write_to_file(str(path))
    return [str(path)]


def assert_loads(library: Path) -> None:
    assert ctypes.CDLL(str(library)).__tvm_ffi_one
    sections = library.read_bytes()
    assert b".debug_info" not in sections


@pytest.mark.parametrize("name", LINKERS)
def test_links_with(
    name: str, objects: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", name)
    linker.Linker()(str(tmp_path / "one.so"), objects)
    assert_loads(tmp_path / "one.so")


def only_zig(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(linker.shutil, "which", lambda _: None)


@pytest.mark.skipif(not ZIG, reason="needs ziglang")
def test_links_with_zig_where_there_is_no_compiler(
    objects: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_zig(monkeypatch)
    linker.link(objects, tmp_path / "one.so", "x86_64-conda-linux-gnu")
    assert_loads(tmp_path / "one.so")


CROSS = {"aarch64-linux-gnu-gcc": shutil.which("aarch64-linux-gnu-gcc"), "ziglang": ZIG or None}


@pytest.mark.parametrize("name", [name for name, found in CROSS.items() if found])
def test_links_for_another_architecture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tvm
    from tvm.script import tirx as T

    @T.prim_func
    def one(x: T.Buffer((1,), "float32"), y: T.Buffer((1,), "float32")):
        T.func_attr({"global_symbol": "one"})
        y[0] = T.exp(x[0])

    target = get_target("cortex-a72")
    module = tvm.compile(one, target=tvm.target.Target(target.tvm_target())).mod
    module.write_to_file(str(tmp_path / "one.o"))
    if name == "ziglang":
        only_zig(monkeypatch)
    monkeypatch.delenv("CC", raising=False)
    linker.link([tmp_path / "one.o"], tmp_path / "one.so", target.triple)
    library = (tmp_path / "one.so").read_bytes()
    assert library[:4] == b"\x7fELF"
    assert int.from_bytes(library[18:20], "little") == EM_AARCH64
    assert b"__tvm_ffi_one" in library


def test_no_linker_for_another_architecture_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_zig(monkeypatch)
    monkeypatch.setattr(linker, "find_spec", lambda _: None)
    with pytest.raises(BuildError, match=r"for aarch64; tried aarch64-linux-gnu-gcc: not found;"):
        linker.link([], tmp_path / "one.so", "aarch64-unknown-linux-gnu")


def test_no_linker_names_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_zig(monkeypatch)
    monkeypatch.setattr(linker, "find_spec", lambda _: None)
    with pytest.raises(BuildError, match=r"gcc: not found; .*ziglang: not found.*pip install zig"):
        linker.link([], tmp_path / "one.so")


def test_a_broken_linker_is_passed_over(
    objects: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    broken = tmp_path / "bin" / "broken"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho cannot execute ld\nexit 1\n")
    broken.chmod(0o755)
    working = [*LINKERS, "none"][0]
    monkeypatch.setattr(linker, "_COMPILERS", (str(broken), working))
    if working == "none" and not ZIG:
        with pytest.raises(BuildError, match="cannot execute ld"):
            linker.link(objects, tmp_path / "one.so")
    else:
        linker.link(objects, tmp_path / "one.so")
        assert_loads(tmp_path / "one.so")


def test_cc_of_the_user_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(BuildError, match=r"\$CC \(no-such-compiler -m64\): not found"):
        linker.link([], tmp_path / "one.so")


def test_failure_shows_what_the_linker_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", f"{sys.executable} -c 'print(\"bad object\"); exit(1)'")
    with pytest.raises(BuildError, match="bad object"):
        linker.link([], tmp_path / "one.so")


def test_vendor_is_dropped_for_zig() -> None:
    assert linker._zig_target("x86_64-unknown-linux-gnu") == "x86_64-linux-gnu"
    assert linker._zig_target("x86_64-linux-gnu") == "x86_64-linux-gnu"
