"""The CUDA kernels' own source, compiled as C++ and run on the CPU: the operators of the CUDA backend without a GPU.

`Simulator(build(...))` has the operators as methods with the library's own signatures (torch CPU tensors in and
out), for any compute capability and any path. Only g++ is needed. Slow: small shapes only.

`build("ptx")` runs what nvcc makes of the kernels instead (ptx.py); it needs nvcc.
TOKENPOOL_EXT_CUDA_SIM_VARIANT=ptx makes that what `build()` builds: the tests of this file's users then run on it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import ptx
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
PATHS = ("resident", "gram", "streaming", "spread")  # in the order of CudaPath
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
VARIANTS = {
    "": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=vptr"],
    "compare_all": ["-DTOKENPOOL_COMPARE_ALL=1"],
    "ptx": ["-DTOKENPOOL_SIM_PTX"],
    "count": ["-DTOKENPOOL_SIM_PTX", "-DTOKENPOOL_SIM_COUNT"],
}
COMPILED = ("ptx", "count")  # by nvcc first
CHECKED = ["-g", "-Wall", "-Wextra", "-Werror"]
PTX_ARCHITECTURE = "compute_90a"  # an H100's; ptxas makes its machine code from this text


def default_variant() -> str:
    return os.environ.get("TOKENPOOL_EXT_CUDA_SIM_VARIANT", "")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def sources() -> list[Path]:
    headers = [*HERE.glob("*.h"), *(CSRC / "cuda").glob("*.cuh"), *(CSRC / "cuda").glob("*.h"), CSRC / "planner_cuda.h"]
    return [HERE / "sim.cpp", CSRC / "cuda" / "pipeline.cpp", CSRC / "planner_cuda.cpp", *sorted(headers)]


def cache_folder() -> Path:
    root = os.environ.get("TOKENPOOL_EXT_TEST_CACHE") or os.path.join(
        tempfile.gettempdir(), f"tokenpool_ext_sim_{os.getuid()}"
    )
    return Path(root)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the simulator does not compile: {' '.join(command)}\n{done.stderr}")


def _compiled_kernels(folder: Path, listing: ptx.Listing | None) -> Path:
    """Every kernel as nvcc compiles it, as one C++ file."""
    text = [
        '#include "ptx_ops.h"',
        '#include "count.h"',
        "namespace tokenpool {",
        "namespace cuda {",
        "using namespace ptx;",
    ]
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        output = folder / f"{source.stem}.ptx"
        _run(
            [
                nvcc(),
                "-std=c++17",
                "-O3",
                "-ptx",
                "-lineinfo",
                f"-arch={PTX_ARCHITECTURE}",
                str(source),
                "-o",
                str(output),
            ]
        )
        text += [kernel.text for kernel in ptx.kernels(output.read_text(), listing)]
    written = folder / "kernels.cpp"
    written.write_text("\n".join([*text, "}", "}", ""]))
    return written


def _flags(variant: str) -> list[str]:
    return ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{HERE}", *VARIANTS[variant]]


def built(variant: str) -> Path:
    """Where the simulator of the present source text lies, or will."""
    digest = hashlib.sha256(" ".join([*_flags(variant), *CHECKED, PTX_ARCHITECTURE]).encode())
    for path in sources() + ([*sorted((CSRC / "cuda").glob("*.cu")), HERE / "ptx.py"] if variant in COMPILED else []):
        digest.update(path.name.encode() + path.read_bytes())
    return cache_folder() / f"sim{'_' + variant if variant else ''}_{digest.hexdigest()[:16]}.so"


def build(variant: str | None = None) -> Path:
    """Compile the simulator (once per source text) and return the shared library."""
    variant = default_variant() if variant is None else variant
    library = built(variant)
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        units = [str(path) for path in sources() if path.suffix == ".cpp"]
        fresh = Path(folder) / library.name
        if variant in COMPILED:
            listing = ptx.Listing() if variant == "count" else None
            units.append(str(Path(folder) / "kernels.o"))
            _run([compiler(), *_flags(variant), "-c", str(_compiled_kernels(Path(folder), listing)), "-o", units[-1]])
            if listing is not None:
                library.with_suffix(".json").write_text(
                    json.dumps({"blocks": listing.blocks, "instructions": listing.instructions})
                )
        _run([compiler(), *_flags(variant), *CHECKED, "-o", str(fresh), *units])
        os.replace(fresh, library)
    return library


def passed_in_a_process(folder: Path, variant: str, *arguments: str, **variables: str) -> list[str]:
    """Run pytest in a process of its own, on one variant; names of the tests that passed. RuntimeError if any
    failed."""
    report = folder / "report.xml"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TOKENPOOL_EXT_REQUIRE_")}
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment.update(PYTHONPATH=paths, TOKENPOOL_EXT_CUDA_SIM_VARIANT=variant, OMP_NUM_THREADS="1", **variables)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments],
        env=environment,
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-8000:])
    return [
        case.get("name")
        for case in ElementTree.parse(report).iter("testcase")
        if not any(child.tag in ("skipped", "failure", "error") for child in case)
    ]


def shared_bodies_pass(folder: Path, variant: str) -> None:
    """The test bodies every backend shares, on all four paths: as many cases as it takes for every value of every
    parameter to occur."""
    bodies = [str(HERE.parent / f"test_{name}.py") for name in ("clustering", "pool", "attention_received")]
    passed = passed_in_a_process(folder, variant, "-p", "sim_plugin", *bodies, TOKENPOOL_EXT_TEST_COVER="1")
    assert len(passed) >= 200, len(passed)
    for path in PATHS:
        assert sum(f"cuda_sim_{path}" in name for name in passed) >= 40, path


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
        centers, assignment, mass, _, inertia = self._cluster(
            x, weights, mask, counts, init, num_clusters, num_iters, sort, False
        )
        return centers, assignment, mass, inertia

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
