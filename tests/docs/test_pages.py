"""Links lead somewhere, and messages that the documentation quotes are still said."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TROUBLES = ROOT / "docs" / "troubleshooting.md"
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def without_code(page: Path) -> str:
    return FENCE.sub("", page.read_text())


@cache
def anchors(page: Path) -> frozenset[str]:
    """GitHub's: lower case, words and hyphens only, repeated ones numbered."""
    found: list[str] = []
    for title in re.findall(r"^#+ (.+)$", without_code(page), re.M):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    text = PAGES[0].read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


def test_tests_and_benchmarks_that_pages_name_are_there() -> None:
    named = {path for page in PAGES for path in re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)", page.read_text())}
    assert len(named) >= 20 and [path for path in sorted(named) if not (ROOT / path).is_file()] == []


def test_an_anchor_is_what_github_makes_of_a_title(tmp_path: Path) -> None:
    (page := tmp_path / "page.md").write_text("# One, `two` & three\n```\n# no title\n```\n## Sub\n## Sub\n")
    assert anchors(page) == {"one-two--three", "sub", "sub-1"}


def sayings() -> Iterator[str]:
    """Every string of the packages, what is filled in as an ellipsis: ``{name}`` of f-strings, ``%s`` of logging."""
    for package in ("actors", "cluster", "episodes", "jobs", "learners", "questions", "rewards"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(one.value if isinstance(one, ast.Constant) else "…" for one in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


@cache
def said() -> str:
    text = "\0".join(sayings())
    return re.sub(r"…+", "…", re.sub(r"%(?:\.\d)?[rsdf]|\{:\.\d[%f]\}", "…", text))


def quoted() -> list[str]:
    """The code spans that hold an ellipsis or a sentence: messages, and no keys, figures or commands."""
    spans = re.findall(r"`([^`\n]+)`", without_code(TROUBLES))
    return [span for span in spans if span.count(" ") >= 3 and not span.startswith(("ergo-rl ", "ray "))]


def test_troubleshooting_quotes_what_the_code_says() -> None:
    assert len(quoted()) >= 25
    assert [message for message in quoted() if message not in said()] == []
