"""Documentation that code can check."""

import re
import subprocess
import sys
from pathlib import Path

from support.processes import ROOT


def links_of(page: Path) -> list[str]:
    """Where links and images lead, without the section."""
    return re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())


def test_families_page_is_what_the_registry_says():
    result = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_links_lead_somewhere():
    """Every relative link and image of the pages at the root, of docs and of tests."""
    pages = [*ROOT.glob("*.md"), ROOT / "tests" / "README.md", *(ROOT / "docs").rglob("*.md")]
    broken = []
    for page in pages:
        for target in links_of(page):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_every_page_is_reached_from_the_readme():
    """By one link, or by two."""
    seen: set[Path] = set()
    pages = {ROOT / "README.md"}
    for _ in range(3):
        seen |= pages
        links = {(page.parent / target).resolve() for page in pages for target in links_of(page)}
        pages = {target for target in links if target.suffix == ".md" and target.exists()} - seen
    assert not [page.name for page in (ROOT / "docs").rglob("*.md") if page not in seen]


def test_the_page_on_the_house_names_every_room():
    page = (ROOT / "docs" / "house.md").read_text()
    rooms = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rooms) == sorted(path.parent.name for path in (ROOT / "sa_convert").glob("*/__init__.py"))
