"""A short run of tests/fuzz.py (make fuzz runs a long one), in a process of its own: a crash must show as a failure."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenpool_ext as tp

FUZZ = Path(__file__).parent / "fuzz.py"


def test_hostile_arguments_neither_crash_nor_differ():
    done = subprocess.run([sys.executable, str(FUZZ), "--cases", "400"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_fuzz_sees_what_is_wrong():
    spec = importlib.util.spec_from_file_location("fuzz", FUZZ)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    x = torch.randn(2, 9, 4)
    got = tp.kmeans(x, 3)
    keywords = {}
    fuzz.look_at_clusters(got, x, 3, keywords)
    for wrong in (got._replace(assignment=got.assignment + 3), got._replace(centers=got.centers * float("nan"))):
        with pytest.raises(AssertionError):
            fuzz.look_at_clusters(wrong, x, 3, keywords)
