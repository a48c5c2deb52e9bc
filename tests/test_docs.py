"""Pages say where they are: every citation in code and every link between pages leads to a page and a heading."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("*.py", "*.yaml", "*.toml", "*.cu", "*.cuh", "Makefile", "Dockerfile")
PAGE = r"(?P<page>[\w./-]*\w\.md)(?:#(?P<heading>[\w-]+))?"


def tracked(*patterns: str) -> list[Path]:
    names = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split()]


@cache
def headings(page: Path) -> set[str]:
    """The anchors that a reader of Markdown makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def problem(page: Path, heading: str | None) -> str | None:
    if not page.is_file():
        return f"no page {page.relative_to(ROOT) if page.is_relative_to(ROOT) else page}"
    if heading and heading not in headings(page):
        return f"{page.relative_to(ROOT)} has no heading #{heading}"
    return None


def test_every_page_that_code_cites_is_there():
    """A page is cited by its path from the root, or from the citing file's folder."""
    wrong = []
    for file in tracked(*CODE):
        if file == Path(__file__):
            continue
        for found in re.finditer(r"(?<![\w/.{}*-])" + PAGE, file.read_text()):
            places = [folder / found["page"] for folder in (ROOT, file.parent)]
            page = next((place for place in places if place.is_file()), places[0])
            # Tests make pages of their own under a temporary folder; results/*.md are outputs named by scripts.
            made_here = found["page"] in ("law.md", "comparison.md", "compare.md", "table.md") or "tests" in file.parts
            if (why := problem(page, found["heading"])) and not (made_here and "/" not in found["page"]):
                wrong.append(f"{file.relative_to(ROOT)}: {why}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", tracked("*.md"), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        why = problem(place, heading or None) if place.suffix == ".md" else None if place.exists() else f"no {target}"
        wrong += [why] if why else []
    assert not wrong, "\n".join(wrong)


def test_pages_are_short():
    lengths = {page.relative_to(ROOT): len(page.read_text().splitlines()) for page in tracked("README.md", "docs/*.md")}
    limits = {"README.md": 120, "docs/recipes": 60, "docs": 150}
    for page, length in lengths.items():
        limit = next(limit for place, limit in limits.items() if str(page).startswith(place))
        assert length <= limit, f"{page}: {length} lines, at most {limit}"
