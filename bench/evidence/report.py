"""``python -m bench.evidence report [--write]``: every table and figure of the evidence from the committed records.

A table stands in docs/evidence.md or docs/evidence/ between ``<!-- table NAME -->`` and ``<!-- end -->``. Without
--write: says whether the pages are what the records make, exit status 1 if not. A figure's file holds the hash of the
record it shows.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from . import data
from .tables import TABLES

DOCS = data.ROOT / "docs"
BLOCK = re.compile(r"<!-- table (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def document(text: str) -> str:
    """The document with every table made anew."""
    return BLOCK.sub(lambda found: f"<!-- table {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->", text)


def pages() -> dict[Path, str]:
    """The pages of the evidence, and what stands in them."""
    return {page: page.read_text() for page in (DOCS / "evidence.md", *sorted((DOCS / "evidence").glob("*.md")))}


def stale(text: str) -> list[str]:
    """What the records do not make: tables and figures that differ or are missing in the text of all pages."""
    from .figures import FIGURES, digest

    wrong = [f"table {name}" for name in TABLES if name not in BLOCK.findall(text)]
    wrong += [f"table {found[1]}" for found in BLOCK.finditer(text) if document(found[0]) != found[0]]
    for record in FIGURES:
        picture = data.IMAGES / f"evidence-{record}.png"
        if picture.name not in text:
            wrong.append(f"{picture.name}: not shown")
        if not picture.is_file() or digest(record).encode() not in picture.read_bytes():
            wrong.append(f"{picture.name}: of another record")
    return wrong


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence report", description=__doc__)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    if args.write:
        from . import figures

        for page, text in pages().items():
            page.write_text(document(text))
        for record in figures.FIGURES:
            figures.save(record)
    wrong = stale("\n".join(pages().values()))
    print("\n".join(wrong) or "every page is what the records make")
    return int(bool(wrong))
