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
    """Two processes side by side: the interpreter is single-threaded Python."""
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TOKENPOOL_EXT_REQUIRE_")}
    halves = [subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", part, str(here / "test_triton_cases.py")],
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=here.parent, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True) for part in ("gram", "not gram")]
    for half in halves:
        output = half.communicate(timeout=1800)[0]
        assert half.returncode == 0, output[-8000:]
        summary = output.splitlines()[-1]
        assert " passed" in summary and "skipped" not in summary, summary
