"""The pages of docs/: decisions are short and dated, and paths that a page names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MAX_LINES = 8
DATED = re.compile(r"\d{4}-\d{2}-\d{2}: .+")
PATH = re.compile(
    r"`((?:rsm_[a-z]+|export|tests|benchmarks|protos|deploy|examples|docs)/[\w./-]+)(?:::?[\w.:]+)?`"
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def decisions() -> list[tuple[str, list[str]]]:
    """(heading, lines of text) of each decision."""
    parts = re.split(r"^## (.+)\n", (DOCS / "design.md").read_text(), flags=re.MULTILINE)
    return [
        (parts[i], [line for line in parts[i + 1].splitlines() if line.strip()])
        for i in range(1, len(parts), 2)
    ]


def test_every_decision_has_a_date_and_at_most_eight_lines():
    assert len(decisions()) > 40
    assert [heading for heading, _ in decisions() if not DATED.fullmatch(heading)] == []
    assert {heading: len(lines) for heading, lines in decisions() if len(lines) > MAX_LINES} == {}


def test_lines_of_decisions_are_of_the_usual_length():
    assert [line for _, lines in decisions() for line in lines if len(line) > 130] == []


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_paths_that_a_page_names_exist(page):
    assert [path for path in PATH.findall(page.read_text()) if not (ROOT / path).exists()] == []
