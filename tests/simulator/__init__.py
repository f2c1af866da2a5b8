"""The CUDA kernels' own source, compiled as C++ and run on the CPU: the operators of the CUDA backend without a GPU.

`Simulator(build(...))` has the operators as methods with the library's own signatures (torch CPU tensors in and
out), for any compute capability and any path. Only g++ is needed. Slow: small shapes only. See README.md.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
PATHS = ("resident", "gram", "streaming", "spread")  # in the order of CudaPath
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
VARIANTS = {
    "": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=vptr"],
    "compare_all": ["-DTOKENPOOL_COMPARE_ALL=1"],
}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def sources() -> list[Path]:
    headers = [*HERE.glob("*.h"), *(CSRC / "cuda").glob("*.cuh"), *(CSRC / "cuda").glob("*.h"), *CSRC.glob("*.h")]
    return [HERE / "sim.cpp", CSRC / "cuda" / "pipeline.cpp", CSRC / "planner_cuda.cpp", *sorted(headers)]


def command(variant: str, output: Path, *units: Path, shared: bool = False) -> list[str]:
    """The compiler's command for `units`, on one of VARIANTS."""
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}"]
    library = ["-shared", "-fPIC"] if shared else []
    return [compiler(), *flags, *VARIANTS[variant], *library, "-o", str(output), *map(str, units)]


def units() -> list[Path]:
    return [path for path in sources() if path.suffix == ".cpp"]


def build(variant: str = "") -> Path:
    """Compile the simulator (once per source text, kept in build/simulator) and return the shared library."""
    digest = hashlib.sha256("\0".join(command(variant, Path(), shared=True)).encode())
    for path in sources():
        digest.update(path.name.encode() + path.read_bytes())
    library = ROOT / "build" / "simulator" / f"sim{'_' + variant if variant else ''}_{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        fresh = Path(folder) / library.name
        done = subprocess.run(command(variant, fresh, *units(), shared=True), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the simulator does not compile:\n{done.stderr}")
        os.replace(fresh, library)
    return library


def _strides(x: Tensor) -> list[int]:
    """Strides (batch, token, feature) and whether 16-byte loads are allowed, by the rule of the CUDA library."""
    vector = 16 // x.element_size()
    aligned = x.stride(2) == 1 and x.stride(1) % vector == 0 and x.stride(0) % vector == 0 and x.data_ptr() % 16 == 0
    return [*x.stride(), int(aligned)]


def _pointers(*tensors: Tensor | None):
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


def _numbers(*values: int):
    return (ctypes.c_int64 * len(values))(*[int(v) for v in values])


class Simulator:
    """The operators, for one device: compute capability, shared memory limit (0: the capability's), forced path."""

    def __init__(
        self,
        library: Path,
        capability: tuple[int, int] = (9, 0),
        path: str | None = None,
        shared_limit: int = 0,
        images_per_pass: int = 0,
        reverse: bool = False,
        sm_count: int = 0,
    ):
        self.lib = ctypes.CDLL(str(library))
        self.lib.sim_attention_received.argtypes = [ctypes.c_void_p, ctypes.c_float, ctypes.c_void_p]
        self.capability, self.path, self.shared_limit = capability, path, shared_limit
        self.images_per_pass, self.reverse, self.sm_count = images_per_pass, reverse, sm_count
        self.taken: str | None = None  # path of the last clustering

    def _cluster(self, x, weights, mask, counts, init, num_clusters, num_iters, sort, medoids):
        b, n, d = x.shape
        k = num_clusters
        centers = torch.full((b, k, d), float("nan"), dtype=x.dtype)
        assignment = torch.full((b, n), -7, dtype=torch.int64)
        mass, inertia = torch.full((b, k), float("nan")), torch.full((b,), float("nan"))
        chosen = torch.full((b, k), -7, dtype=torch.int64)
        if b == 0 or n == 0:
            return centers.zero_(), assignment, mass.zero_(), chosen.fill_(-1), inertia.zero_()
        rows = init.dtype == torch.int64 and init.shape[1] > 0 and (k == 1 or init.stride(1) == 1)
        weights, mask, counts = (None if t is None else t.contiguous() for t in (weights, mask, counts))
        init = init if rows else init.contiguous()  # as in the library
        by_index = init.dtype == torch.int64 and init.shape[1] > 0
        farthest = init.dtype == torch.int64 and not by_index
        self.lib.sim_set_reverse(int(self.reverse))
        taken = self.lib.sim_cluster(
            _numbers(
                b,
                n,
                d,
                k,
                DTYPES[x.dtype],
                *_strides(x),
                num_iters,
                sort,
                medoids,
                *self.capability,
                self.shared_limit,
                -1 if self.path is None else PATHS.index(self.path),
                self.images_per_pass,
                self.sm_count,
                init.stride(0),
            ),
            _pointers(
                x,
                weights,
                mask,
                counts,
                init if by_index else None,
                None if by_index or farthest else init,
                centers,
                assignment,
                mass,
                chosen,
                inertia,
            ),
        )
        assert taken >= 0
        self.taken = PATHS[taken]
        return centers, assignment, mass, chosen, inertia

    def kmeans(self, x, weights, mask, counts, init, num_clusters, num_iters, sort):
        return self._cluster(x, weights, mask, counts, init, num_clusters, num_iters, sort, False)

    def kmedoids(self, x, weights, mask, counts, init, num_clusters, num_iters, sort):
        return self._cluster(x, weights, mask, counts, init, num_clusters, num_iters, sort, True)

    def _sums(self, x, assignment, weights, num_clusters, mode, mass):
        b, n, d = x.shape
        centers = torch.full((b, num_clusters, d), float("nan"), dtype=x.dtype)
        if b == 0 or n == 0:  # the library returns before any launch
            if mass is not None:
                mass.zero_()
            return centers.zero_()
        assignment = assignment.contiguous()
        weights = None if weights is None else weights.contiguous()
        assert 0 == self.lib.sim_pool(
            _numbers(b, n, d, num_clusters, DTYPES[x.dtype], *_strides(x), mode, self.shared_limit or 99 * 1024),
            _pointers(x, assignment, weights, centers, mass),
        )
        return centers

    def pool(self, x, assignment, weights, num_clusters):
        mass = torch.full((x.shape[0], num_clusters), float("nan"))
        return self._sums(x, assignment, weights, num_clusters, 0, mass), mass

    def unpool_backward(self, grad, assignment, num_clusters):
        return self._sums(grad, assignment, None, num_clusters, 2, None)

    def pool_backward(self, grad_centers, x, centers, assignment, weights, mass):
        b, n, d = x.shape
        grad_x = torch.full((b, n, d), float("nan"), dtype=x.dtype)
        grad_weights = torch.full((b, n), float("nan"))
        if b == 0 or n == 0:
            return grad_x, grad_weights
        assignment, mass = assignment.contiguous(), mass.contiguous()
        weights = None if weights is None else weights.contiguous()
        assert 0 == self.lib.sim_pool_backward(
            _numbers(
                b, n, d, centers.shape[1], DTYPES[x.dtype], *_strides(x), *_strides(grad_centers), *_strides(centers)
            ),
            _pointers(x, grad_centers, centers, assignment, weights, mass, grad_x, grad_weights),
        )
        return grad_x, grad_weights

    def unpool(self, centers, assignment):
        b, n = assignment.shape
        assignment = assignment.contiguous()
        out = torch.full((b, n, centers.shape[2]), float("nan"), dtype=centers.dtype)
        if b == 0 or n == 0:
            return out
        assert 0 == self.lib.sim_unpool(
            _numbers(b, n, centers.shape[2], centers.shape[1], DTYPES[centers.dtype], *_strides(centers)),
            _pointers(centers, assignment, out),
        )
        return out

    def attention_received(self, q, k, scale, lse):
        b, h, nq, d = q.shape
        out = torch.full((b, k.shape[2]), float("nan"))
        lse = None if lse is None else lse.contiguous()
        if b == 0 or h == 0 or nq == 0 or k.shape[2] == 0:
            return out.zero_()

        def layout(t):
            vector = 16 // t.element_size()
            aligned = t.stride(3) == 1 and all(s % vector == 0 for s in t.stride()[:3]) and t.data_ptr() % 16 == 0
            return [t.stride(0), t.stride(2), t.stride(3), int(aligned), t.stride(1)]

        assert 0 == self.lib.sim_attention_received(
            _numbers(b, h, nq, k.shape[2], d, DTYPES[q.dtype], *layout(q), *layout(k)),
            float(scale),
            _pointers(q, k, lse, out),
        )
        return out
