"""Links between documents lead somewhere: to a file of the project, and to a heading of it where one is named."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """Of a document's headings, as forges make them: lower case, words joined by hyphens, other signs dropped."""
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path, text: str) -> list[str]:
    """Links of a text in that place that lead nowhere; those to other hosts are not followed."""
    broken = []
    for link in LINK.findall(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    assert not broken_links(document, document.read_text(encoding="utf-8"))


def test_a_broken_link_is_noticed():
    text = "[a](README.md) [b](docs/none.md) [c](README.md#no-such-heading) [d](https://example.org/x)"
    assert broken_links(ROOT / "CHANGES.md", text) == ["docs/none.md", "README.md#no-such-heading"]
