"""The knapsack against all combinations."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tvm.planning.knapsack import Knapsack, Option

OPTIONS = st.lists(
    st.builds(Option, st.integers(0, 12), st.integers(0, 50).map(float)), min_size=1, max_size=4
)
ITEMS = st.lists(OPTIONS, min_size=1, max_size=4)


def least_error(items: list[list[Option]], budget: float) -> float | None:
    """By trying every combination."""
    errors = [
        sum(option.error for option in chosen)
        for chosen in product(*items)
        if sum(option.cost for option in chosen) <= budget
    ]
    return min(errors, default=None)


@settings(deadline=None)
@given(items=ITEMS, budget=st.integers(0, 50))
def test_it_finds_the_least_error_of_all_combinations(
    items: list[list[Option]], budget: int
) -> None:
    chosen = Knapsack(items, 50, buckets=50).best(budget)
    expected = least_error(items, budget)
    if chosen is None:
        assert expected is None
        return
    options = [found[index] for found, index in zip(items, chosen, strict=True)]
    assert sum(option.cost for option in options) <= budget
    assert sum(option.error for option in options) == expected


@settings(deadline=None)
@given(items=ITEMS)
def test_the_frontier_is_the_least_error_of_each_budget(items: list[list[Option]]) -> None:
    frontier = Knapsack(items, 50, buckets=50).frontier()
    costs, errors = zip(*frontier, strict=True)
    assert sorted(costs) == list(costs)
    assert sorted(errors, reverse=True) == list(errors)
    for cost, error in frontier:
        assert error == least_error(items, cost)
    assert least_error(items, costs[0] - 1) is None
    assert errors[-1] == sum(min(option.error for option in options) for options in items)


FRACTIONS = st.lists(st.builds(Option, st.floats(0, 0.5), st.floats(0, 1)), min_size=1, max_size=4)


@settings(deadline=None)
@given(items=st.lists(FRACTIONS, min_size=1, max_size=5), budget=st.floats(0, 1))
def test_costs_between_buckets_never_exceed_the_budget(
    items: list[list[Option]], budget: float
) -> None:
    chosen = Knapsack(items, 1.0, buckets=100).best(budget)
    if chosen is not None:
        costs = [options[index].cost for options, index in zip(items, chosen, strict=True)]
        assert sum(costs) <= budget + 1e-6


def test_many_buckets_hardly_lose_anything() -> None:
    items = [[Option(1 / 3 + 1e-4 * i, 1.0), Option(0.5, 0.0)] for i in range(40)]
    least = sum(option.cost for option, _ in items)
    assert Knapsack(items, 20.0).best(least * 1.01) is not None


def test_without_a_budget_nothing_fits() -> None:
    assert Knapsack([[Option(1.0, 0.0)]], 1.0).best(-1.0) is None
    assert Knapsack([[Option(0.0, 0.0)]], 1.0).best(0.0) == pytest.approx([0])
