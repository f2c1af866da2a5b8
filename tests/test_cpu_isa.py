"""Every copy of the CPU kernels this processor can run, against the reference; and the refusal of those it cannot."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import tokenpool_ext as tp
from tokenpool_ext import loader

pytestmark = pytest.mark.skipif(loader.extension is None, reason=str(loader.ops_reason))

# (tokens, features, clusters): odd sizes, several panels, features over one depth block, more clusters than a register
# tile
SHAPES = [(1, 1, 1), (37, 7, 5), (50, 3, 50), (130, 200, 40), (96, 16, 3)]


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request, monkeypatch):
    monkeypatch.setenv("TOKENPOOL_EXT_CPU_ISA", request.param)
    try:
        assert loader.extension.build_info()["cpu_isa"] == request.param
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


def test_other_processors_compile_too(tmp_path):
    """The baseline without anything of x86-64: what arm64 gets."""
    compiler, source = shutil.which("g++"), Path(__file__).parent.parent / "csrc"
    if compiler is None or not source.is_dir():
        pytest.skip("needs g++ and the sources")
    shutil.copytree(source, tmp_path / "csrc")
    for name in (tmp_path / "csrc/cpu").glob("*.h"):
        name.write_text(name.read_text().replace("defined(__x86_64__)", "0"))
    subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", str(tmp_path / "csrc/cpu/kernels_baseline.cpp")], check=True
    )


@pytest.mark.parametrize("path", ["gram", "direct", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_clustering(isa, dtype, path, monkeypatch):
    monkeypatch.setenv("TOKENPOOL_EXT_CPU_PATH", path)
    generator = torch.Generator().manual_seed(0)
    for n, d, k in SHAPES:
        x = torch.randn(3, n, d, generator=generator, dtype=torch.float64).to(dtype)
        w = torch.rand(3, n, generator=generator)
        for function in (tp.kmeans, tp.kmedoids):
            ours = function(x, k, weights=w, num_iters=1, backend="cpu")
            expected = function(x, k, weights=w, num_iters=1, backend="reference")
            differ = ours.assignment != expected.assignment
            assert differ.float().mean() < 0.02, (n, d, k)  # ties within rounding
            # 1e-3: a tie within rounding may end in another medoid or mean; random data has few
            torch.testing.assert_close(ours.inertia, expected.inertia, rtol=1e-3, atol=1e-6)
            converged = function(x, k, weights=w, backend="cpu")
            rows = tp.pool(x, converged.assignment, k, weights=w, backend="reference")
            if function is tp.kmeans:
                torch.testing.assert_close(converged.centers, rows)


def test_other_ops(isa):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 45, 19, generator=generator, requires_grad=True)
    w = torch.rand(2, 45, generator=generator, requires_grad=True)
    a = torch.randint(-1, 6, (2, 45), generator=generator)
    grads = {}
    for backend in ("cpu", "reference"):
        y = tp.unpool(tp.pool(x, a, 6, weights=w, backend=backend), a, backend=backend)
        grads[backend] = (y, *torch.autograd.grad((y * torch.arange(19.0)).sum(), (x, w)))
    for ours, expected in zip(*grads.values()):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    q, k = torch.randn(2, 2, 3, 33, 24, generator=generator)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        ours = tp.attention_received(q.to(dtype), k.to(dtype), backend="cpu")
        torch.testing.assert_close(ours, tp.attention_received(q.to(dtype), k.to(dtype), backend="reference"))


def test_half_conversion_is_exact(isa):
    """Every float16 value survives pooling into a cluster of its own, also subnormal and infinite."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = bits[~bits.isnan()].view(1, -1, 1)
    for values in (x, torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(1, -1, 1)):
        values = values[:, ~values[0, :, 0].isnan()]
        a = torch.arange(values.shape[1])[None]
        assert torch.equal(tp.pool(values, a, values.shape[1], backend="cpu"), values)


def test_unknown_isa_is_named(monkeypatch):
    monkeypatch.setenv("TOKENPOOL_EXT_CPU_ISA", "neon9")
    with pytest.raises(ValueError, match="baseline, avx2 or avx512, got neon9"):
        tp.kmeans(torch.randn(4, 2), 2, backend="cpu")
