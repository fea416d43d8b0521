"""Plain words: README, the pages of docs/ and the help texts keep below a stated rate of signs of hard prose.

The signs are words such as "nobody" and "whoever", and sentences that begin with "what", "who", "where" or
"whether". They are counted per 1,000 words over everything together.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
LIMIT_PER_1000 = 0.15
SIGNS = {
    "persons without a name": re.compile(
        r"\b(nobody|somebody|everybody|whoever|whatever|whichever)\b", re.IGNORECASE
    ),
    "sentences that begin with a question word": re.compile(
        r"(?:^|[.:;!?]\s+)(What|Who|Whose|Where|Whether|Which)\b(?![^.!?]*\?)", re.MULTILINE
    ),
}
BLOCK = re.compile(r"^```.*?^```$|<!--.*?-->", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")


def prose(markdown: str) -> str:
    """The sentences of a page: blocks, code and marks of tables left out, paragraphs on one line each."""
    text = CODE.sub("CODE", BLOCK.sub("", markdown))
    text = re.sub(r"\n(?=[a-z(*\[\"0-9])", " ", re.sub(r"^[ |*#>-]+|\|", "\n", text, flags=re.MULTILINE))
    return re.sub(r"\n{2,}", "\n", text)


def generated_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated_pages", ROOT / "docs" / "generated_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Name of each page -> its sentences; the help texts are one page."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    made = generated_pages()
    found = {str(path.relative_to(ROOT)): prose(path.read_text()) for path in pages}
    return found | {"help": prose(made.commands()), "errors": prose(made.errors())}


@pytest.mark.parametrize("sign", SIGNS)
def test_signs_of_hard_prose_are_rare(texts, sign):
    hits = [f"{name}: {hit[0].strip()}" for name, text in texts.items() for hit in SIGNS[sign].finditer(text)]
    words = sum(len(text.split()) for text in texts.values())
    assert len(hits) <= LIMIT_PER_1000 * words / 1000, f"{len(hits)} in {words} words:\n" + "\n".join(hits)


def test_a_sentence_is_found_and_a_question_is_allowed():
    sign = SIGNS["sentences that begin with a question word"]
    assert sign.search(prose("It works. What came\nis stored."))
    assert not sign.search(prose("Where is the deadline checked?"))
    assert SIGNS["persons without a name"].search("for whoever asks")
