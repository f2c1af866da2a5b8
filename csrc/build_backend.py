"""The build backend: setuptools', and what it needs of torch.

A build reads headers of torch and links with libtorch_cpu. Where pip isolates a build, it hides the packages of the
environment it installs into; they are looked for there all the same, so that no second torch is downloaded. Only where
none is found is torch asked for.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from glob import glob

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

STABLE = os.path.join("include", "torch", "csrc", "stable", "library.h")  # torch has it from 2.9 on; we target 2.11


def torch_folder() -> str | None:
    """The folder of a torch that one can build with: the importable one, or that of the environment installed into."""
    spec = importlib.util.find_spec("torch")
    found = [os.path.dirname(spec.origin)] if spec and spec.origin else []
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if os.environ.get("VIRTUAL_ENV"):  # uv builds in an environment of its own
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        folders += glob(os.path.join(os.environ["VIRTUAL_ENV"], "lib*", version, "site-packages"))
    for folder in found + [os.path.join(folder, "torch") for folder in folders]:
        if os.path.exists(os.path.join(folder, STABLE)):
            return folder
    return None


def get_requires_for_build_wheel(config_settings=None):
    """setuptools' own needs, and torch where there is none to build with."""
    return build_meta.get_requires_for_build_wheel(config_settings) + ([] if torch_folder() else ["torch>=2.11"])


def get_requires_for_build_editable(config_settings=None):
    """As for a wheel."""
    return build_meta.get_requires_for_build_editable(config_settings) + ([] if torch_folder() else ["torch>=2.11"])
