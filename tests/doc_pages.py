"""The documentation's examples: code blocks of its pages, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes
    ----------
    page : str
        Its path in the repository.
    line : int
        Where its text begins, counted from 1.
    language : str
        What stands behind its fence; empty for a block without one.
    """

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a block of ``bash`` or ``console``, with the output that the page shows."""

    page: str
    line: int
    text: str
    output: str = ""

    @property
    def arguments(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def plain(self) -> str:
        """The command without comments, with one space between words."""
        return " ".join(self.arguments)


def blocks(page: Path) -> Iterator[Block]:
    name = page.relative_to(ROOT).as_posix()
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            fence = token.type == "fence"
            yield Block(name, token.map[0] + 1 + fence, token.info.strip(), token.content)


def commands(block: Block) -> Iterator[Command]:
    """Yield the commands of a block: lines, joined where one goes on in the next."""
    if block.language == "console":
        yield from _shown(block)
        return
    waiting = ""
    first = block.line
    for number, line in enumerate(block.text.splitlines(), block.line):
        first = first if waiting else number
        waiting += f"{line}\n"
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:  # a quotation goes on
            continue
        if not line.endswith("\\"):
            if words:
                for part in waiting.replace("\\\n", "").split(" && "):
                    yield Command(block.page, first, part.strip())
            waiting = ""
    assert not waiting, f"{block.page}:{first}: ends amid a command: {waiting}"


def _shown(block: Block) -> Iterator[Command]:
    """Yield what stands behind ``$``, with the lines up to the next."""
    for match in re.finditer(r"^\$ (.*)\n((?:(?!\$ ).*\n?)*)", block.text, re.MULTILINE):
        line = block.line + block.text[: match.start()].count("\n")
        yield Command(block.page, line, match[1], match[2])


def inline_commands(page: Path) -> Iterator[str]:
    """Yield what a page has between backquotes and is a command, a script, or an option."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or []:
            if child.type == "code_inline" and re.match(
                r"sparse-tvm [a-z]|((bash|python) )?scripts/|--[a-z]", child.content
            ):
                yield child.content
