"""The files, sections and tests that the documentation points to exist."""

import re
from pathlib import Path

import pytest

from support.paths import ROOT


PAGES = [
    page
    for pattern in ("*.md", "docs/*.md", "recipes/*.md", "benchmarks/*.md", "hf_dpzo/methods/*.md")
    for page in ROOT.glob(pattern)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_links_to_exist(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sections_that_a_page_links_to_exist(page):
    for path, section in re.findall(r"\]\(([^)#\s:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / path if path else page).read_text(encoding="utf-8")
        titles = [title.strip().lower() for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
        assert section in [re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles], f"{path}#{section}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_a_page_names_exist(page):
    named = re.findall(r"\b(tests/[\w/]*\w\.py)(?:::(\w+))?", page.read_text(encoding="utf-8"))
    missing = [f"{path}::{name}" for path, name in named if not defines(ROOT / path, name)]
    assert not missing


def defines(file: Path, name: str) -> bool:
    """Return whether the file exists and, where `name` is given, defines a test of that name."""
    return file.is_file() and (not name or f"\ndef {name}(" in file.read_text(encoding="utf-8"))


def test_a_name_that_no_test_has_would_be_found():
    assert defines(Path(__file__), "test_a_name_that_no_test_has_would_be_found")
    assert not defines(Path(__file__), "test_that_nobody_wrote")
    assert not defines(Path(__file__).parent / "nowhere.py", "")


def test_every_known_failure_has_a_test_or_a_reason():
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", (ROOT / "docs/failure-modes.md").read_text("utf-8"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) > 100
    assert all("::" in prevented or "sharp-edges.md" in prevented for _, prevented in rows)
