"""The CUDA planner's decisions for every architecture, on a machine without a GPU. Needs only a C++ compiler."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import simulator

import tokenpool_ext

pytestmark = pytest.mark.skipif(simulator.compiler() is None, reason="no C++ compiler on PATH")

ARCHS = {80: (8, 0), 86: (8, 6), 89: (8, 9), 90: (9, 0), 100: (10, 0), 120: (12, 0)}
LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory a block may ask for
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
FIELDS = (
    "path",
    "launches",
    "threads",
    "shared_bytes",
    "chunk",
    "bucket_warps",
    "bucket_in_global",
    "blocks_per_sm",
    "images_per_pass",
    "passes",
    "blocks",
    "workspace_bytes",
    "parts",
    "assign_keeps",
)
SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}  # A100, A10-like, L40S, H100, B200, RTX 5090
VIT_SUITE = [
    (196, 192, 98),
    (196, 384, 98),
    (256, 384, 128),
    (196, 768, 49),
    (576, 768, 288),
    (256, 1024, 64),
    (576, 1024, 64),
    (1030, 128, 343),
    (4096, 320, 1024),
    (75600, 128, 1000),
]


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    library = tmp_path_factory.mktemp("planner") / "planner.so"
    subprocess.run(
        [
            simulator.compiler(),
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-o",
            str(library),
            str(simulator.CSRC / "planner_cuda.cpp"),
        ],
        check=True,
    )
    lib = ctypes.CDLL(str(library))

    def plan(
        n,
        d,
        k,
        *,
        arch=90,
        dtype="bfloat16",
        batch=256,
        iterations=5,
        medoids=False,
        centers=False,
        limit=0,
        force=None,
        sms=None,
        farthest=False,
        per_image_k=False,
    ):
        given = (ctypes.c_int64 * 15)(
            batch,
            n,
            d,
            k,
            iterations,
            DTYPES[dtype],
            medoids,
            centers,
            *ARCHS[arch],
            SMS[arch] if sms is None else sms,
            limit,
            -1 if force is None else simulator.PATHS.index(force),
            farthest,
            per_image_k,
        )
        out, reason = (ctypes.c_int64 * 16)(), ctypes.create_string_buffer(512)
        lib.tokenpool_plan_cuda(given, out, reason, 512)
        result = dict(zip(FIELDS, out))
        result["path"] = simulator.PATHS[result["path"]]
        result["reason"] = reason.value.decode()
        return result

    return plan


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", VIT_SUITE, ids=str)
def test_every_plan_can_be_launched(planner, arch, dtype, shape):
    for medoids in (False, True):
        for centers in (False,) if medoids else (False, True):
            plan = planner(*shape, arch=arch, dtype=dtype, medoids=medoids, centers=centers)
            assert 0 <= plan["shared_bytes"] <= LIMIT[arch] * 1024 - 512
            assert plan["threads"] % 32 == 0 and 32 <= plan["threads"] <= 1024
            assert 1 <= plan["bucket_warps"] <= plan["threads"] // 32
            assert plan["images_per_pass"] * plan["passes"] >= 256 and plan["blocks"] >= 1
            assert plan["workspace_bytes"] <= (512 << 20) * 1.01 or plan["images_per_pass"] == 1
            assert plan["launches"] >= 1 and plan["reason"]
            assert plan["parts"] >= 1 and plan["threads"] % (32 * plan["parts"]) == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_vit_base_shapes_need_one_launch_everywhere(planner, arch):
    for shape in [(196, 192, 98), (196, 384, 98), (196, 768, 49)]:
        plan = planner(*shape, arch=arch)
        assert plan["path"] == "resident" and plan["launches"] == 1 and plan["workspace_bytes"] == 0
        assert plan["blocks_per_sm"] == (2 if arch in (90, 100) else 1)


@pytest.mark.parametrize("arch", [90, 100])
def test_256_tokens_fit_where_shared_memory_is_large(planner, arch):
    assert planner(256, 384, 128, arch=arch)["path"] == "resident"
    assert planner(256, 384, 128, arch=86)["path"] == "gram"


def test_small_shared_memory_leaves_the_resident_path(planner):
    assert planner(196, 384, 98, arch=90, limit=64 * 1024)["path"] == "gram"


@pytest.mark.parametrize("arch", ARCHS)
def test_paths_of_longer_sequences(planner, arch):
    assert planner(576, 768, 288, arch=arch)["path"] == "gram"
    assert planner(75600, 128, 1000, arch=arch)["path"] == "streaming"
    assert planner(4096, 320, 1024, arch=arch)["path"] == "streaming"
    assert "more than" in planner(75600, 128, 1000, arch=arch)["reason"]


def test_few_clusters_and_iterations_take_direct_products(planner):
    assert planner(2048, 64, 2, iterations=1)["path"] == "streaming"
    assert planner(1030, 768, 343)["path"] == "gram"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_batch_decides_only_between_two_paths_of_equal_bits(planner, dtype):
    """An image's result must not change with its batch mates: beside blocks and passes, only resident / spread may."""
    for n, d, k in VIT_SUITE + [(17, 3, 5), (2048, 64, 700)]:
        plans = [planner(n, d, k, batch=batch, dtype=dtype) for batch in (1, 8, 132, 133, 256, 70000)]
        paths = [plan["path"] for plan in plans]
        assert len(set(paths)) == 1 and paths[0] != "resident" or paths == ["spread"] * 3 + ["resident"] * 3
        for some in [plans] if len(set(paths)) == 1 else [plans[:3], plans[3:]]:
            for name in ("threads", "shared_bytes", "chunk", "bucket_warps", "bucket_in_global", "parts"):
                assert len({plan[name] for plan in some}) == 1, name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_images_are_spread_over_the_device(planner, arch, dtype):
    for shape in [(196, 192, 98), (196, 384, 98), (196, 768, 49)]:
        if planner(*shape, arch=arch, dtype=dtype)["path"] != "resident":
            continue  # float32 on small shared memory
        for batch in (1, 8, SMS[arch]):
            plan = planner(*shape, arch=arch, dtype=dtype, batch=batch)
            assert plan["path"] == "spread" and plan["launches"] == (4 if dtype == "float32" else 3)
            assert plan["threads"] == 896 and plan["parts"] == 4 and plan["blocks"] == batch
            assert plan["shared_bytes"] + 1024 <= LIMIT[arch] * 1024
            assert f"{batch} image(s) on {SMS[arch]} multiprocessors" in plan["reason"]
        assert planner(*shape, arch=arch, dtype=dtype, batch=SMS[arch] + 1)["path"] == "resident"


@pytest.mark.parametrize("arch", ARCHS)
def test_a_device_that_is_not_named_has_a_usual_number_of_multiprocessors(planner, arch):
    assert planner(196, 384, 98, arch=arch, batch=8, sms=0)["path"] == "spread"
    assert planner(196, 384, 98, arch=arch, batch=256, sms=0)["path"] == "resident"


def test_explain_says_which_path_a_batch_takes():
    """In a process of its own: a library linked from objects of different versions would crash this one."""
    if tokenpool_ext.backends()["cpu"] != "ok":
        pytest.skip("the compiled extension is absent")
    code = (
        "import torch, tokenpool_ext\n"
        "for b in (1, 256): print(tokenpool_ext.explain(b, 196, 98, 384, dtype=torch.bfloat16, "
        "compute_capability=(9, 0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, f"status {done.returncode}: build _ops.so again from scratch?\n{done.stderr}"
    one, many = done.stdout.splitlines()
    assert "spread path" in one and "3 launches" in one and "1 image(s) on 132 multiprocessors" in one
    assert "resident path" in many and "one launch" in many


def test_spread_launch_parameters(planner):
    for n, threads, parts in [(5, 256, 8), (33, 256, 4), (196, 896, 4), (256, 1024, 4), (300, 960, 3)]:
        plan = planner(n, 384, min(n, 64), batch=1)
        assert (plan["path"], plan["threads"], plan["parts"]) == ("spread", threads, parts)
        assert plan["bucket_warps"] <= (n + 31) // 32
    assert planner(196, 40, 98, batch=1)["chunk"] == 64 and planner(196, 384, 98, batch=1)["chunk"] == 256
    assert planner(196, 40, 98, batch=1, dtype="float32")["chunk"] == 64
    assert planner(196, 384, 98, batch=1, dtype="float32")["chunk"] == 128


def test_iterations_from_a_matrix_in_global_memory_use_a_whole_block(planner):
    assert (planner(576, 768, 288)["threads"], planner(576, 768, 288)["parts"]) == (864, 3)
    assert (planner(1030, 128, 343)["threads"], planner(1030, 128, 343)["parts"]) == (544, 1)


@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_that_iterate_share_the_registers(planner, arch):
    """64 registers a thread, 65536 an SM: blocks of more than 512 threads are alone on it (864 for 576 tokens)."""
    for shape, together in [((576, 768, 288), 1), ((1030, 128, 343), 1), ((350, 768, 175), 1)]:
        plan = planner(*shape, arch=arch, force="gram")
        assert (plan["path"], plan["blocks_per_sm"]) == ("gram", together)
    plan = planner(20, 8, 5, arch=arch, force="gram")
    assert plan["threads"] == 128 and plan["blocks_per_sm"] == 8


def test_farthest_start_costs_launches_only_where_the_tokens_are_too_many(planner):
    for batch in (1, 256):
        for shape in [(196, 384, 98), (576, 768, 288)]:
            assert planner(*shape, batch=batch, farthest=True)["launches"] == planner(*shape, batch=batch)["launches"]
    assert planner(75600, 128, 1000, farthest=True)["launches"] == planner(75600, 128, 1000)["launches"] + 1001


def test_a_huge_batch_runs_in_passes(planner):
    plan = planner(576, 768, 288, batch=70000)
    assert plan["passes"] > 1 and plan["images_per_pass"] * plan["passes"] >= 70000
    assert plan["workspace_bytes"] <= 513 << 20
    assert planner(196, 384, 98, batch=70000)["blocks"] == 70000  # resident: no workspace, one pass


def test_forced_paths(planner):
    for path in simulator.PATHS:
        assert planner(196, 384, 98, force=path)["path"] == path
    assert planner(75600, 128, 1000, force="resident")["path"] == "streaming"  # cannot hold it


def test_many_clusters_count_in_global_memory(planner):
    assert planner(200000, 64, 1000)["bucket_in_global"] == 0
    assert planner(200000, 64, 20000)["bucket_in_global"] == 1


def test_given_centers_add_the_launches_that_assign_to_them(planner):
    assert planner(196, 384, 98, centers=True)["launches"] == 7
    assert planner(196, 384, 98, centers=True, batch=1)["launches"] == 9
    assert planner(576, 768, 288, centers=True)["launches"] == planner(576, 768, 288)["launches"] + 4


def test_streaming_takes_three_launches_an_iteration(planner):
    few, many = planner(75600, 128, 1000, iterations=5), planner(75600, 128, 1000, iterations=6)
    assert many["launches"] - few["launches"] == 3


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_mates_k_changes_no_path(planner, arch, dtype):
    """With a K for each image only the largest is known here, and it may be another image's."""
    differ = 0
    for n, d in ((196, 384), (260, 64), (300, 768), (576, 768), (1030, 128), (2048, 64), (4096, 320)):
        paths = {planner(n, d, k, arch=arch, dtype=dtype, per_image_k=True)["path"] for k in (1, 4, n // 2, n)}
        assert len(paths) == 1, (n, d, paths)
        differ += len({planner(n, d, k, arch=arch, dtype=dtype)["path"] for k in (1, 4, n // 2, n)}) > 1
    assert differ, "no shape here whose path depends on K"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_assign_keeps_tokens_where_they_cost_no_block(planner, arch, dtype):
    keeps = [
        planner(75600, d, 1000, arch=arch, dtype=dtype, batch=32)["assign_keeps"]
        for d in (64, 128, 256, 512, 1024, 4096)
    ]
    assert keeps == sorted(keeps, reverse=True) and not keeps[-1]
    assert keeps[1] or dtype == "float32"
