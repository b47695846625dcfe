"""The documents name tests, files and sections that exist."""

import ast
import re

import pytest

from paths import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/**/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def rows(path):
    """Return the body rows of all tables of a Markdown file, each as a list of cells."""
    text = path.read_text(encoding="utf-8")
    tables = re.findall(r"^\|[^\n]*\|\n\|[-:| ]+\|\n((?:\|[^\n]*\|\n)*)", text, re.MULTILINE)
    lines = "".join(tables).splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def names_of_tests(path):
    """Return the names of the test functions in a Python file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {name for name in names if name.startswith("test_")}


def headings(path):
    """Return the anchors of a Markdown file's sections, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_guarantee_names_tests_that_exist():
    found = rows(ROOT / "docs/guarantees.md")
    assert len(found) >= 20
    for row in found:
        assert len(row) == 3, row
        links = re.findall(r"\[`(\w+)`\]\(([^)]+)\)", row[2])
        assert links, f"no test: {row[0]}"
        for name, target in links:
            path = (ROOT / "docs" / target).resolve()
            assert path.is_file(), f"{target} does not exist: {row[0]}"
            assert name in names_of_tests(path), f"{target} has no {name}: {row[0]}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):  # https:, mailto:
            continue
        name, _, section = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not section or section in headings(target), link
