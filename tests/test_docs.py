"""What the documents say is there, is there; what they show, runs."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *(ROOT / folder / "README.md" for folder in ("tests", "examples"))]
)
SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh", ".sh", ".md", ".yml"}
VARIABLE = r"TOKENPOOL_EXT_[A-Z_]*[A-Z]\b"


def python_blocks(page: Path) -> str:
    """All Python of a page: its blocks go on from one another."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{target} does not exist"


def test_the_api_reference_names_every_public_name():
    import tokenpool_ext

    words = set(re.findall(r"\w+", (ROOT / "docs" / "api.md").read_text()))
    assert not set(tokenpool_ext.__all__) - {"__version__"} - words


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


def test_environment_variables_are_few_and_listed():
    files = [ROOT / "setup.py", ROOT / "Makefile", ROOT / ".ci" / "run"]
    for folder in ("bench", "csrc", "examples", "tests", "tokenpool_ext", ".github"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    used = {name for path in files if path.exists() for name in re.findall(VARIABLE, path.read_text())}
    listed = re.findall(rf"^\| `({VARIABLE})` \|", (ROOT / "docs" / "installing.md").read_text(), re.M)
    assert used == set(listed) and len(listed) == len(set(listed)) <= 8
