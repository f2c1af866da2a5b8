"""Loads the compiled libraries and keeps the reason when one is absent. Importing this never fails.

`_ops.so` holds the op schemas, the CPU kernels and a few plain C functions (native.py), and no Python: one file for
every Python. `_cuda.so` holds the CUDA kernels, loaded only under a CUDA build of torch.
"""

from __future__ import annotations

import glob
import os

import torch

from . import ops
from .native import Native

_HERE = os.path.dirname(__file__)
MINIMUM_TORCH = (2, 11)

ops_reason: str | None = None  # why the operators of _ops.so are absent, or None
extension: Native | None = None  # the library's plain functions, once it is loaded
cuda_reason: str | None = None


def _load_ops() -> None:
    global ops_reason, extension
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        ops_reason = f"the compiled kernels need torch >= 2.11, and this is torch {torch.__version__}"
        return
    path = os.path.join(_HERE, "_ops.so")
    try:
        torch.ops.load_library(path)
        ops.register_fakes("tokenpool_ext")
        extension = Native(path)
    except OSError as error:
        ops_reason = f"the library of compiled kernels did not load ({error}); build it with: pip install -e ."
    except (RuntimeError, AttributeError) as error:  # a library from another version of this package
        ops_reason = f"the library of compiled kernels is not of this version, build it again ({error})"


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
_load_cuda()
