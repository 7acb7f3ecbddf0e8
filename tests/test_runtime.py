from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import artifacts
import numpy as np
import pytest

from sparse_tvm import devices, runtime
from sparse_tvm.artifact import read_manifest, sections_of
from sparse_tvm.errors import ArtifactError, InputError, OptionError
from sparse_tvm.runtime import Model, load


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifacts.write(tmp_path_factory.mktemp("artifact") / "small.so")


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return load(path, threads=2)


def fresh_process(code: str, *arguments: object) -> str:
    """Run `code` in a new interpreter, which has not imported TVM's compiler as this one has."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_outputs_by_name_in_order(model: Model) -> None:
    inputs = artifacts.inputs()
    outputs = model.run(inputs)
    assert list(outputs) == ["y", "same_ids", "weight"]
    np.testing.assert_allclose(outputs["y"], artifacts.expected(inputs), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(outputs["same_ids"], inputs["ids"])


def test_describes_itself(model: Model) -> None:
    assert [str(spec) for spec in model.inputs] == ["x float32[8, 64]", "ids int64[8]"]
    assert model.outputs[0].name == "y"
    assert model.manifest["target"]["name"] == "x86-64-v3"
    assert "small.so" in repr(model)
    assert "2 threads" in repr(model)


@pytest.mark.parametrize(
    "run",
    [
        "sparse_tvm.load(path).run({'x': np.zeros((8, 64), 'f'), 'ids': np.zeros(8, 'int64')})",
        "assert main(['run', path, '--random']) == 0",
    ],
)
def test_a_fresh_process_maps_no_compiler(path: Path, run: str) -> None:
    code = f"""
import sys, numpy as np, sparse_tvm
from sparse_tvm.cli import main
path = sys.argv[1]
{run}
assert not {{"tvm", "torch", "onnx", "onnxruntime"}} & set(sys.modules)
print(open("/proc/self/maps").read())
"""
    maps = fresh_process(code, path)
    assert "libtvm_runtime.so" in maps
    assert "libtvm_compiler" not in maps


@pytest.mark.parametrize("order", ["import tvm\nmodel = load()", "model = load()\nimport tvm"])
def test_shares_the_libraries_of_tvm(path: Path, order: str) -> None:
    code = f"""
import sys, numpy as np, sparse_tvm
load = lambda: sparse_tvm.load(sys.argv[1])
{order}
model.run({{"x": np.zeros((8, 64), "float32"), "ids": np.zeros(8, "int64")}})
maps = {{line.split()[-1] for line in open("/proc/self/maps") if "/libtvm_runtime.so" in line}}
assert len(maps) == 1, maps
from tvm.script import tirx as T
assert tvm.runtime.tensor(np.ones(3)).numpy().sum() == 3
"""
    fresh_process(code, path)


@pytest.mark.parametrize("layout", ["misaligned", "strided", "fortran", "big_endian", "read_only"])
def test_arrays_of_any_layout(model: Model, layout: str) -> None:
    inputs = artifacts.inputs()
    x = inputs["x"]
    if layout == "misaligned":
        buffer = np.zeros(x.nbytes + 4 + 1, np.uint8)[1 : x.nbytes + 1]
        inputs["x"] = buffer.view(np.float32).reshape(x.shape)
        inputs["x"][:] = x
    elif layout == "strided":
        inputs["x"] = np.repeat(x, 3, axis=1)[:, ::3]
    elif layout == "fortran":
        inputs["x"] = np.asfortranarray(x)
    elif layout == "big_endian":
        inputs["x"] = x.astype(">f4")
    else:
        inputs["x"].flags.writeable = False
    np.testing.assert_allclose(
        model.run(inputs)["y"], artifacts.expected({"x": x}), rtol=1e-5, atol=1e-5
    )


def test_lists_take_the_dtype_of_the_input(model: Model) -> None:
    inputs = artifacts.inputs()
    outputs = model.run({"x": inputs["x"].tolist(), "ids": [True] * 8})
    np.testing.assert_array_equal(outputs["y"], model.run(inputs)["y"])
    np.testing.assert_array_equal(outputs["same_ids"], np.ones(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": None}, r"missing input 'ids' \(the model takes x float32\[8, 64\], ids int64"),
        ({"mask": [1]}, "unknown input 'mask'"),
        ({"ids": None, "idz": [1]}, "missing input 'ids' and unknown input 'idz'"),
        ({"x": np.zeros((8, 64))}, r"'x' has dtype float64, expected float32 .*astype\('float32'"),
        ({"ids": np.zeros(8, np.int32)}, "'ids' has dtype int32, expected int64"),
        ({"ids": [0.5] * 8}, "'ids' has dtype float64"),
        ({"ids": ["a"] * 8}, "'ids' has dtype <U1"),
        ({"x": np.zeros((8, 63), np.float32)}, r"'x' has shape \[8, 63\], expected \[8, 64\]"),
        ({"x": np.zeros(512, np.float32)}, r"'x' has shape \[512\], expected"),
        ({"x": [[1.0], [1.0, 2.0]]}, "'x' is not an array"),
    ],
)
def test_wrong_inputs(model: Model, change: dict, message: str) -> None:
    inputs = {**artifacts.inputs(), **change}
    model.run(artifacts.inputs())  # what was right a moment ago must not let others pass
    with pytest.raises(InputError, match=message):
        model.run({name: value for name, value in inputs.items() if value is not None})


@pytest.mark.parametrize("inputs", [np.zeros((8, 64), np.float32), [1.0], None, "x"])
def test_inputs_without_names(model: Model, inputs: object) -> None:
    with pytest.raises(InputError, match=r"small\.so: the inputs are .*takes x float32"):
        model.run(inputs)


class Foreign:
    """An array of a library that NumPy knows only through DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_inputs_in_order_and_by_dlpack(model: Model) -> None:
    values = artifacts.inputs()
    expected = artifacts.expected(values)
    np.testing.assert_allclose(model.run(values["x"], values["ids"])["y"], expected, atol=1e-5)
    foreign = {name: Foreign(array) for name, array in values.items()}
    np.testing.assert_allclose(model.run(foreign)["y"], expected, atol=1e-5)


@pytest.mark.parametrize("in_order", [False, True])
def test_a_repeated_run_computes_what_it_is_given(path: Path, in_order: bool) -> None:
    """From the third run of the same dtypes and shapes on nothing is checked or decided again."""
    model = load(path, threads=1)
    kept = []
    for seed in range(5):
        inputs = artifacts.inputs(seed)
        outputs = model.run(*inputs.values()) if in_order else model.run(inputs)
        kept.append((inputs, outputs))
        with pytest.raises(InputError, match="'x' has shape"):
            model.run({**inputs, "x": inputs["x"][:4]})
    strided = {**inputs, "x": np.repeat(inputs["x"], 2, axis=1)[:, ::2]}
    kept.append((inputs, model.run(strided)))
    for inputs, outputs in kept:
        np.testing.assert_allclose(outputs["y"], artifacts.expected(inputs), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(outputs["same_ids"], inputs["ids"])
    model.close()
    with pytest.raises(InputError, match="is closed"):
        model.run(inputs)


def test_weights_in_memory_of_their_own(path: Path) -> None:
    inputs = artifacts.inputs()
    with load(path, threads=1, huge_pages=True) as model:
        outputs = [model.run(inputs) for _ in range(3)]
    for each in outputs:
        np.testing.assert_allclose(each["y"], artifacts.expected(inputs), rtol=1e-5, atol=1e-5)


def test_outputs_go_into_another_library_without_a_copy(model: Model) -> None:
    kept: list[np.ndarray] = []

    def into(array: np.ndarray) -> Foreign:
        kept.append(array)
        return Foreign(array)

    outputs = model.run(artifacts.inputs(), into=into)
    assert all(
        np.shares_memory(outputs[s.name].array, a) for s, a in zip(model.outputs, kept, strict=True)
    )
    assert [type(value) for value in outputs.values()] == [Foreign] * 3


def test_a_model_is_closed_at_the_end_of_its_context(tmp_path: Path) -> None:
    with load(artifacts.write(tmp_path / "small.so")) as model:
        outputs = model.run(artifacts.inputs())
    np.testing.assert_allclose(outputs["y"], artifacts.expected(artifacts.inputs()), atol=1e-5)
    with pytest.raises(InputError, match=r"small\.so is closed"):
        model.run(artifacts.inputs())


@pytest.mark.parametrize("value", [object(), {"a": 1}, [2**70], [None], [[[]]], 1j, b"x"])
def test_values_that_are_no_numbers(model: Model, value: object) -> None:
    with pytest.raises(InputError, match="'ids'"):
        model.run({**artifacts.inputs(), "ids": value})


def test_symbolic_dimensions_must_agree(path: Path, tmp_path: Path) -> None:
    specs = artifacts.manifest()["inputs"]
    specs[0]["shape"][0] = specs[1]["shape"][0] = "batch"
    model = load(artifacts.write(tmp_path / "symbolic.so", inputs=specs))
    inputs = artifacts.inputs()
    np.testing.assert_array_equal(model.run(inputs)["same_ids"], inputs["ids"])
    with pytest.raises(InputError, match=r"'ids' has shape \[7\], .*where batch is 8"):
        model.run({**inputs, "ids": inputs["ids"][:7]})
    with pytest.raises(InputError, match=r"expected \[batch, 64\]"):
        model.run({**inputs, "x": inputs["x"][None]})


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"batch": [1, 7]}, "batch is 8, but must be 1 to 7"),
        ({"batch": [9, 16]}, "must be 9 to 16"),
    ],
)
def test_symbolic_dimensions_stay_in_bounds(
    tmp_path: Path, bounds: dict[str, list[int]], message: str
) -> None:
    specs = artifacts.manifest()["inputs"]
    specs[0]["shape"][0] = specs[1]["shape"][0] = "batch"
    model = load(artifacts.write(tmp_path / "bounded.so", inputs=specs, bounds=bounds))
    assert model.bounds == {"batch": tuple(bounds["batch"])}
    with pytest.raises(InputError, match=message):
        model.run(artifacts.inputs())
    empty = {name: array[:0] for name, array in artifacts.inputs().items()}
    with pytest.raises(InputError, match="batch is 0"):
        model.run(empty)


def aligned(array: np.ndarray) -> np.ndarray:
    """The same where the program reads it without a copy."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    there = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    there[:] = array
    return there


def test_large_aligned_inputs_are_read_in_place(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "COPIED_BYTES", 0)
    model = load(path)
    inputs = artifacts.inputs()
    expected = model.run(inputs)["y"]
    copies: list[np.ndarray] = []
    copy_in = devices.Cpu.copy_in

    def counted(self: devices.Cpu, array: np.ndarray, buffer: devices.Buffer) -> None:
        copies.append(array)
        copy_in(self, array, buffer)

    monkeypatch.setattr(devices.Cpu, "copy_in", counted)
    given = {name: aligned(array) for name, array in inputs.items()}
    before = {name: array.copy() for name, array in given.items()}
    outputs = model.run(given)
    assert [array.dtype for array in copies] == [np.int64]  # indices may not change once checked
    np.testing.assert_array_equal(outputs["y"], expected)
    for array in outputs.values():
        array[:] = 77
    for name, array in given.items():
        np.testing.assert_array_equal(array, before[name])
    np.testing.assert_array_equal(model.run(given)["y"], expected)


@pytest.mark.parametrize("copied_bytes", [0, 1 << 20])
def test_outputs_belong_to_the_caller(
    path: Path, monkeypatch: pytest.MonkeyPatch, copied_bytes: int
) -> None:
    monkeypatch.setattr(devices, "COPIED_BYTES", copied_bytes)
    model = load(path)
    runs = [(inputs := artifacts.inputs(seed), model.run(inputs)) for seed in range(20)]
    for inputs, outputs in runs:
        np.testing.assert_allclose(outputs["y"], artifacts.expected(inputs), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(outputs["same_ids"], inputs["ids"])
    weight = runs[0][1]["weight"].copy()
    for array in runs[0][1].values():
        array[:] = 77  # must reach neither the weights nor the next run
    again = model.run(runs[1][0])
    np.testing.assert_array_equal(again["weight"], weight)
    np.testing.assert_array_equal(again["y"], runs[1][1]["y"])
    kept = again["y"]
    del model, again, outputs, runs
    gc.collect()
    assert np.isfinite(kept.sum())


def test_many_threads_get_their_own_results(model: Model) -> None:
    def work(seed: int) -> bool:
        inputs = artifacts.inputs(seed)
        results = [model.run(inputs)["y"] for _ in range(20)]
        return all(np.allclose(y, artifacts.expected(inputs), atol=1e-4) for y in results)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def test_each_model_has_exactly_its_threads(path: Path) -> None:
    code = """
import gc, os, sys, time, numpy as np, sparse_tvm
from concurrent.futures import ThreadPoolExecutor
from sparse_tvm.vm import runtime

def wait_for_threads(count):
    gc.collect()
    deadline = time.monotonic() + 60
    while len(os.listdir("/proc/self/task")) != count:  # a joined thread is not gone at once
        assert time.monotonic() < deadline, (os.listdir("/proc/self/task"), count)

before = len(os.listdir("/proc/self/task"))
models = [sparse_tvm.load(sys.argv[1], threads=count) for count in (2, 1, 5, 2)]
pool_size = runtime().get_global_func("runtime.NumThreads")
sizes = lambda: [model._machine.call(pool_size) for model in models]
assert sizes() == [2, 1, 5, 2]
wait_for_threads(before + 2 + 5 + 2)  # one thread is the main thread
with ThreadPoolExecutor(1) as executor:
    assert executor.submit(sizes).result() == [2, 1, 5, 2]
wait_for_threads(before + 2 + 1 + 5 + 2)
inputs = {"x": np.ones((8, 64), "float32"), "ids": np.zeros(8, "int64")}
results = [model.run(inputs)["y"] for model in models]
assert all(np.array_equal(result, results[0]) for result in results)
models.clear()
wait_for_threads(before)
"""
    fresh_process(code, path)


def test_a_deleted_model_leaves_no_thread_behind(path: Path) -> None:
    code = """
import gc, os, sys, threading, time, numpy as np, sparse_tvm
inputs = {"x": np.ones((8, 64), "float32"), "ids": np.zeros(8, "int64")}

def run():
    sparse_tvm.load(sys.argv[1], threads=4).run(inputs)

def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
most = 0
for _ in range(20):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    deadline = time.monotonic() + 5
    while threads() - before > 1 and time.monotonic() < deadline:
        time.sleep(0.01)  # a busy machine takes its time
    most = max(most, threads() - before)
print(most)
"""
    # The thread that ran the model may still be on its way out; its three workers are not.
    assert int(fresh_process(code, path)) <= 1


FORK = """
import os, signal, sys, threading, time, numpy as np, sparse_tvm
inputs = {"x": np.ones((8, 64), "float32"), "ids": np.zeros(8, "int64")}
model = sparse_tvm.load(sys.argv[1], threads=THREADS)
PARENT
child = os.fork()
if not child:
    signal.alarm(30)
    CHILD
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"lock" in globals() and lock.release()
model.run(inputs)
"""


@pytest.mark.parametrize(
    ("threads", "parent", "child"),
    [
        (2, "", "model.run(inputs)"),
        (2, "", "sparse_tvm.load(sys.argv[1], threads=2).run(inputs)"),
        (1, "model.run(inputs)", "model.run(inputs)"),
        (2, "model.run(inputs)", "model.run(inputs)"),
        # Workers that sleep, which a forked process that ends must not wait for.
        (2, "model.run(inputs); time.sleep(0.3)",
         "sparse_tvm.load(sys.argv[1], threads=2).run(inputs)"),
        (2, "t = threading.Thread(target=model.run, args=(inputs,)); t.start(); t.join()",
         "model.run(inputs)"),
        (2, "lock = model._machine._running; lock.acquire()", "model.run(inputs)"),
    ],
)  # fmt: skip
def test_a_forked_process_runs_models(path: Path, threads: int, parent: str, child: str) -> None:
    code = FORK.replace("THREADS", str(threads)).replace("PARENT", parent).replace("CHILD", child)
    fresh_process(code, path)


@pytest.mark.parametrize(("says", "threads"), [("", 2), ("vm.never_forks()", 1)])
def test_a_process_that_never_forks_makes_calls_where_they_are(
    path: Path, says: str, threads: int
) -> None:
    code = f"""
import sys, threading, numpy as np, sparse_tvm
from sparse_tvm import vm
{says}
model = sparse_tvm.load(sys.argv[1], threads=2)
model.run({{"x": np.ones((8, 64), "float32"), "ids": np.zeros(8, "int64")}})
assert threading.active_count() == {threads}, threading.enumerate()
"""
    fresh_process(code, path)


def test_default_threads(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "usable_cores", lambda: 3)
    assert load(path).threads == 3
    assert load(artifacts.write(tmp_path / "four.so", threads=4)).threads == 4
    with pytest.raises(OptionError, match="at least 1, not 0"):
        load(path, threads=0)


def test_workers_sleep_soon_and_are_not_pinned(path: Path) -> None:
    code = """
import os, sys, time, numpy as np, sparse_tvm
model = sparse_tvm.load(sys.argv[1], threads=2)
inputs = {"x": np.zeros((8, 64), "float32"), "ids": np.zeros(8, "int64")}
model.run(inputs)
start = time.process_time()
model.run(inputs)
time.sleep(0.3)
assert time.process_time() - start < 0.05
assert len({tuple(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}) == 1
"""
    fresh_process(code, path)


def test_recompiled_file_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    inputs = artifacts.inputs()
    first = load(artifacts.write(path, seed=1))
    second = load(artifacts.write(path, seed=2))
    assert first._machine._library is not second._machine._library
    assert load(path)._machine._library is second._machine._library
    for model, seed in ((first, 1), (second, 2)):
        expected = artifacts.expected(inputs, seed)
        np.testing.assert_allclose(model.run(inputs)["y"], expected, rtol=1e-5, atol=1e-5)


def test_models_go_away(tmp_path: Path) -> None:
    path = artifacts.write(tmp_path / "goes_away.so")
    model = load(path)
    model.run(artifacts.inputs())
    assert "goes_away.so" in Path("/proc/self/maps").read_text()
    del model
    gc.collect()
    assert "goes_away.so" not in Path("/proc/self/maps").read_text()


def test_interrupted_run_does_not_harm_the_next(model: Model) -> None:
    blocked, release = threading.Event(), threading.Event()

    def block() -> None:
        blocked.set()
        release.wait(60)

    blocker = threading.Thread(target=model._machine.call, args=(block,))
    blocker.start()
    assert blocked.wait(60)
    inputs = artifacts.inputs()
    main_thread = threading.get_ident()
    # A background job inherits that SIGINT is ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.1, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            model.run(artifacts.inputs(seed=2))
    finally:
        signal.signal(signal.SIGINT, previous)
        release.set()
        blocker.join()
    np.testing.assert_allclose(
        model.run(inputs)["y"], artifacts.expected(inputs), rtol=1e-5, atol=1e-5
    )


def test_error_in_the_machine_reaches_the_caller(model: Model) -> None:
    with pytest.raises(ZeroDivisionError):
        model._machine.call(divmod, 1, 0)
    model.run(artifacts.inputs())


def test_trace_names_every_kernel(model: Model) -> None:
    traces = model.trace(artifacts.inputs(), runs=3)
    assert len(traces) == 3
    for calls in traces:
        names = [call.function for call in calls]
        assert names.index("matmul") < names.index("epilogue")
        assert all(call.seconds > 0 for call in calls)
        output = calls[names.index("matmul")].shapes[-1]
        assert output == (artifacts.TOKENS, artifacts.FEATURES)


def target(**changes: object) -> dict:
    return {**artifacts.manifest()["target"], **changes}


def test_missing_cpu_features_are_named(tmp_path: Path) -> None:
    path = artifacts.write(
        tmp_path / "new.so", target=target(name="future", features=["avx2", "avx9000", "amx-x"])
    )
    with pytest.raises(ArtifactError, match=r"future and needs .* amx-x, avx9000 .*--target"):
        load(path)


def test_other_architecture(tmp_path: Path) -> None:
    path = artifacts.write(tmp_path / "arm.so", target=target(triple="sparc-linux-gnu"))
    with pytest.raises(ArtifactError, match="compiled for sparc; this machine is"):
        load(path)


def test_truncated_file(path: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.so"
    truncated.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match=r"truncated\.so has no sparse-tvm footer"):
        load(truncated)


def damage(path: Path, part: str) -> None:
    """Flip a bit in the middle of the code, or of a weight."""
    section = next(s for s in sections_of(read_manifest(path)) if s.name == part)
    data = bytearray(path.read_bytes())
    data[(section.start + section.end) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_code_is_never_run(tmp_path: Path) -> None:
    path = artifacts.write(tmp_path / "flipped.so")
    damage(path, "the code")
    with pytest.raises(ArtifactError, match=r"flipped\.so is damaged: the code has another"):
        load(path)


def test_damaged_weights_are_found_on_demand(tmp_path: Path) -> None:
    path = artifacts.write(tmp_path / "flipped.so")
    damage(path, "'w'")
    load(path)
    with pytest.raises(ArtifactError, match=r"flipped\.so is damaged: 'w' has another"):
        load(path, verify=True)


def test_damaged_indices_are_always_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = artifacts.weights()
    indices = {"indices": np.arange(100, dtype=np.uint16)}
    monkeypatch.setattr(artifacts, "weights", lambda seed: real | indices)
    path = artifacts.write(tmp_path / "flipped.so")
    damage(path, "'indices'")
    with pytest.raises(ArtifactError, match="'indices' has another checksum"):
        load(path)


@pytest.mark.parametrize("missing", ["typing_extensions", "tvm_ffi"])
def test_a_missing_package_is_named(path: Path, missing: str) -> None:
    code = f"""
import sys, sparse_tvm
from sparse_tvm.errors import ArtifactError
sys.modules[{missing!r}] = None
try:
    sparse_tvm.load(sys.argv[1])
except ArtifactError as error:
    print(error)
"""
    message = fresh_process(code, path)
    assert missing in message
    assert "pip install apache-tvm" in message


def test_code_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "library", lambda: b"\x7fELF nonsense")
    path = artifacts.write(tmp_path / "broken.so")
    with pytest.raises(ArtifactError, match=r"cannot load the code of .*compiled with TVM 0\.27"):
        load(path)
