"""Running on the emulated GPU: tensors that stay there, streams, graphs, memory, threads."""

from __future__ import annotations

import sys
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from emulated_cudart import EmulatedCudart, EmulatedGraphs
from emulated_gpu import emulated_gpu

import sparse_tvm
from sparse_tvm import cuda_device
from sparse_tvm.cli import main
from sparse_tvm.devices import parse_device
from sparse_tvm.errors import DeviceError, InputError, OptionError
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.profiling import profile_model
from sparse_tvm.vm import runtime

TINY = BertConfig(layers=2, hidden=32, heads=2, intermediate=64, vocabulary=50, max_positions=16)
FEED = {
    "input_ids": np.arange(16).reshape(2, 8),
    "attention_mask": np.array([[1] * 8, [1] * 5 + [0] * 3]),
    "token_type_ids": np.zeros((2, 8), np.int64),
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A small BERT of one size, and of any."""
    directory = tmp_path_factory.mktemp("device")
    with pytest.MonkeyPatch.context() as patch, emulated_gpu(patch):
        for name, batch, sequence in (("fixed", 2, 8), ("open", "batch", "sequence")):
            model = build_bert(TINY, batch=batch, sequence=sequence)
            path = directory / f"{name}.so"
            sparse_tvm.compile(model, path, target="cuda-sm80", verify=False)
    return directory


@pytest.fixture
def cudart(gpu) -> EmulatedCudart:
    return cuda_device.cuda_runtime()


@pytest.fixture
def graphs(gpu) -> EmulatedGraphs:
    return runtime().get_global_func("tests.emulated_graphs")()


def on_device(array: np.ndarray):
    """A tensor on the emulated GPU, as PyTorch would have one."""
    return Foreign(cuda_device.Cuda(runtime()).constant(array))


class Foreign:
    """Another library's tensor: it notes which stream it was asked to be ready for."""

    def __init__(self, tensor) -> None:
        self.tensor, self.streams = tensor, []

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, *, stream=None, **options):
        self.streams.append(stream)
        return self.tensor.__dlpack__()


def to_host(tensor) -> np.ndarray:
    device = cuda_device.Cuda(runtime())
    with device.submitting():
        (array,) = device.copy_out([tensor], list)
    device.wait()
    return array


@pytest.mark.parametrize("name", ["fixed", "open"])
def test_tensors_stay_where_they_are(artifacts, cudart, name):
    with sparse_tvm.load(artifacts / f"{name}.so") as model:
        expected = model.run(FEED)["last_hidden_state"]
        feed = {key: on_device(array) for key, array in FEED.items()}
        cudart.log.clear()
        result = model.run(feed)["last_hidden_state"]
        assert not [entry for entry in cudart.log if entry[0] == "copy"]
        assert result.__dlpack_device__() == (2, 0)
        np.testing.assert_array_equal(to_host(result), expected)
        again = model.run({**feed, "input_ids": FEED["input_ids"]}, into=to_host)
        np.testing.assert_array_equal(again["last_hidden_state"], expected)


def test_where_outputs_go(artifacts, cudart):
    with sparse_tvm.load(artifacts / "fixed.so") as model:
        (expected,) = model.run(FEED).values()
        (kept,) = model.run(FEED, on_device=True).values()
        np.testing.assert_array_equal(to_host(kept), expected)
        feed = {key: on_device(array) for key, array in FEED.items()}
        (fetched,) = model.run(feed, on_device=False).values()
        np.testing.assert_array_equal(fetched, expected)


def test_streams(artifacts, cudart):
    class Stream:
        cuda_stream = 4242

    with sparse_tvm.load(artifacts / "fixed.so") as model:
        feed = {key: on_device(array) for key, array in FEED.items()}
        own = model._device._queue.stream
        for stream, handle in ((None, own), (Stream(), 4242), (77, 77), (0, 1)):
            cudart.log.clear()
            model.run(feed, stream=stream)
            assert all(tensor.streams[-1] == handle for tensor in feed.values())
            waited = [entry for entry in cudart.log if entry[0] == "synchronize"]
            assert waited == ([("synchronize", own)] if stream is None else [])
            order = [entry[0] for entry in cudart.log if entry[-1] == handle]
            if stream is None:
                assert order == ["synchronize"]
            else:  # after the last, wherever that was, and before the next
                assert order == ["wait", "record"]
        model.run(feed)
        assert cudart.log[-2][::2] == ("wait", own)
        cudart.log.clear()
        model.run(FEED, stream=77)
        assert cudart.log[-1] == ("synchronize", 77)
        with pytest.raises(OptionError, match="str is not a CUDA stream"):
            model.run(feed, stream="fast")


def test_what_is_refused(artifacts, gpu):
    with sparse_tvm.load(artifacts / "fixed.so") as model:
        feed = {key: on_device(array) for key, array in FEED.items()}
        for wrong, message in (
            (on_device(FEED["input_ids"].astype(np.int32)), "has dtype int32, expected int64"),
            (on_device(FEED["input_ids"][:1]), r"has shape \[1, 8\], expected \[2, 8\]"),
        ):
            with pytest.raises(InputError, match=f"'input_ids' {message}"):
                model.run({**feed, "input_ids": wrong})

        class Elsewhere(Foreign):
            def __dlpack_device__(self):
                return (2, 1)

        elsewhere = Elsewhere(feed["input_ids"].tensor)
        with pytest.raises(InputError, match="is on cuda:1, and the model on cuda:0"):
            model.run({**feed, "input_ids": elsewhere})

        class Learning(Foreign):
            def __dlpack__(self, **options):
                raise BufferError("tensors that require grad cannot be exported")

        with pytest.raises(InputError, match="'input_ids' cannot be read: tensors that require"):
            model.run({**feed, "input_ids": Learning(feed["input_ids"].tensor)})


def test_strided_and_misaligned_tensors(tmp_path, cudart):
    from onnx_models import build

    model = build("(float[4,6] x) => (float[4,6] y) { y = Relu(x) }")
    sparse_tvm.compile(model, tmp_path / "m.so", target="cuda-sm80", verify=False)
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)

    class Strided(Foreign):
        def __dlpack__(self, **options):
            return np.asfortranarray(x).__dlpack__()

    class Shifted(Foreign):
        def __dlpack__(self, **options):
            memory = np.zeros(24 + 32, np.float32)
            start = -memory.ctypes.data % 64 // 4 + 1
            shifted = memory[start : start + 24].reshape(4, 6)
            shifted[:] = x
            return shifted.__dlpack__()

    with sparse_tvm.load(tmp_path / "m.so") as loaded:
        tensor = on_device(x).tensor
        with pytest.raises(InputError, match=r"is not contiguous \(call .contiguous"):
            loaded.run(Strided(tensor))
        np.testing.assert_array_equal(to_host(loaded.run(Shifted(tensor))["y"]), np.maximum(x, 0))


def test_outputs_belong_to_the_caller(tmp_path, cudart):
    from onnx_models import build

    model = build(
        "(float[4] x) => (float[4] y, float[4] z, float[4] c)"
        " { y = Identity(x) z = Identity(x) c = Identity(w) }",
        w=np.ones(4, np.float32),
    )
    sparse_tvm.compile(model, tmp_path / "m.so", target="cuda-sm80", verify=False)
    with sparse_tvm.load(tmp_path / "m.so") as loaded:
        x = on_device(np.arange(4, dtype=np.float32))
        first, second = loaded.run(x), loaded.run(x)
        addresses = [t.data_ptr() for result in (first, second) for t in result.values()]
        assert len({*addresses, x.tensor.data_ptr()}) == 7
        assert [to_host(t).tolist() for t in first.values()] == [[0, 1, 2, 3]] * 2 + [[1] * 4]


def test_graphs(artifacts, graphs):
    with sparse_tvm.load(artifacts / "fixed.so") as model:
        assert model.graphs == "graphs"
        others = [{**FEED, "input_ids": FEED["input_ids"][::-1] + shift} for shift in range(3)]
        by_graph = [model.run(feed) for feed in others]
        assert graphs.replays >= 2
    replays = graphs.replays
    with sparse_tvm.load(artifacts / "fixed.so", graphs=False) as model:
        assert model.graphs == "not wanted"
        for feed, expected in zip(others, by_graph, strict=True):
            np.testing.assert_array_equal(
                *(next(iter(r.values())) for r in (model.run(feed), expected))
            )
    assert graphs.replays == replays
    with sparse_tvm.load(artifacts / "open.so") as model:
        assert "its sizes are open" in model.graphs


def test_a_capture_that_fails(artifacts, graphs):
    with sparse_tvm.load(artifacts / "fixed.so", graphs=False) as model:
        (expected,) = model.run(FEED).values()
    graphs.failures = 1
    with sparse_tvm.load(artifacts / "fixed.so") as model, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            np.testing.assert_array_equal(*model.run(FEED).values(), expected)
        assert model.graphs == "graphs"
    graphs.failures = 3
    with sparse_tvm.load(artifacts / "fixed.so") as model:
        model.run(FEED), model.run(FEED)
        with pytest.warns(RuntimeWarning, match="no CUDA graph: operation not permitted"):
            model.run(FEED)
        np.testing.assert_array_equal(*model.run(FEED).values(), expected)
        assert "operation not permitted" in model.graphs


def test_profile_sees_kernels(artifacts, gpu):
    with sparse_tvm.load(artifacts / "fixed.so") as model:
        kernels = profile_model(model, FEED, runs=2).kernels
    assert {k.layer for k in kernels} >= {"encoder.layer.1.output.dense"}


def test_devices(artifacts, gpu):
    assert [parse_device(name) for name in ("cpu", "cuda", "cuda:3")] == [
        ("cpu", 0),
        ("cuda", 0),
        ("cuda", 3),
    ]
    for name in ("gpu", "cuda:", "cuda:x", "cpu:1", "cuda:-1"):
        with pytest.raises(OptionError, match="there is no device"):
            parse_device(name)
    with pytest.raises(OptionError, match="was compiled for cuda, not for cpu"):
        sparse_tvm.load(artifacts / "fixed.so", device="cpu")
    with sparse_tvm.load(artifacts / "fixed.so", device="cuda:1") as model:
        assert model.device == "cuda:1"
        assert model.threads == 1
        (result,) = model.run(FEED, on_device=True).values()
        assert result.__dlpack_device__() == (2, 1)


def test_pinned_memory_is_reused_and_returned(artifacts, cudart):
    model = sparse_tvm.load(artifacts / "fixed.so")
    results = [model.run(FEED)["last_hidden_state"] for _ in range(3)]
    assert len({array.ctypes.data for array in results}) == 3
    blocks = len(cudart.pinned)
    del results
    for _ in range(10):
        last = model.run(FEED)["last_hidden_state"]
    assert len(cudart.pinned) == blocks
    copy = last.copy()
    model.close()
    assert len(cudart.pinned) == 1
    np.testing.assert_array_equal(last, copy)
    del last
    assert not cudart.pinned
    with pytest.raises(InputError, match="is closed"):
        model.run(FEED)
    model.close()


def test_memory_that_cannot_be_pinned(artifacts, cudart):
    with sparse_tvm.load(artifacts / "fixed.so") as model:
        expected = model.run(FEED)["last_hidden_state"].copy()
    cudart.most_pinned = 0
    with sparse_tvm.load(artifacts / "fixed.so") as model:
        np.testing.assert_array_equal(*model.run(FEED).values(), expected)
    assert not cudart.pinned


def test_threads(artifacts, gpu):
    feeds = [{**FEED, "input_ids": FEED["input_ids"] + shift} for shift in range(4)]
    with (
        sparse_tvm.load(artifacts / "fixed.so") as one,
        sparse_tvm.load(artifacts / "open.so") as other,
    ):
        expected = [one.run(feed)["last_hidden_state"] for feed in feeds]
        wrong: list[object] = []

        def work(number: int) -> None:
            for turn in range(8):
                chosen = (number + turn) % 4
                model = (one, other)[turn % 2]
                found = model.run(feeds[chosen])["last_hidden_state"]
                if not np.allclose(found, expected[chosen], atol=5e-3):
                    wrong.append((number, turn))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_an_error_of_the_device(artifacts, cudart, monkeypatch):
    with sparse_tvm.load(artifacts / "fixed.so") as model:

        def fail(stream: int) -> None:
            raise DeviceError("CUDA failed in cudaStreamSynchronize: an illegal memory access")

        monkeypatch.setattr(cudart, "synchronize", fail)
        with pytest.raises(DeviceError, match="illegal memory access"):
            model.run(FEED)


def test_a_stream_of_pytorch(artifacts, cudart, monkeypatch):
    """What PyTorch is still computing is waited for, once for all inputs."""

    class Tensor(Foreign):
        requires_grad = False

        def is_neg(self):
            return False

    current = SimpleNamespace(cuda_stream=55)
    torch = SimpleNamespace(
        Tensor=Tensor, cuda=SimpleNamespace(current_stream=lambda index: current)
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    with sparse_tvm.load(artifacts / "fixed.so") as model:
        feed = {key: Tensor(on_device(array).tensor) for key, array in FEED.items()}
        own = model._device._queue.stream
        for stream, handle in ((55, 55), (0, 1)):
            current.cuda_stream = stream
            cudart.log.clear()
            model.run(feed)
            recorded, waiting, _ = cudart.log
            assert recorded == ("record", waiting[1], handle)
            assert waiting == ("wait", recorded[1], own)
        cudart.log.clear()
        current.cuda_stream = 77
        model.run(feed, stream=77)
        assert [entry[0] for entry in cudart.log] == ["record", "wait", "record"]
        Tensor.requires_grad = True
        cudart.log.clear()
        model.run(feed)
        assert all(tensor.streams == [None, None, None, own] for tensor in feed.values())


def test_command_line(artifacts, gpu, capsys):
    path = str(artifacts / "fixed.so")
    assert main(["run", path, "--random", "--device", "cuda:1"]) == 0
    assert main(["run", path, "--random", "--device", "cpu"]) == 2
    assert "was compiled for cuda, not for cpu" in capsys.readouterr().err
    assert main(["bench", path, "--device", "cuda:1", "--warmup", "0", "--duration", "0.02"]) == 0
    assert "fixed.so, cuda:1, emulated GPU, 1 thread" in capsys.readouterr().out.replace("\n", "")
