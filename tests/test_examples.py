"""Every example runs as it stands."""

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
}


@pytest.mark.parametrize("name", NEEDS)
def test_example_runs(name):
    package, arguments = NEEDS[name]
    if package and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip(), "an example shows something"


def test_fine_tuning_learns():
    done = subprocess.run([sys.executable, str(EXAMPLES / "fine_tune.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    accuracy = float(done.stdout.rsplit("accuracy ", 1)[1].split()[0])
    assert accuracy > 0.6, done.stdout  # chance is 0.25
