"""What the compiled libraries want of a system, and that they hold nothing of torch's C++ interface."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import tokenpool_ext
from tokenpool_ext import loader

FOLDER = Path(tokenpool_ext.__file__).parent
pytestmark = [
    pytest.mark.skipif(loader.ops_reason is not None, reason=str(loader.ops_reason)),
    pytest.mark.skipif(shutil.which("nm") is None or shutil.which("readelf") is None, reason="binutils are absent"),
]
# manylinux_2_28
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
LIBRARIES = [path for path in sorted(FOLDER.glob("*.so")) if path.name.startswith(("_ops", "_C", "_cuda"))]


def output(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


@pytest.fixture(params=LIBRARIES, ids=lambda path: path.name.split(".")[0])
def library(request):
    return request.param


def test_runs_on_old_systems(library):
    if library.name.startswith("_cuda"):
        pytest.skip("built for the system it is built on")
    for name, version in re.findall(r"@+(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", output("nm", "-D", library)):
        assert tuple(map(int, version.split("."))) <= NEWEST[name], f"{library.name} wants {name}_{version}"


def test_wants_only_the_stable_interface_of_torch(library):
    wanted = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", library).splitlines()]
    assert not [name for name in wanted if re.match(r"_Z\w*?N?K?(3c10|2at|5torch)", name)]
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", library))
    assert not [name for name in needed if name.startswith(("libc10", "libtorch_python", "libcudart", "libpython"))]


def test_holds_no_debug_information(library):
    if library.name.startswith("_cuda"):
        pytest.skip("nvcc's own")
    assert ".debug_info" not in output("readelf", "-S", "-W", library)


def test_the_operators_hold_no_python():
    ops = FOLDER / "_ops.so"
    names = [line.split()[-1] for line in output("nm", "-D", ops).splitlines()]
    assert not [name for name in names if name.startswith(("Py", "_Py"))]
    assert all("tokenpool" in name for name in re.findall(r" T (\S+)", output("nm", "-D", ops)))


def test_works_without_the_introspection_module(monkeypatch):
    """A Python for which _C was not built has the same operators."""
    import torch

    x = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(2, 30, generator=torch.Generator().manual_seed(1))
    whole = tokenpool_ext.kmeans(x, 7, weights=weights, init="topk")
    monkeypatch.setattr(loader, "extension", None)
    monkeypatch.setattr(loader, "extension_reason", "not built for this Python")
    assert tokenpool_ext.backends()["cpu"] == "ok"
    bare = tokenpool_ext.kmeans(x, 7, weights=weights, init="topk", backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(whole, bare) if a is not None)
    with pytest.raises(RuntimeError, match="not built for this Python"):
        tokenpool_ext.explain(2, 30, 7, 8)
