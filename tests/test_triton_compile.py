"""Every Triton kernel compiled to machine code for three NVIDIA architectures, without a GPU (ptxas is in the wheel).

Arguments come from recorded launches (as in test_triton_plan.py), so what is compiled is what would run.
"""
from __future__ import annotations

import os
import warnings

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from tokenpool_ext.triton import clustering, heuristics, launch, segments  # noqa: E402

KIB = 1024
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
         torch.int64: "*i64", torch.uint8: "*u8"}
SM80, SM89, SM90 = (heuristics.Device(sm, kib * KIB) for sm, kib in ((80, 163), (89, 99), (90, 227)))


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled(one: launch.Launch, capability: int):
    """The launch's kernel, compiled as triton.jit would: pointers 16-byte aligned, numbers unspecialised."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {k: one.config[k] for k in ("num_warps", "num_stages")}
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(ASTSource(one.kernel, signature, constants, attributes),
                              target=GPUTarget("cuda", capability, 32), options=options)


def clustering_launches(device, dtype, path, medoids, monkeypatch, D=384, N=196, K=98, centers=False):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    monkeypatch.setattr(heuristics, "device_of", lambda x: device)
    init = meta(2, K, D) if centers else meta(2, K, dtype=torch.int64)
    with launch.record() as launches:
        clustering.cluster(meta(2, N, D, dtype=dtype), meta(2, N), meta(2, N, dtype=torch.bool), None, init, K, 1, False,
                           medoids)
    return launches


def check(launches, device):
    for one in launches:
        kernel = compiled(one, device.capability)
        name = one.kernel.fn.__name__
        assert len(kernel.asm["cubin"]) > 0
        assert kernel.metadata.shared <= device.shared, (name, kernel.metadata.shared)
        for part, estimate in (("assign", heuristics.shared_assign), ("gram", heuristics.shared_gram),
                               ("received", heuristics.shared_attention), ("lse", heuristics.shared_attention)):
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
    kernels = list(check(clustering_launches(SM80, torch.float16, "gram", False, monkeypatch, D=15, centers=True), SM80))
    assert "f32.f16.f16.f32" in ptx(kernels, "gram_kernel")
    held = list(check(clustering_launches(SM80, torch.float16, "direct", False, monkeypatch, N=5000, D=128), SM80))
    assert "f32.f16.f16.f32" in ptx(held, "assign_kernel")


def test_pooling_and_attention_on_sm80():
    x, a, w = meta(2, 40, 15, dtype=torch.bfloat16), meta(2, 40, dtype=torch.int64), meta(2, 40)
    with launch.record() as launches:
        centers, mass = segments.segment(x, a, w, 6, True)
        segments.pool_backward(centers, x, centers, a, w, mass)
        segments.unpool(centers, a)
        segments.attention_received(meta(2, 3, 40, 64, dtype=torch.bfloat16), meta(2, 3, 40, 64, dtype=torch.bfloat16), 0.1,
                                    None)
    names = [name for name, _ in check(launches, SM80)]
    assert {"labels_kernel", "update_kernel", "segment_kernel", "pool_backward_kernel", "unpool_kernel", "lse_kernel",
            "received_kernel", "heads_kernel"} <= set(names)


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
