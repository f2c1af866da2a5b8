"""Every example runs as it stands."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# What an example needs beyond torch, and arguments that keep it short.
NEEDS = {
    "speed_up_timm": ("timm", ["--model", "vit_tiny_patch16_224", "--batch", "1"]),
    "your_own_model": (None, []),
    "clip_zero_shot": ("transformers", []),
    "segmentation_features": ("transformers", []),
    "point_sets": (None, ["--sets", "200"]),
    "fine_tune": (None, []),
    "retrieval_libraries": (None, []),
}
# One process for all, which imports torch and transformers once; no module of the tests is on its path.
RUN_ALL = """
import contextlib, io, json, runpy, sys, traceback
results = {}
for path, arguments in json.load(sys.stdin):
    sys.argv, shown, error = [path, *arguments], io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(shown):
            runpy.run_path(path, run_name="__main__")
    except (Exception, SystemExit):
        error = traceback.format_exc()
    results[path] = shown.getvalue(), error
print(json.dumps(results))
"""


def installed(name: str) -> bool:
    package = NEEDS[name][0]
    return package is None or find_spec(package) is not None


@pytest.fixture(scope="module")
def results():
    """(what it shows, its error) of every example that can run here."""
    calls = [(str(EXAMPLES / f"{name}.py"), NEEDS[name][1]) for name in NEEDS if installed(name)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN_ALL], input=json.dumps(calls), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {Path(path).stem: result for path, result in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", NEEDS)
def test_example_runs(name, results):
    if not installed(name):
        pytest.skip(f"{NEEDS[name][0]} is not installed")
    shown, error = results[name]
    assert not error, error[-2000:]
    assert shown.strip(), "an example shows something"


def test_fine_tuning_learns(results):
    shown, error = results["fine_tune"]
    assert not error, error[-2000:]
    accuracy = float(shown.rsplit("accuracy ", 1)[1].split()[0])
    assert accuracy > 0.6, shown  # chance is 0.25
