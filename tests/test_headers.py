"""Every header of csrc parses alone: for editors, and for whoever reads one first. No file of the product is long."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
NEEDS_CUDA = {"launch.cuh"}  # cuda_runtime.h
HEADERS = sorted(
    path for kind in ("*.h", "*.cuh") for path in (ROOT / "csrc").rglob(kind) if path.name not in NEEDS_CUDA
)


def first_included(header: Path) -> Path | None:
    """The header whose text the compiler reads before any of this one's own."""
    opening = re.match(r'(?://.*\n|\s*\n)*#pragma once\n\s*#include "(.+)"\n', header.read_text())
    return (header.parent / opening[1]).resolve() if opening else None


# What stands first in another header parses alone if that one does.
ALONE = sorted(set(HEADERS) - {first_included(path) for path in HEADERS})


FLAGS = ["-fsyntax-only", "-std=c++17", "-Wno-unknown-pragmas", "-DTOKENPOOL_CUDA_SIM"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'tests' / 'simulator'}"]
FLAGS += ["-isystem", str(Path(torch.__file__).parent / "include")]
LIBRARIES = ROOT / "csrc" / "cpu" / "headers.h"  # what every CPU kernel reads first


def opens_with_libraries(header: Path | None) -> bool:
    return header is not None and (header == LIBRARIES or opens_with_libraries(first_included(header)))


@pytest.fixture(scope="module")
def precompiled(tmp_path_factory):
    """LIBRARIES, read once: to put them in front of a header that opens with them changes nothing."""
    place = tmp_path_factory.mktemp("precompiled") / LIBRARIES.name
    command = [COMPILER, *FLAGS[1:], "-x", "c++-header", str(LIBRARIES), "-o", f"{place}.gch"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ["-include", str(place)]


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: str(path.relative_to(ROOT / "csrc")))
def test_a_header_opens_with_what_it_is_for(header):
    text = header.read_text()
    assert text.startswith("//")
    assert text.count("#pragma once") == 1


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on PATH")
@pytest.mark.parametrize("header", ALONE, ids=lambda path: str(path.relative_to(ROOT / "csrc")))
def test_header_parses_alone(header, tmp_path, precompiled):
    unit = tmp_path / "unit.cpp"
    unit.write_text(f'#include "{header}"\n')
    first = precompiled if opens_with_libraries(header) else []
    done = subprocess.run([COMPILER, *FLAGS, *first, str(unit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_is_over_400_lines_and_no_class_over_250():
    folders = ("csrc", "tokenpool_ext", "bench", "examples")
    files = [
        p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".h", ".cuh", ".cu", ".cpp")
    ]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 400}
    for path in (p for p in files if p.suffix == ".py"):
        classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        long |= {f"{path.name}:{c.name}": n for c in classes if (n := (c.end_lineno or 0) - c.lineno + 1) > 250}
    assert len(files) > 100 and not long
