"""Figures in Markdown pages that are computed: whole tables between markers, and sentences with numbers in them.

    <!-- table: screen -->
    | recipe | ... |
    <!-- end -->

A sentence is written with its computed numbers; in the page it is found by its words, whatever the numbers there are,
and however its lines are broken. "..." is any text on one line.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")


class PageError(ValueError):
    """A page lacks what is to be computed in it."""


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def blocks(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """`text` with each marked table as computed. PageError for one that nobody computes."""

    def computed(found: re.Match) -> str:
        if found[2] not in tables:
            raise PageError(f"nobody computes the table {found[2]!r}; there are: {', '.join(tables)}")
        return found[1] + tables[found[2]]() + found[4]

    return BLOCK.sub(computed, text)


def pattern(sentence: str) -> re.Pattern:
    """What finds a sentence with whatever numbers. A number is a group."""
    parts = []
    for piece in re.split(rf"({NUMBER.pattern}|\.\.\.|\s+)", sentence):
        if NUMBER.fullmatch(piece):
            parts.append(f"({NUMBER.pattern})")
        elif piece == "...":
            parts.append(r"[^\n]*?")
        else:
            parts.append(r"\s+" if piece.isspace() else re.escape(piece))
    return re.compile("".join(parts))


def sentence(text: str, wanted: str) -> str:
    """`text` with the numbers of `wanted` where its words are. PageError where they are not, or twice."""
    found = list(pattern(wanted).finditer(text))
    if len(found) != 1:
        raise PageError(f"{len(found)} places, not one, have the words of: {wanted}")
    numbers = NUMBER.findall(wanted.replace("...", ""))
    (match,) = found
    for group, number in reversed(list(enumerate(numbers, 1))):
        text = text[: match.start(group)] + number + text[match.end(group) :]
    return text


def differences(old: str, new: str) -> list[str]:
    """`line: what it says -> what is computed`, for each line that differs. Both have the same lines but in tables."""
    before, after = old.splitlines(), new.splitlines()
    width = max(len(before), len(after))
    padded: Any = (lines + [""] * (width - len(lines)) for lines in (before, after))
    return [f"{i}: {a}\n    -> {b}" for i, (a, b) in enumerate(zip(*padded, strict=True), 1) if a != b]
