"""Tuning: what is measured, in which order, and what survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
from pretended import Pretender, job, layer_of, sparse_weight

from sparse_tvm import compile
from sparse_tvm.cli import main
from sparse_tvm.errors import OptionError
from sparse_tvm.operators import Bias, Convolution, Layout, from_json, to_json
from sparse_tvm.targets import get_target
from sparse_tvm.tuning.job import this_machine
from sparse_tvm.tuning.measuring import Measurer
from sparse_tvm.tuning.records import read_records
from sparse_tvm.tuning.tuner import tune

CRASHING_WORKER = """
import os, time
from dataclasses import dataclass
from sparse_tvm.backends import get_backend
from sparse_tvm.schedules.cpu.families.matmul import MatmulFamily
from sparse_tvm.tuning.worker import serve

class Crashing(MatmulFamily):
    name = "crashing"

    def build(self, op, operands, output, target):
        if op.stored.format == "abort":
            print("no such instruction", file=__import__("sys").stderr, flush=True)
            os.abort()
        if op.stored.format == "raise":
            raise ValueError("too many registers")
        time.sleep(1000)

    def pack(self, op, w, layout, target):
        return {"data": w}

get_backend("cpu").add(Crashing())
serve()
"""


W = sparse_weight()
OP = layer_of(W)


def test_a_candidate_that_takes_the_process_with_it_costs_itself_only(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(CRASHING_WORKER)
    csr = Layout("matmul", "csr")
    with Measurer([sys.executable, str(script)]) as measurer:
        died = measurer(job(OP, Layout("crashing", "abort")), W)
        refused = measurer(job(OP, Layout("crashing", "raise")), W)
        fine = measurer(job(OP, csr), W)
    assert died == {"failure": "killed by SIGABRT: no such instruction"}
    assert refused == {"failure": "ValueError: too many registers"}
    assert [(r["tokens"], r["threads"]) for r in fine["results"]] == [(1, 1), (20, 1)]
    assert all(0 < r["seconds"] < 1 for r in fine["results"])


def test_a_candidate_takes_turns_with_the_one_it_is_held_against():
    csr, dense = Layout("matmul", "csr"), Layout("matmul", "dense", (6, 1))
    w = sparse_weight(512, 512, 0.99)
    op = layer_of(w)
    beside = to_json(replace(op, layer="", layout=dense))
    against = {**job(op, csr, tokens=(128,)), "beside": beside}
    with Measurer() as measurer:
        (alone,) = measurer(job(op, csr, tokens=(128,)), w)["results"]
        (result,) = measurer(against, w)["results"]
    assert "relative" not in alone
    assert 0 < result["relative"] < 0.5  # a hundredth of the products


def test_a_candidate_that_hangs_costs_its_time_only(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(CRASHING_WORKER)
    with Measurer([sys.executable, str(script)], limit=2) as measurer:
        hung = measurer(job(OP, Layout("crashing", "hang")), W)
        assert hung == {"failure": "took longer than 2 s"}


def test_a_worker_that_never_starts():
    with Measurer([sys.executable, "-c", "raise SystemExit('no TVM here')"]) as measurer:
        assert measurer(job(OP, Layout("matmul", "csr")), W) == {
            "failure": "ended with code 1: no TVM here"
        }


CONVOLUTION = Convolution(
    layer="conv",
    matrix=(16, 72),
    epilogue=(Bias(),),
    channels=8,
    out_channels=16,
    size=(9, 9),
    kernel=(3, 3),
    stride=(1, 1),
    dilation=(1, 1),
    pads=(1, 1, 1, 1),
)


def test_kernels_of_images_and_of_fixed_shapes_are_measured():
    layout = Layout("convolution", "csr").having(vectors=2)
    with Measurer() as measurer:
        image = measurer(job(CONVOLUTION, layout, tokens=(81,)), sparse_weight(16, 72))
        fixed = measurer(job(OP, Layout("matmul", "csr"), (2, 5), (10,)), W)
    assert "results" in image, image
    assert image["title"].startswith("conv2d_csr")
    assert "results" in fixed, fixed


def by_format(layout):
    """Of dense the wide block is faster, of sparse what is stored in blocks of 2."""
    return {"dense": 5e-6, "csr": 3e-6, "bsr": 1e-6 * layout.block[0]}[layout.format]


def layouts(jobs):
    return [from_json(one["operator"], one["call"]).stored for one in jobs]


def test_the_best_is_found_and_decides(tmp_path, model):
    records, pretender = tmp_path / "records.jsonl", Pretender(by_format)
    tuned = tune(model, records, trials=64, threads=[1], measurer=pretender)
    sparse, dense = tuned.kernels
    assert (sparse.best.format, sparse.best.block) == ("bsr", (2, 1))
    assert not any(layout.sparse for layout in dense.predicted)  # it has no zeros
    assert sparse.gain() == pytest.approx(by_format(sparse.untuned) / 2e-6)
    asked = layouts(pretender.jobs)
    assert asked[0] == sparse.untuned
    assert {layout.sparse for layout in asked[:3]} == {True, False}
    finals = [one for one in pretender.jobs if one["seconds"] > pretender.jobs[0]["seconds"]]
    assert len(pretender.jobs) == sparse.tried + dense.tried + len(finals)
    first, second = compile(model, tmp_path / "m.so", records=[records]).manifest["layers"]
    assert (first["block"], first["basis"], second["basis"]) == ([2, 1], "measured", "measured")


class Drifting(Pretender):
    """A machine whose clock slows down from one candidate to the next."""

    def __call__(self, job, matrix):
        answer = super().__call__(job, matrix)
        for result in answer["results"]:
            result["seconds"] *= 1.02 ** len(self.jobs)
            if job["beside"] is not None:
                beside = from_json(job["operator"], job["beside"]).stored
                (layout,) = layouts([job])
                result["relative"] = self._seconds(layout) / self._seconds(beside)
        return answer


def test_candidates_are_compared_in_one_state_of_the_clock(tmp_path, model):
    pretender, records = Drifting(by_format), tmp_path / "records.jsonl"
    tuned = tune(model, records, trials=64, threads=[1], tokens=[8], measurer=pretender)
    sparse = tuned.kernels[0]
    assert sparse.best.block == (2, 1)
    scale = {
        record.seconds / by_format(record.layout)
        for record in read_records([records])
        if record.problem == sparse.layer.problem
    }
    assert max(scale) == pytest.approx(min(scale))
    firsts = {tuple(one["call"]["matrix"]): one for one in reversed(pretender.jobs)}
    assert all(one["beside"] is None for one in firsts.values())
    assert sum(one["beside"] is None for one in pretender.jobs) == len(tuned.kernels)


def test_the_best_are_measured_once_more_and_longer(tmp_path, model):
    pretender = Pretender(lambda layout: 1e-6)
    tuned = tune(
        model, tmp_path / "r.jsonl", trials=6, threads=[1], layers="w0", measurer=pretender
    )
    longest = max(one["seconds"] for one in pretender.jobs)
    assert [one["seconds"] == longest for one in pretender.jobs] == 6 * [False] + 3 * [True]
    assert tuned.kernels[0].untuned not in layouts(pretender.jobs[6:])


class Flattering(Pretender):
    """A short look makes all but the first candidate seem twice as fast as they are."""

    def __call__(self, job, matrix):
        answer = super().__call__(job, matrix)
        if job["beside"] is not None and job["seconds"] == self.jobs[0]["seconds"]:
            for result in answer["results"]:
                result["seconds"] /= 2
        return answer


def test_what_is_best_after_the_best_were_confirmed_is_confirmed_too(tmp_path, model):
    pretender = Flattering(lambda layout: 1e-6 if layout.block == (4, 1) else 1.05e-6)
    tuned = tune(
        model, tmp_path / "r.jsonl", trials=64, threads=[1], layers="w0", measurer=pretender
    )
    (kernel,) = tuned.kernels
    assert kernel.best.block == (4, 1)
    longest = max(one["seconds"] for one in pretender.jobs)
    confirmed = layouts([one for one in pretender.jobs if one["seconds"] == longest])
    assert len(confirmed) == len(set(confirmed)) > 3
    assert set(confirmed) == kernel.measured.keys() - {kernel.untuned}


def test_an_exhaustive_search_leaves_no_candidate_alone(tmp_path, model):
    records = tmp_path / "records.jsonl"
    tuned = tune(model, records, trials=64, threads=[1], measurer=Pretender(by_format))
    assert any(kernel.tried < len(kernel.predicted) for kernel in tuned.kernels)
    everything = tune(
        model, records, trials=1000, threads=[1], measurer=Pretender(by_format), exhaustive=True
    )
    for few, all_of_them in zip(tuned.kernels, everything.kernels, strict=True):
        assert all_of_them.tried == len(all_of_them.predicted)
        assert all_of_them.slower(few.best) == pytest.approx(1.0)


def test_what_was_measured_is_not_measured_again(tmp_path, model):
    records = tmp_path / "records.jsonl"
    first, second = Pretender(by_format), Pretender(by_format)
    tune(model, records, trials=2, threads=[1], measurer=first)
    written = records.read_bytes()
    tune(model, records, trials=2, threads=[1], measurer=second)
    assert len(first.jobs) > 0
    assert second.jobs == []
    assert records.read_bytes() == written
    tune(model, records, trials=4, threads=[1], measurer=second)
    assert not {*layouts(first.jobs)} >= {*layouts(second.jobs)}


def test_an_interrupt_keeps_what_is_measured(tmp_path, model):
    records, left = tmp_path / "records.jsonl", [3]

    def seconds(layout):
        left[0] -= 1 / 6  # one for each number of tokens
        if left[0] < -1e-9:
            raise KeyboardInterrupt
        return by_format(layout)

    with pytest.raises(KeyboardInterrupt):
        tune(model, records, threads=[1], measurer=Pretender(seconds))
    assert len(read_records([records])) == 3 * 6
    again = Pretender(by_format)
    tune(model, records, threads=[1], measurer=again)
    everything = Pretender(by_format)
    tune(model, tmp_path / "other.jsonl", threads=[1], measurer=everything)
    assert len(again.jobs) == len(everything.jobs) - 3


def test_a_failure_is_kept_and_not_tried_again(tmp_path, model):
    class Failing(Pretender):
        def __call__(self, job, matrix):
            answer = super().__call__(job, matrix)
            (layout,) = layouts([job])
            return {"failure": "killed by SIGILL"} if layout.format == "csr" else answer

    records = tmp_path / "records.jsonl"
    tuned = tune(model, records, trials=64, threads=[1], measurer=Failing(by_format))
    assert {layout.format for layout in tuned.kernels[0].failed} == {"csr"}
    again = Pretender(by_format)
    tune(model, records, trials=64, threads=[1], measurer=again)
    assert not any(layout.format == "csr" for layout in layouts(again.jobs))


@pytest.mark.parametrize(("noise", "doubts"), [(0.02, 0), (0.5, 1)])
def test_noise_is_told(tmp_path, model, noise, doubts):
    pretender = Pretender(by_format, noise)
    tuned = tune(model, tmp_path / "r.jsonl", trials=1, threads=[1], measurer=pretender)
    assert len(tuned.remarks) == doubts
    assert all("varied by more than 50%" in remark for remark in tuned.remarks)


def test_time_ends_it(tmp_path, model):
    pretender = Pretender(by_format)
    tune(model, tmp_path / "records.jsonl", seconds=1e-9, measurer=pretender)
    assert pretender.jobs == []


def test_layers_tokens_and_threads_are_chosen(tmp_path, model):
    pretender = Pretender(by_format)
    options = {"layers": "w1", "tokens": [3, 7], "threads": [1], "trials": 1}
    (kernel,) = tune(model, tmp_path / "r.jsonl", measurer=pretender, **options).kernels
    assert kernel.layer.layers == ["w1"]
    assert {(tuple(j["tokens"]), tuple(j["threads"])) for j in pretender.jobs} == {((3, 7), (1,))}
    fixed = {"layers": "w1", "threads": [1], "trials": 1, "input_shapes": {"x": (5, 64)}}
    pretender = Pretender(by_format)
    tune(model, tmp_path / "r.jsonl", measurer=pretender, **fixed)
    assert {tuple(j["tokens"]) for j in pretender.jobs} == {(5,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "nowhere"}, "nothing to tune that matches 'nowhere'"),
        ({"layers": "("}, "bad regular expression"),
        ({"threads": [0]}, "threads must be at least 1, not 0"),
        ({"threads": [4096]}, "4096 threads on"),
        ({"tokens": [0]}, "tokens must be at least 1, not 0"),
        ({"trials": 0}, "trials must be at least 1, not 0"),
        ({"target": "cortex-a72"}, "target cortex-a72 does not run on"),
    ],
)
def test_options_that_make_no_sense(tmp_path, model, options, message):
    if options.get("target") == get_target().name:
        pytest.skip("it does run here")
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        tune(model, tmp_path / "records.jsonl", measurer=Pretender(by_format), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time", "soon"], "--time 'soon' is no length of time"),
        (["--tokens", "1,x"], "--tokens '1,x' is no list of numbers"),
        (["--target", "z80"], "unknown target 'z80'"),
        (["-o", "nowhere/records.jsonl"], "cannot write nowhere/records.jsonl"),
    ],
)
def test_arguments_that_make_no_sense(model, capsys, arguments, message):
    assert main(["tune", model, *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


# Where tests run in a shell's background, what they start ignores SIGINT. It is told to obey in
# the process itself: `preexec_fn` copies this one's memory, for which there may be no room.
OBEYING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from sparse_tvm.cli import main
sys.exit(main())
"""


def test_command_line_tunes_is_interrupted_and_goes_on(tmp_path, model):
    records = tmp_path / "records.jsonl"
    command = [sys.executable, "-c", OBEYING, "tune", model, "-o", str(records)]
    command += ["--threads", "1", "--tokens", "1,16"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    first = next(line for line in process.stderr if " s  note: " not in line)
    os.kill(process.pid, signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130
    assert "dense 96x64 bias relu (90% unstructured)" in first
    assert "interrupted: " in rest
    kept = len(records.read_text().splitlines())
    assert kept >= 2
    done = subprocess.run([*command, "--trials", "2"], capture_output=True, text=True, check=True)
    assert "dense 32x96 bias (no zeros)" in done.stdout
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert len(lines) > kept
    assert all(line["seconds"] > 0 for line in lines)


class Elsewhere(Pretender):
    """A machine with another CPU than this one."""

    def machine(self):
        return {**this_machine(), "cpu": "Cortex-A72", **self.differs}

    differs: ClassVar[dict[str, object]] = {"architecture": "aarch64", "features": ["neon"]}


def test_the_target_is_that_of_the_machine_that_measures(tmp_path, model):
    pretender, records = Elsewhere(by_format), tmp_path / "r.jsonl"
    tune(model, records, trials=1, threads=[1], measurer=pretender)
    assert {one["target"] for one in pretender.jobs} == {"cortex-a72"}
    assert {one.provenance.cpu for one in read_records([records])} == {"Cortex-A72"}
    with pytest.raises(OptionError, match="x86-64-v3 does not run on Cortex-A72"):
        tune(model, records, target="x86-64-v3", measurer=pretender)
