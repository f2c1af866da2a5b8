"""Loads the compiled libraries and keeps the reason when one is absent. Importing this never fails.

`_ops.so` holds the op schemas and the CPU kernels, and no Python: one file for every Python. `_C` is the module of
introspection beside it, and may be absent. `_cuda.so` holds the CUDA kernels, loaded only under a CUDA build of torch.
"""

from __future__ import annotations

import glob
import importlib
import os

import torch

from . import ops

_HERE = os.path.dirname(__file__)
MINIMUM_TORCH = (2, 11)

ops_reason: str | None = None  # why the operators of _ops.so are absent, or None
extension = None  # the module tokenpool_ext._C, once loaded
extension_reason: str | None = None  # why not
cuda_reason: str | None = None


def _load_ops() -> None:
    global ops_reason
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        ops_reason = f"the compiled kernels need torch >= 2.11, and this is torch {torch.__version__}"
        return
    try:
        torch.ops.load_library(os.path.join(_HERE, "_ops.so"))
        ops.register_fakes("tokenpool_ext")
    except OSError as error:
        ops_reason = f"the library of compiled kernels did not load ({error}); build it with: pip install -e ."
    except RuntimeError as error:  # a library from another version of this package
        ops_reason = f"the library of compiled kernels is not of this version, build it again ({error})"


def _load_extension() -> None:
    global extension, extension_reason
    if ops_reason is not None:
        extension_reason = ops_reason
        return
    try:
        extension = importlib.import_module("tokenpool_ext._C")
    except ImportError as error:
        extension_reason = f"the module tokenpool_ext._C did not load ({error}); build it with: pip install -e ."


def _load_cuda() -> None:
    global cuda_reason
    if ops_reason is not None:
        cuda_reason = ops_reason
    elif torch.version.cuda is None:
        cuda_reason = f"this torch ({torch.__version__}) was built without CUDA"
    else:
        found = sorted(glob.glob(os.path.join(_HERE, "_cuda*.so")))
        if not found:
            cuda_reason = "the CUDA kernels were not built; build them with: TOKENPOOL_EXT_CUDA=1 pip install -e ."
            return
        try:
            torch.ops.load_library(found[0])
        except OSError as error:
            cuda_reason = f"the CUDA library {os.path.basename(found[0])} did not load ({error})"


_load_ops()
_load_extension()
_load_cuda()
