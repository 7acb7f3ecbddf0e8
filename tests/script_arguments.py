"""Parse command lines of ``scripts/*.py`` as the scripts would, and run none of them.

Reads a JSON list of command lines, each a list that begins with the script, and writes a list of
what is wrong with each, empty where nothing is. A process of its own, since scripts set variables
of the environment when they are imported.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import runpy
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest.mock import patch

import typer

OF_EXTRAS = {
    *("aiohttp", "grpc", "openvino", "prometheus_client", "sklearn"),
    *("tensorflow", "torch", "transformers", "tritonclient"),
}
"""Packages that scripts import, and that not every environment has."""


class Parsed(BaseException):
    """The command line was right."""


class Name(type):
    """The type of a name in a package that is not here: a class, a decorator, with such names."""

    def __getattr__(cls, name: str) -> Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(name, (), {"__init__": lambda *_, **__: None, "__call__": lambda _, f: f})


class Absent(MetaPathFinder, Loader):
    """Finds packages that are not here, so that what imports them can be read."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        found = fullname.partition(".")[0] in self.names
        return ModuleSpec(fullname, self, is_package=True) if found else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = Name(module.__name__, (), {}).__getattr__


def parse(app: typer.Typer) -> None:
    """Parse the process's arguments with the command tree of `app`."""
    command: Any = typer.main.get_command(app)
    context = command.make_context(sys.argv[0], sys.argv[1:])
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = command.make_context(name, rest, parent=context)
    raise Parsed


def parse_function(function: Callable[..., None]) -> None:
    """Do what ``typer.run`` does, but for running `function`."""
    app = typer.Typer(add_completion=False)
    app.command()(function)
    parse(app)


def fault(arguments: list[str]) -> str:
    """Return what is wrong with a command line."""
    whole = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        whole(parser, *given, **named)
        raise Parsed

    said = io.StringIO()
    with (
        patch.object(sys, "argv", arguments),
        patch.object(typer, "run", parse_function),
        patch.object(typer.Typer, "__call__", parse),
        patch.object(argparse.ArgumentParser, "parse_args", parse_only),
        contextlib.redirect_stderr(said),
    ):
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except Parsed:
            return ""
        except SystemExit:
            return said.getvalue()
        except (Exception, typer.TyperException) as error:
            return f"{type(error).__name__}: {error}"
    return "it looks at no arguments"


def main() -> None:
    sys.meta_path.append(Absent({name for name in OF_EXTRAS if find_spec(name) is None}))
    print(json.dumps([fault(arguments) for arguments in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
