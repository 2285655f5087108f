"""``docs/errors.md`` has every message that the sources can refuse with."""

from __future__ import annotations

import re
from pathlib import Path

import messages
import pytest

PAGE = re.sub(r"\s+", " ", (Path(__file__).parents[2] / "docs" / "errors.md").read_text())


def missing(where_and_what: list[tuple[str, str]]) -> list[str]:
    return [
        f"{where}: {piece}"
        for where, message in where_and_what
        for piece in messages.fragments(message)
        if piece not in PAGE
    ]


@pytest.mark.parametrize(("language", "at_least"), [("python", 60), ("cpp", 90)])
def test_every_message_is_explained(language, at_least):
    found = list(getattr(messages, f"{language}_messages")())
    assert len(found) >= at_least  # or the search has lost them
    assert missing(found) == []


def test_the_search_sees_what_the_page_lacks():
    assert missing([("here", "Invalid {}: no such message stands anywhere, got {}")]) != []


def test_every_row_says_what_to_do():
    rows = [line for line in PAGE.split(" | ") if line]
    assert len(rows) > 300
    for line in (Path(__file__).parents[2] / "docs" / "errors.md").read_text().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            assert len(cells) in (2, 3), line
            assert cells[-1], line
