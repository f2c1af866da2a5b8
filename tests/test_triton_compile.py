"""Every Triton kernel compiled to machine code for NVIDIA architectures, without a GPU (ptxas is in the wheel).

Arguments come from recorded launches (as in test_triton_plan.py), so what is compiled is what would run.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from tokenpool_ext.triton import clustering, heuristics, launch, segments  # noqa: E402

KIB = 1024
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
SM80, SM89, SM90, SM120 = (heuristics.Device(sm, kib * KIB) for sm, kib in ((80, 163), (89, 99), (90, 227), (120, 99)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STACK = (
    24 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 40
)  # bytes; Triton 3.6 with its ptxas: 40


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


# CPython's ast.parse, which the compiler's front end calls all the time, is not safe in several threads (up to 3.12, at
# least, it raises SystemError).
front_end = threading.Lock()


@functools.cache
def one_at_a_time():
    """Triton's ASTSource, whose front end waits for its turn."""
    from triton.compiler import ASTSource

    class Source(ASTSource):
        def make_ir(self, *args, **kwargs):
            with front_end:
                return super().make_ir(*args, **kwargs)

    return Source


def source(one: launch.Launch):
    """(source, options): what triton.jit would compile for the launch, pointers 16-byte aligned, numbers
    unspecialised."""
    options = {k: one.config[k] for k in ("num_warps", "num_stages")} | launch.OPTIONS
    values = {**one.arguments, **{k: v for k, v in one.config.items() if k not in options}}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(one.kernel.params):
        value = values.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
    assert not values, f"{one.kernel.fn.__name__} was given arguments it does not have: {sorted(values)}"
    return one_at_a_time()(one.kernel, signature, constants, attributes), options


def compiled(one: launch.Launch, capability: int):
    from triton.backends.compiler import GPUTarget

    kernel_source, options = source(one)
    return triton.compile(kernel_source, target=GPUTarget("cuda", capability, 32), options=options)


def distinct(launches: list[launch.Launch]) -> list[launch.Launch]:
    """Launches that need a compilation each."""
    found = {}
    for one in launches:
        kernel_source, options = source(one)
        key = (one.kernel.fn.__name__, str(kernel_source.signature), str(kernel_source.constants), str(options))
        found.setdefault(key, one)
    return list(found.values())


def flags(one: launch.Launch) -> dict:
    return {k: v for k, v in one.arguments.items() if isinstance(v, bool)} | one.config


def resources(kernel, folder) -> dict[str, int]:
    """{"REG": registers a thread, "STACK": bytes, "LOCAL": bytes (spilled registers), "SHARED": bytes} of the machine
    code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / f"{kernel.metadata.name}.cubin"
    file.write_bytes(kernel.asm["cubin"])
    said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", said)}
    assert set(found) == {"REG", "STACK", "LOCAL", "SHARED"}, said
    return found


def clustering_launches(device, dtype, path, medoids, monkeypatch, D=384, N=196, K=98, centers=False, farthest=False):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    monkeypatch.setattr(heuristics, "device_of", lambda x: device)
    init = meta(2, K, D) if centers else meta(2, 0 if farthest else K, dtype=torch.int64)
    with launch.record() as launches:
        clustering.cluster(
            meta(2, N, D, dtype=dtype), meta(2, N), meta(2, N, dtype=torch.bool), None, init, K, 1, False, medoids
        )
    return launches


def check(launches, device):
    for one in launches:
        kernel = compiled(one, device.capability)
        name = one.kernel.fn.__name__
        assert len(kernel.asm["cubin"]) > 0
        assert kernel.metadata.shared <= device.shared, (name, kernel.metadata.shared)
        for part, estimate in (
            ("assign", heuristics.shared_assign),
            ("gram", heuristics.shared_gram),
            ("received", heuristics.shared_attention),
            ("lse", heuristics.shared_attention),
        ):
            if name == f"{part}_kernel":
                tokens = one.arguments.get("x", one.arguments.get("q"))
                bound = estimate(one.config, tokens.element_size())
                assert kernel.metadata.shared <= bound, f"{name}: {kernel.metadata.shared} bytes, estimated {bound}"
        yield name, kernel


def ptx(kernels, name):
    return next(k for n, k in kernels if n == name).asm["ptx"]


def test_bfloat16_kmeans_on_sm90(monkeypatch):
    """Both paths; the products run on tensor cores, the gram product from vectorised, asynchronous loads."""
    gram = list(check(clustering_launches(SM90, torch.bfloat16, "gram", False, monkeypatch), SM90))
    assert "wgmma" in ptx(gram, "gram_kernel") or "mma.sync" in ptx(gram, "gram_kernel")
    assert "cp.async" in ptx(gram, "gram_kernel")
    direct = list(check(clustering_launches(SM90, torch.bfloat16, "direct", False, monkeypatch), SM90))
    assert "mma" in ptx(direct, "assign_kernel")
    for name in ("gram_kernel", "iterate_kernel", "finish_kernel"):
        assert "st.local" not in ptx(gram, name)
    assert ".v4.b32" in ptx(gram, "iterate_kernel") and ".v4.b32" in ptx(direct, "update_kernel")


def test_float32_kmedoids_on_sm89(monkeypatch):
    """Exact products: no tensor-core instruction anywhere, so no TF32."""
    for path in ("gram", "direct"):
        kernels = list(check(clustering_launches(SM89, torch.float32, path, True, monkeypatch), SM89))
        assert not any("mma" in k.asm["ptx"] for _, k in kernels)


def test_float16_kmeans_on_sm80(monkeypatch):
    """float32 accumulation of half products; given centers; an odd number of features."""
    kernels = list(
        check(clustering_launches(SM80, torch.float16, "gram", False, monkeypatch, D=15, centers=True), SM80)
    )
    assert "f32.f16.f16.f32" in ptx(kernels, "gram_kernel")
    held = list(check(clustering_launches(SM80, torch.float16, "direct", False, monkeypatch, N=5000, D=128), SM80))
    assert "f32.f16.f16.f32" in ptx(held, "assign_kernel")


def pooling_launches(dtype):
    x, a, w = meta(2, 40, 15, dtype=dtype), meta(2, 40, dtype=torch.int64), meta(2, 40)
    q = meta(2, 3, 40, 64, dtype=dtype)
    with launch.record() as launches:
        centers, mass = segments.segment(x, a, w, 6, True)
        segments.pool_backward(centers, x, centers, a, w, mass)
        segments.unpool(centers, a)
        segments.attention_received(q, q, 0.1, None)
    return launches


KERNELS = {
    "x_stats_kernel",
    "prepare_kernel",
    "init_kernel",
    "farthest_kernel",
    "farthest_gram_kernel",
    "gram_kernel",
    "iterate_kernel",
    "exact_kernel",
    "assign_kernel",
    "resolve_kernel",
    "settle_kernel",
    "update_kernel",
    "lists_kernel",
    "finish_kernel",
    "inertia_kernel",
    "labels_kernel",
    "segment_kernel",
    "pool_backward_kernel",
    "unpool_kernel",
    "lse_kernel",
    "received_kernel",
    "heads_kernel",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("device", (SM80, SM89, SM90, SM120), ids=lambda d: f"sm_{d.capability}")
def test_every_kernel(device, dtype, monkeypatch, tmp_path):
    """All kernels, for both algorithms, paths and kinds of start: they compile, fit, and keep what they hold in
    registers."""
    if device is SM120 and dtype != torch.bfloat16:
        pytest.skip("one dtype on the newest architecture bounds the time")
    launches = pooling_launches(dtype)
    for path in ("gram", "direct"):
        launches += clustering_launches(device, dtype, path, False, monkeypatch, centers=True)
        launches += clustering_launches(device, dtype, path, True, monkeypatch, farthest=True)
        launches += clustering_launches(device, dtype, path, False, monkeypatch)
    # tokens that stay in shared memory
    launches += clustering_launches(device, dtype, "direct", True, monkeypatch, D=128, farthest=True)
    launches = distinct(launches)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: compiled(one, device.capability), launches))
    seen = set()
    for one, (name, kernel) in zip(launches, check(launches, device)):  # from the cache
        used = resources(kernel, tmp_path)
        # ptxas puts a few values on the stack to fit one more block on a multiprocessor (40, 80, 128 or 168 registers).
        assert used["LOCAL"] == 0 and used["STACK"] <= STACK, (name, used, flags(one))
        seen.add(name)
    assert seen >= (KERNELS - {"x_stats_kernel"} if dtype == torch.float16 else KERNELS)


# Barriers of the block that the source asks for, where threads read from global memory what others have written:
# (kernel, K-Medoids or not) -> how many, besides those that the compiler adds for shared memory.
BARRIERS = {
    ("iterate_kernel", False): 10,
    ("iterate_kernel", True): 10,
    ("exact_kernel", False): 10,
    ("exact_kernel", True): 15,
    ("update_kernel", False): 3,
    ("update_kernel", True): 5,
    ("settle_kernel", None): 4,
    ("farthest_kernel", None): 2,
    ("farthest_gram_kernel", None): 2,
}


def test_values_go_through_global_memory_across_barriers(monkeypatch):
    """The interpreter runs one thread and would not miss a barrier; a change of these numbers wants a reason."""
    launches = []
    for path in ("gram", "direct"):
        for medoids in (False, True):
            launches += clustering_launches(SM90, torch.bfloat16, path, medoids, monkeypatch, farthest=medoids)
    found = {}
    for one in distinct(launches):
        name, medoids = one.kernel.fn.__name__, one.arguments.get("MEDOIDS")
        if (name, medoids) in BARRIERS:
            asm = compiled(one, 90).asm
            found[name, medoids] = len(re.findall(r"^\s*\w+\.\w*barrier\b", asm["ttir"], re.MULTILINE))
            assert len(re.findall(r"\b(?:bar|barrier)\.sync", asm["ptx"])) >= found[name, medoids]
    assert found == BARRIERS


@pytest.mark.parametrize("device", (SM80, SM89, SM90), ids=("sm_80", "sm_89", "sm_90"))
def test_every_assign_plan_fits(device, monkeypatch):
    """All fallback plans of the kernel that needs most shared memory, not only the preferred one."""
    for dtype in (torch.bfloat16, torch.float32):
        for D in (128,) if device is not SM89 else (128, 384):
            launches = clustering_launches(device, dtype, "direct", False, monkeypatch, D=D, N=5000)
            one = next(x for x in launches if x.kernel.fn.__name__ == "assign_kernel")
            configs = heuristics.assign_configs(device, D, one.arguments["x"].element_size())
            for _ in check([one._replace(config=c) for c in configs[:2]], device):
                pass
