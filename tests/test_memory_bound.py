"""Buffers that TVM's allocator keeps for shapes seen once are given back."""

from functools import partial

import pytest

from sparse_tvm import vm


@pytest.fixture
def clears(monkeypatch):
    calls = []

    class Runtime:
        def get_global_func(self, name):
            assert name == "vm.builtin.memory_manager.clear"
            return lambda: calls.append(name)

    monkeypatch.setattr(vm, "runtime", Runtime)
    return calls


def test_a_few_shapes_are_kept(clears):
    bound = vm.MemoryBound()
    for _ in range(10):
        for rows in (1, 2, 3):
            bound.before_run(((rows, 128),), partial(int, rows * 128))
    assert clears == []


def test_many_shapes_are_not(clears):
    bound = vm.MemoryBound()
    for rows in range(100, 200):
        bound.before_run(((rows,),), partial(int, rows))
    assert 20 <= len(clears) <= 60


def test_small_shapes_never_clear_what_a_large_one_needs(clears):
    bound = vm.MemoryBound()
    bound.before_run(((1000,),), partial(int, 1000))
    for rows in range(1, 40):
        bound.before_run(((rows,),), partial(int, rows))
    assert clears == []
