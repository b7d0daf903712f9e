"""Help texts whose examples fit a terminal."""

from __future__ import annotations

import argparse
import itertools
import re
import textwrap
from collections.abc import Iterator

WORDS = re.compile(r'(?:[^\s"]|"[^"]*")+')
EXAMPLE = re.compile(r"(\s+)(\S.*?)(?:\s{2,}(\S.*))?$")
"""An indented line: a command, and behind two spaces or more what it does."""
PROGRAMS = ("turbovlm ", "pip ", "eval ")
"""What a line that is typed begins with."""


class Help(argparse.HelpFormatter):
    """Paragraphs are filled; indented lines are examples, of which what is too long goes on in the next line."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in _lines(text, width - len(indent)))


def _lines(text: str, width: int) -> Iterator[str]:
    for kind, group in itertools.groupby(text.splitlines(), lambda line: line[:1].isspace() + 2 * (not line.strip())):
        if kind:
            for line in group:
                yield from [line] if len(line) <= width else _example(line, width)
        else:
            yield from textwrap.wrap(" ".join(group), width)


def _example(line: str, width: int) -> Iterator[str]:
    found = EXAMPLE.match(line)
    assert found is not None
    indent, command, remark = found.groups()
    if not command.startswith(PROGRAMS):
        yield from textwrap.wrap(line.strip(), width, initial_indent=indent, subsequent_indent=indent + "  ")
        return
    row = indent
    for word in _together(WORDS.findall(command)):
        if len(row) + len(word) + 3 > width and row.strip():
            yield f"{row} \\"
            row = indent + "  "
        row += f" {word}" if row.strip() else word
    yield row
    if remark is not None:
        yield from textwrap.wrap(remark, width, initial_indent=indent + "    ", subsequent_indent=indent + "    ")


def _together(words: list[str]) -> list[str]:
    """Options with their first value, which stay in one line."""
    found: list[str] = []
    for word in words:
        if found and found[-1].startswith("--") and " " not in found[-1] and not word.startswith("-"):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found
