"""Starts the tests of the Triton backend in processes of their own, with Triton's interpreter, where no GPU can run it.

Two processes side by side, since the interpreter is single-threaded Python: this backend's own cases
(test_triton_cases.py) and the bodies that all backends share.  The interpreter replaces triton.language for the whole
process, so it cannot share one with the compiler's tests.  By hand, every case of every body:
    TRITON_INTERPRET=1 python -m pytest
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
    pytest.skip("the Triton backend runs in this process", allow_module_level=True)

HERE = Path(__file__).parent

# Files of each process, chosen for equal times, with the least number of cases that must pass in each of them.
PARTS = (
    {"test_clustering": 115, "test_properties": 7, "test_init": 9, "test_defaults": 1},
    {
        "test_triton_cases": 160,
        "test_autograd": 30,
        "test_attention_received": 20,
        "test_invariance": 12,
        "test_kmeans": 15,
        "test_kmedoids": 10,
        "test_pool": 25,
        "test_compile": 4,
        "test_assign": 10,
        "test_representatives": 5,
        "test_numerics": 18,
        "test_derivatives": 3,
    },
)
# Bodies that are not run here, and why.
LEFT_OUT = {"test_exactness": "test_numerics has the same promises in sizes for the interpreter"}


def outcomes(report: Path) -> dict[str, dict[str, list[str]]]:
    """{file: {"passed" | "failed" | "skipped": [case and message]}} of pytest's own report."""
    found: dict[str, dict[str, list[str]]] = {}
    for case in xml.etree.ElementTree.parse(report).getroot().iter("testcase"):
        problems = [
            (child.tag, child.get("message") or "") for child in case if child.tag in ("failure", "error", "skipped")
        ]
        kind, message = problems[0] if problems else ("passed", "")
        kind = "failed" if kind in ("failure", "error") else kind
        file = case.get("classname", "").split(".")[-1]
        found.setdefault(file, {"passed": [], "failed": [], "skipped": []})[kind].append(
            f"{case.get('name')} {message}".strip()
        )
    return found


def closing_line(output: str) -> str:
    """The line with which pytest ends, "3 passed in 0.1s"; coloured or framed, and whatever follows it."""
    lines = [
        line.strip("= ") for line in output.splitlines() if " in " in line and ("passed" in line or "failed" in line)
    ]
    return lines[-1] if lines else ""


def test_the_backend_in_the_interpreter(tmp_path):
    """The backend's own cases, and of every shared body as many as each value of each parameter needs."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = []
    for number, part in enumerate(PARTS):
        report = tmp_path / f"{number}.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--cover",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore::RuntimeWarning",
            f"--junitxml={report}",
            *(str(HERE / f"{file}.py") for file in part),
        ]
        running.append(
            (
                part,
                report,
                subprocess.Popen(
                    command,
                    env=environment,
                    cwd=HERE.parent,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                ),
            )
        )
    for part, report, process in running:
        output = process.communicate(timeout=3600)[0]
        assert process.returncode == 0, output[-8000:]
        found = outcomes(report)
        assert set(found) == set(part), output[-2000:]
        passed = sum(len(results["passed"]) for results in found.values())
        assert f"{passed} passed" in closing_line(output), (passed, output[-500:])
        for file, least in part.items():
            assert not found[file]["failed"], found[file]["failed"]
            assert len(found[file]["passed"]) >= least, f"{file}: {len(found[file]['passed'])} passed"
        print(f"{passed} passed in the interpreter; skipped: {[s for r in found.values() for s in r['skipped']]}")


def test_every_shared_body_is_covered():
    """A test file whose bodies take a backend belongs to one of the parts."""
    body = re.compile(r"^def test_\w+\([^)]*\bbackend\b", re.MULTILINE)
    taking = {file.stem for file in HERE.glob("test_*.py") if body.search(file.read_text())}
    assert len(taking) >= 9
    assert taking <= {name for part in PARTS for name in part} | set(LEFT_OUT), taking


def test_the_closing_line_is_found():
    for line in (
        "\x1b[32m\x1b[1m3 passed\x1b[0m in 0.02s",
        "=== 3 passed, 1 skipped in 0.02s (0:00:01) ===",
        "3 passed in 1s",
    ):
        assert "3 passed" in closing_line(f"...\n{line}\nsys:1: ResourceWarning").replace("\x1b[0m", "")
    assert closing_line("no tests ran") == ""
