"""The CUDA library's build: flags, reasons, the assembler's report, and loading it under a CUDA torch. No GPU needed.

With --require=cuda-build the library is built (minutes); without it the tests of a build are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_cuda as builder  # noqa: E402

BUILD = ROOT / "build" / "cuda"
OPS = ("kmeans", "kmedoids", "pool", "pool_backward", "unpool", "unpool_backward", "attention_received")
DEFAULT = {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"}


@pytest.fixture(scope="module")
def library(tmp_path_factory, pytestconfig):
    """The linked library, built for every default architecture."""
    if "cuda-build" not in pytestconfig.getoption("--require"):
        pytest.skip("the CUDA kernels take minutes to build; ask for it with --require=cuda-build")
    reason = builder.cannot_build()
    if reason:
        pytest.fail(reason)
    return builder.build_cuda(str(tmp_path_factory.mktemp("cuda")), build_dir=str(BUILD), say=lambda line: None)


def test_architecture_flags():
    assert builder.arch_flags("8.0;9.0a") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    assert builder.arch_flags("8.9+PTX")[1] == "-gencode=arch=compute_89,code=compute_89"
    assert len(builder.arch_flags(builder.DEFAULT_ARCHS)) == 7
    for bad in ("Hopper", "9", "7.5"):
        with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST"):
            builder.arch_flags(bad)


def test_architectures_follow_the_standard_variable(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0")
    assert [flag.rsplit("=", 1)[1] for flag in builder.arch_flags()] == ["sm_86", "sm_90"]


def test_a_missing_toolkit_is_a_reason_with_a_remedy(monkeypatch):
    monkeypatch.setattr(builder, "find_nvcc", lambda: None)
    assert "install a CUDA toolkit" in builder.cannot_build()
    with pytest.raises(RuntimeError, match="nvcc was not found"):
        builder.build_cuda("/nonexistent")


@pytest.mark.skipif(builder.compiler() is None or not sys.platform.startswith("linux"), reason="no C++ compiler")
def test_what_the_cuda_runtime_calls_is_bound_to_an_old_glibc(tmp_path):
    """glibc 2.34 gave dlsym, pthread_create and others new versions, which older systems lack."""
    calls = ("dlsym", "dlmopen", "pthread_create", "sem_wait", "shm_open")
    source, target = tmp_path / "calls.c", tmp_path / "calls.so"
    source.write_text(
        "".join(f"void {name}(void);\n" for name in calls)
        + "void f(void) {\n"
        + "".join(f"{name}();\n" for name in calls)
        + "}\n"
    )
    stubs = builder._old_glibc(tmp_path)
    flags = [
        "-x",
        "c",
        "-shared",
        "-fPIC",
        "-w",
        "-fno-builtin",
        "-o",
        target,
        source,
        "-x",
        "none",
        *stubs,
        "-lrt",
        "-ldl",
        "-lpthread",
    ]
    subprocess.run([builder.compiler(), *flags], check=True)
    wanted = subprocess.run(["nm", "-D", target], capture_output=True, text=True, check=True).stdout
    for name in calls:
        version = re.search(rf"U {name}@+GLIBC_([\d.]+)", wanted)[1]
        assert tuple(map(int, version.split("."))) <= (2, 28), wanted


@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "for a wheel"])
def test_setup_puts_the_library_beside_the_extension(monkeypatch, tmp_path, inplace):
    """`pip install -e .` and `setup.py build_ext --inplace`, too: setuptools itself copies only the extensions it
    knows of."""
    setuptools = pytest.importorskip("setuptools")
    if builder.compiler() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("MAX_JOBS", "2")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setenv("TOKENPOOL_EXT_CUDA", "auto")
    found = importlib.util.spec_from_file_location("_setup_script", ROOT / "setup.py")
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    folders = []
    monkeypatch.setattr(script.build_cuda, "cannot_build", lambda: None)
    monkeypatch.setattr(script.build_cuda, "build_cuda", lambda folder, say: folders.append(Path(folder)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe.cpp").write_text('extern "C" int PyInit__probe() { return 0; }\n')
    (tmp_path / "tokenpool_ext").mkdir()
    extension = setuptools.Extension(
        "tokenpool_ext._probe", ["probe.cpp"], library_dirs=[os.path.join(builder.torch_folder(), "lib")]
    )
    command = script.Build(setuptools.Distribution({"ext_modules": [extension]}))
    command.inplace = inplace
    command.ensure_finalized()
    command.run()
    assert folders == [ROOT / "tokenpool_ext" if inplace else tmp_path / command.build_lib / "tokenpool_ext"]
    assert bool(list((tmp_path / "tokenpool_ext").glob("_probe.so"))) == inplace


def test_report_parser(tmp_path):
    (tmp_path / "k.log").write_text(
        "ptxas info    : Compiling entry function "
        "'_ZN9tokenpool4cuda11gram_kernelI13__nv_bfloat16EEvNS0_8GramArgsE' for "
        "'sm_90a'\n"
        "ptxas info    : Function properties for x\n    8 bytes stack frame, 4 bytes spill stores, 12 "
        "bytes spill loads\n"
        "ptxas info    : Used 127 registers, used 1 barriers\n"
    )
    assert builder.kernel_resources(str(tmp_path)) == [
        {
            "kernel": "gram_kernel",
            "dtype": "bfloat16",
            "arch": "sm_90a",
            "registers": 127,
            "stack": 8,
            "spill_stores": 4,
            "spill_loads": 12,
        }
    ]


def test_no_kernel_spills_or_uses_a_stack_at_any_architecture(library):
    records = builder.kernel_resources(str(BUILD))
    kernels = {r["kernel"] for r in records}
    assert {
        "resident_kernel",
        "spread_gram_kernel",
        "spread_kernel",
        "gram_kernel",
        "iterate_kernel",
        "assign_kernel",
        "means_kernel",
        "bucket_kernel",
        "farthest_kernel",
    } <= kernels
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        assert {r["arch"] for r in records} == DEFAULT
    bad = [r for r in records if r["stack"] or r["spill_stores"] or r["spill_loads"]]
    assert not bad, f"kernels with a stack or spills: {bad}"
    assert max(r["registers"] for r in records if r["kernel"] == "resident_kernel") <= 128  # two blocks an SM
    for kernel in ("iterate_kernel", "spread_kernel"):
        assert max(r["registers"] for r in records if r["kernel"] == kernel) <= 64  # 1024 threads


def test_nothing_warns(library):
    logs = [BUILD / f"{Path(source).stem}.log" for source in builder.cuda_extension_parameters()["cxx_sources"]]
    logs += [BUILD / f"{name}.cu.log" for name in builder.KERNELS]
    said = [line for log in logs for line in log.read_text().splitlines() if "warning" in line.lower()]
    assert not said, said


def test_library_needs_no_cuda_runtime_and_no_torch_cxx_symbols(library):
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True).stdout
    assert "libcudart" not in dynamic and "libtorch_cuda.so" in dynamic
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True).stdout
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert not [line for line in symbols.splitlines() if "c10" in line or "2at" in line.split("_ZN")[-1][:4]]


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
def test_ops_are_registered_under_a_cuda_torch(library):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, tokenpool_ext\n"
        "from tokenpool_ext import loader\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "assert loader.ops_reason is None, loader.ops_reason\n"
        f"if not has('tokenpool_ext::kmeans', 'CUDA'): torch.ops.load_library({str(library)!r})\n"
        f"assert all(has('tokenpool_ext::' + op, 'CUDA') for op in {OPS!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
