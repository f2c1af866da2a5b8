"""What the documents say is there, is there; what they show, runs."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / folder / "README.md" for folder in ("tests", "examples"))]
)


def python_blocks(page: Path) -> str:
    """All Python of a page: its blocks go on from one another."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{target} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(page):
    named = re.findall(r"`((?:csrc|tokenpool_ext|tests|bench|docs|examples)/[\w./-]*\w\.\w+)`", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_blocks(page)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_python_runs(page):
    code = python_blocks(page)
    for package in set(re.findall(r"^(?:from|import) (\w+)", code, re.M)):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    exec(compile(code, str(page), "exec"), {"__name__": "page"})
