"""Starts test_triton_cases.py in a process of its own, with Triton's interpreter, where no GPU can run it.

The interpreter replaces triton.language for the whole process, so it cannot share one with the compiler's tests.
"""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
    pytest.skip("test_triton_cases.py runs in this process", allow_module_level=True)


def test_cases_in_the_interpreter():
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "test_triton_cases.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=here.parent, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1], done.stdout[-500:]
