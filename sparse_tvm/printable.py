"""Text from files and models, made safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return `text` with escapes for all but printable characters and line ends.

    Names come from whoever made the model. A terminal obeys control characters, overrides of the
    writing direction make a name look like another, and what is not UTF-8 in a file's name cannot
    be written at all.

    >>> printable("\x1b[2Jname")
    '\\x1b[2Jname'
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character == "\n" else _escape(character)
        for character in text
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
