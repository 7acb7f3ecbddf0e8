"""Operators as plain data, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from sparse_tvm.operators.base import REGISTERED, Operator, Step


def to_json(value: Any) -> Any:
    """An operator, or what it is made of, as plain data; fields at their defaults are left out."""
    if is_dataclass(value) and not isinstance(value, type):
        record = {
            f.name: to_json(getattr(value, f.name))
            for f in fields(value)
            if getattr(value, f.name) != f.default
        }
        return {"is": value.name, **record} if isinstance(value, Step) else record
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return value


def from_json(name: str, record: dict[str, Any]) -> Operator:
    """The operator called ``name`` out of what :func:`to_json` made of it.

    Raises
    ------
    KeyError
        When no operator has that name.
    """
    operator = _read(operator_called(name), record)
    assert isinstance(operator, Operator)
    return operator


def operator_called(name: str) -> type[Operator]:
    """The class of the operator called ``name``.

    Raises
    ------
    KeyError
        When no operator has that name.
    """
    found = REGISTERED[name]
    assert issubclass(found, Operator)
    return found


def all_operators() -> list[type[Operator]]:
    """Every operator that modules may contain, by name."""
    found = [cls for cls in REGISTERED.values() if issubclass(cls, Operator)]
    return sorted(found, key=lambda cls: cls.name)


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls)


def _read(expected: Any, value: Any) -> Any:
    """A value of the annotated type ``expected`` out of plain data."""
    if value is None:
        return None
    choices = [choice for choice in get_args(expected) if choice is not type(None)]
    if get_origin(expected) is tuple:
        inner = [c for c in choices if c is not Ellipsis]
        types = inner * len(value) if len(inner) < len(choices) else inner
        return tuple(_read(t, item) for t, item in zip(types, value, strict=True))
    if get_origin(expected) is not None:  # one of several; None was dealt with
        return _read(choices[0], value) if len(choices) == 1 else value
    if isinstance(expected, type) and issubclass(expected, Step):
        value = dict(value)
        expected = REGISTERED[value.pop("is")]
    if is_dataclass(expected) and isinstance(expected, type):
        hints = _hints(expected)
        known: Callable[..., Any] = expected
        return known(**{key: _read(hints[key], item) for key, item in value.items()})
    return value
