"""What the documentation points to exists."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
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
    for path, name in re.findall(r"`(tests/\w+\.py)::(\w+)", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"


def test_every_known_failure_has_a_test_or_a_reason():
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", (ROOT / "docs/failure-modes.md").read_text("utf-8"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 51))
    assert all("::" in prevented or "sharp-edges.md" in prevented for _, prevented in rows)
