"""What the Triton backend would launch, for real sizes, without a GPU: launches are recorded on the meta device.

A meta tensor has no values, so any synchronisation (reading a value on the host) would raise here.
"""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from tokenpool_ext.triton import clustering, heuristics, launch, segments

VIT = (
    (196, 192, 98),
    (196, 384, 98),
    (256, 384, 128),
    (196, 768, 49),
    (576, 768, 288),
    (256, 1024, 64),
    (576, 1024, 64),
    (1030, 128, 343),
)
LONG = ((4096, 320, 1024), (75600, 128, 1000))
DEVICES = tuple(
    heuristics.Device(sm, kib * 1024)
    for sm, kib in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99), (75, 64), (0, 64))
)
ITERATION = {"assign_kernel", "settle_kernel", "update_kernel"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def recorded(
    B,
    N,
    D,
    K,
    num_iters=5,
    dtype=torch.bfloat16,
    medoids=False,
    centers=False,
    weighted=True,
    farthest=False,
    per_image=False,
):
    init = meta(B, K, D) if centers else meta(B, 0 if farthest else K, dtype=torch.int64)
    with launch.record() as launches:
        clustering.cluster(
            meta(B, N, D, dtype=dtype),
            meta(B, N) if weighted else None,
            meta(B, N, dtype=torch.bool),
            meta(B, dtype=torch.int64) if per_image else None,
            init,
            K,
            num_iters,
            True,
            medoids,
        )
    return launches


def counts(launches):
    names = [one.kernel.fn.__name__ for one in launches]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize("medoids", (False, True))
@pytest.mark.parametrize("shape", VIT + LONG, ids=str)
def test_launches(shape, medoids):
    """At most three launches an iteration and one for the first by differences, none per cluster, seven around them; no
    host synchronisation (meta)."""
    N, D, K = shape
    for num_iters in (1, 5):
        launches = recorded(2, N, D, K, num_iters, medoids=medoids)
        found = counts(launches)
        looped = sum(found.get(name, 0) for name in ITERATION)
        which, _ = heuristics.path(N, K, num_iters)
        assert looped == (0 if which == "gram" else 3 * num_iters + 1)
        assert len(launches) - looped <= 7
        plan = heuristics.plan(2, N, K, D, torch.bfloat16, num_iters)
        assert len(launches) == plan.launches_before + plan.launches_per_iteration * num_iters + plan.launches_after
        assert plan.path == which and str(plan)


def test_launches_do_not_depend_on_k_or_the_batch():
    one = len(recorded(1, 4096, 64, 16))
    assert len(recorded(1, 4096, 64, 1024)) == one
    assert len(recorded(512, 4096, 64, 16)) == one


def test_given_centers_on_the_gram_path_cost_two_more_launches():
    assert len(recorded(2, 196, 384, 98, centers=True)) == len(recorded(2, 196, 384, 98)) + 2


@pytest.mark.parametrize("medoids", (False, True))
@pytest.mark.parametrize("shape", VIT + LONG, ids=str)
def test_the_farthest_start_costs_one_more_launch(shape, medoids):
    """Whatever K is, and without a synchronisation (meta)."""
    N, D, K = shape
    for k in (K, 3):
        plain, farthest = (recorded(2, N, D, k, medoids=medoids, farthest=f) for f in (False, True))
        assert len(farthest) == len(plain) + 1
        name = "farthest_kernel" if heuristics.path(N, k, 5)[0] == "direct" else "farthest_gram_kernel"
        assert counts(farthest)[name] == 1 and [one.programs for one in farthest if one.kernel.fn.__name__ == name] == [
            2
        ]


@pytest.mark.parametrize("B", (1, 8, 70000))
def test_plans_do_not_depend_on_the_batch(B):
    """Same kernels, same tiles and same flags for an image, whatever the batch: so the same rounding."""
    for N, D, K in ((196, 384, 98), (300, 64, 8)):
        launches, single = recorded(B, N, D, K, dtype=torch.float32), recorded(1, N, D, K, dtype=torch.float32)
        for many, one in zip(launches, single):
            assert many.kernel is one.kernel and many.config == one.config
            flags = [p.name for p in one.kernel.params if p.is_constexpr and p.name in one.arguments]
            assert [many.arguments[f] for f in flags] == [one.arguments[f] for f in flags]
        assert all(one.programs <= 2**31 - 1 for one in launches)


def plans(launches):
    """Kernels, tiles and flags, in order."""
    return [
        (one.kernel.fn.__name__, one.config, {k: v for k, v in one.arguments.items() if isinstance(v, (bool, str))})
        for one in launches
    ]


@pytest.mark.parametrize("medoids", (False, True))
@pytest.mark.parametrize("N", (60, 400, 1536, 1537, 5000))
def test_plans_do_not_depend_on_the_largest_k_of_the_batch(N, medoids):
    """With per-image K the largest one belongs to a batch mate: same kernels, tiles and flags whatever it is."""
    few, many = (recorded(2, N, 32, K, 2, torch.float32, medoids, per_image=True) for K in (1, N))
    assert plans(few) == plans(many)
    which, _ = heuristics.path(N, 3, 2, per_image=True)
    plan = heuristics.plan(2, N, 3, 32, torch.float32, 2, per_image=True)
    assert which == plan.path == ("gram" if N <= 1536 else "direct")
    assert ("gram_kernel" in counts(few)) == (which == "gram")


@pytest.mark.parametrize("N", (60, 5000))
def test_sums_do_not_depend_on_k(N):
    """Of one path: the order of additions is the same for every K, so per-image K may equal a call with that K."""
    (small, large), _ = ([recorded(2, N, 300, K, 9) for K in pair] for pair in ((20, 50), (1, 2)))
    assert plans(small) == plans(large)
    x, a = meta(2, N, 300), meta(2, N, dtype=torch.int64)
    pooled = []
    for K in (1, N):
        with launch.record() as launches:
            segments.segment(x, a, None, K, True)
        pooled.append(plans(launches))
    assert pooled[0] == pooled[1]


@pytest.mark.parametrize("medoids", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((1, 5, 4096, 2), (3, 196, 384, 98), (2, 2000, 64, 16), (2, 5000, 3, 40)), ids=str)
def test_workspace_is_what_is_allocated(shape, dtype, medoids):
    B, N, D, K = shape
    storages = {}
    for one in recorded(*shape, dtype=dtype, medoids=medoids):
        for name, value in one.arguments.items():
            if isinstance(value, torch.Tensor) and name not in ("x", "weights", "mask", "init"):
                storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    said = heuristics.plan(B, N, K, D, dtype, algorithm="kmedoids" if medoids else "kmeans").workspace_bytes
    assert said <= sum(storages.values()) <= said + 64  # and arguments of one element that are not used


def test_gram_memory_is_bounded():
    launches = recorded(1024, 1030, 128, 343)
    grams = [one.arguments["gram"] for one in launches if one.kernel.fn.__name__ == "gram_kernel"]
    assert len(grams) > 1 and sum(g.shape[0] for g in grams) == 1024
    assert all(g.numel() * 4 <= heuristics.GRAM_BYTES_LIMIT for g in grams)


@pytest.mark.parametrize("shape", VIT + LONG, ids=str)
def test_nothing_of_size_n_by_k_in_memory(shape):
    N, D, K = shape
    direct = heuristics.path(N, K, 5)[0] == "direct"
    for one in recorded(2, N, D, K):
        for name, value in one.arguments.items():
            if isinstance(value, torch.Tensor) and name != "gram":
                assert value.numel() <= 2 * max(N * D, K * D, 2 * K, N), name
                assert not (direct and value.shape[-2:] in ((N, K), (K, N)) and D != K), name


@pytest.mark.parametrize("shape", VIT + LONG, ids=str)
def test_bytes_moved(shape):
    """Bytes through L2 of one iteration, against what eager PyTorch moves at least: the tokens and an N x K matrix
    written and read twice (product, argmin) and the one-hot sums."""
    N, D, K = shape
    plan = heuristics.plan(1, N, K, D, torch.bfloat16)
    eager = 2 * N * D * 2 + 4 * 4 * N * K
    assert plan.bytes_per_iteration < 3 * eager
    if plan.path == "gram":
        assert 5.8 * N * N < plan.bytes_per_iteration < 6 * N * N + 10**6


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_tiles_fit_the_shared_memory(device):
    """Every config offered for a device fits its limit, for every dtype and feature count; never an empty list."""
    for D in (1, 3, 15, 16, 64, 80, 128, 384, 1536, 4096):
        for itemsize in (2, 4):
            for configs, estimate in (
                (heuristics.assign_configs(device, D, itemsize), heuristics.shared_assign),
                (heuristics.gram_configs(device, D, itemsize), heuristics.shared_gram),
                (heuristics.attention_configs(device, D, itemsize), heuristics.shared_attention),
            ):
                assert configs
                for config in configs:
                    assert estimate(config, itemsize) <= device.shared
                    tiles = [v for k, v in config.items() if k in ("BN", "BK", "BD", "BM", "BQ")]
                    assert all(
                        t >= 16 and t & (t - 1) == 0 for t in tiles
                    )  # tensor cores need 16, Triton a power of two


def test_a_tiny_shared_memory_still_gets_a_plan():
    tiny = heuristics.Device(0, 1024)
    assert len(heuristics.assign_configs(tiny, 4096, 4)) == 1
    assert heuristics.assign_configs(tiny, 4096, 4)[0]["BN"] == 16


def all_launches():
    launches = []
    for dtype in DTYPES:
        for shape in ((2, 300, 64, 8), (2, 196, 80, 98)):
            for medoids in (False, True):
                launches += recorded(*shape, dtype=dtype, medoids=medoids)
                launches += recorded(*shape, dtype=dtype, medoids=medoids, farthest=True)
    x, a = meta(2, 9, 5), meta(2, 9, dtype=torch.int64)
    with launch.record() as more:
        centers, mass = segments.segment(x, a, meta(2, 9), 3, True)
        segments.pool_backward(centers, x, centers, a, meta(2, 9), mass)
        segments.unpool(centers, a)
        segments.attention_received(meta(2, 2, 9, 5), meta(2, 2, 9, 5), 0.5, None)
    return launches + more


def test_sizes_are_runtime_values():
    """Only tiles and flags are constexpr, and no size, stride or flag is specialised: one compilation for all
    shapes."""
    allowed = {
        "BN",
        "BK",
        "BD",
        "BM",
        "BQ",
        "BI",
        "BJ",
        "TI",
        "TL",
        "BC",
        "R",
        "BLOCK",
        "BLOCK_E",
        "BLOCK_K",
        "HOLD",
        "PRECISION",
        "CENTER",
        "SCALE",
        "CONTIG",
        "SPLIT",
        "MEDOIDS",
        "SORT",
        "MEAN",
        "FROM_TOKENS",
        "FARTHEST",
        "HAS_X",
        "HAS_MASK",
        "HAS_WEIGHTS",
        "HAS_COUNTS",
        "HAS_INDEX",
        "HAS_TOP",
    }
    kernels = {one.kernel.fn.__name__: one for one in all_launches()}
    assert len(kernels) >= 14
    for name, one in kernels.items():
        for parameter in one.kernel.params:
            if parameter.is_constexpr:
                assert parameter.name in allowed, (name, parameter.name)
            elif not isinstance(one.arguments[parameter.name], torch.Tensor):
                assert parameter.do_not_specialize, (name, parameter.name)


def test_no_autotuning_and_no_float_atomics():
    import tokenpool_ext.triton

    for file in Path(tokenpool_ext.triton.__file__).parent.glob("*.py"):
        text = file.read_text()
        assert "triton.autotune" not in text and ".item()" not in text and "synchronize" not in text, file
        for line in text.splitlines():
            if "atomic_" in line and "tl." in line:
                assert "tl.atomic_add(counts" in line, (file, line)  # int32 counters: order cannot matter


def test_tf32_only_where_the_user_allows_it():
    assert clustering.precision(torch.float32) == "ieee"
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert clustering.precision(torch.float32) == "tf32" and clustering.precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    code = """if True:
        import torch
        from tokenpool_ext.triton import clustering
        for setting in ("tf32", "ieee"):  # after which torch refuses to read the old name, in this process
            torch.backends.cuda.matmul.fp32_precision = setting
            assert clustering.precision(torch.float32) == setting, setting"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imports_go_downward():
    """It knows the exceptions, the ops, and the reference (what has no kernel is composed of torch's operators) of the
    rest of the library; the registry knows the backend."""
    import tokenpool_ext.triton

    for file in Path(tokenpool_ext.triton.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > 1:
                known = [node.module] if node.module else [name.name for name in node.names]
                assert known in (["errors"], ["ops"], ["reference"]), (file, ast.unparse(node))
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "tokenpool_ext" not in ast.unparse(node), (file, ast.unparse(node))


def test_no_module_hides_an_operator():
    """A module of the package is an attribute of it once it is imported, which a call does."""
    import tokenpool_ext.triton as backend
    from tokenpool_ext.ops import SCHEMAS

    modules = {file.stem for file in Path(backend.__file__).parent.glob("*.py")}
    assert modules & set(SCHEMAS) == set()
    assert all(getattr(backend, name) is getattr(torch.ops.tokenpool_ext_triton, name) for name in SCHEMAS)


def test_without_triton_the_reason_is_given():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, tokenpool_ext, tokenpool_ext.triton as t\n"
        "print(t.unavailable()); print(t.why_not('kmeans', torch.zeros(1, 2, 3, device='meta')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    first, second = done.stdout.strip().splitlines()
    assert "cannot be imported" in first and "got one on meta" in second, done.stdout


def test_plan_is_immutable_and_printable():
    plan = heuristics.plan(256, 196, 98, 384, torch.bfloat16, device=DEVICES[3])
    assert "gram path" in str(plan) and "sm_90" in str(plan) and "Not tuned" in str(plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.path = "direct"


def test_explain_counts_what_would_be_launched():
    import tokenpool_ext.triton as backend

    for B, N, D, K in ((4, 196, 384, 98), (400, 1030, 128, 343), (2, 4096, 64, 32)):
        found = backend.explain(B, N, K, D, 5, torch.bfloat16)
        assert found["launches"] == len(recorded(B, N, D, K))
        assert found["flops"] > 0 and found["workspace_bytes"] > 0 and found["path"] in ("gram", "direct")


def test_a_killed_compiler_is_not_a_kernel_that_cannot_compile():
    from triton.runtime.errors import OutOfResources, PTXASError

    assert launch._is_permanent(OutOfResources(1, 2, "shared memory"))
    assert launch._is_permanent(PTXASError("`ptxas` failed with error code 255: unsupported instruction"))
    assert not launch._is_permanent(PTXASError("`ptxas` failed with error code -9"))
    assert not launch._is_permanent(PTXASError("`ptxas` failed with error code 1: No space left on device"))
    assert not launch._is_permanent(OSError("No space left on device"))
