"""Builds tokenpool_ext._C (CPU kernels, op schemas, introspection) and, where nvcc is found, the library _cuda.

Switches: TOKENPOOL_EXT_CUDA=auto|0|1 (1: fail when CUDA cannot be built), TORCH_CUDA_ARCH_LIST, MAX_JOBS.
Neither a GPU nor a network is needed. Without a C++ compiler the package installs without kernels (plain PyTorch).
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
SWITCH = os.environ.get("TOKENPOOL_EXT_CUDA", "auto")
if SWITCH not in ("auto", "0", "1"):
    sys.exit(f"TOKENPOOL_EXT_CUDA must be auto, 0 or 1, got {SWITCH!r}")
os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, 8))))


def say(text):
    print(f"tokenpool_ext: {text}", file=sys.stderr, flush=True)


def cpu_extension():
    import pybind11
    from torch.utils.cpp_extension import CppExtension

    sources = ["csrc/ops.cpp", "csrc/python.cpp", "csrc/planner.cpp", "csrc/planner_cuda.cpp"]
    sources += [f"csrc/cpu/{name}.cpp" for name in ("dispatch", "kernels_baseline", "kernels_avx2", "kernels_avx512")]
    return CppExtension(
        "tokenpool_ext._C",
        sources,
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))],
        include_dirs=[pybind11.get_include()],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],  # one binary for every torch from 2.11 on
        extra_compile_args=["-O3", "-fno-math-errno", "-std=c++17", "-fvisibility=hidden", "-Wall"],
    )


def cuda_builder():
    """tokenpool_ext/_build_cuda.py, loaded by path (importing the package would want what is being built)."""
    path = ROOT / "tokenpool_ext" / "_build_cuda.py"
    spec = importlib.util.spec_from_file_location("_tokenpool_build_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wanted():
    """(extensions, command classes)"""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        if SWITCH == "1":
            sys.exit("tokenpool_ext: TOKENPOOL_EXT_CUDA=1, but no C++ compiler is on PATH; install g++")
        say("no C++ compiler on PATH: installing without compiled kernels (plain PyTorch only)")
        return [], {}
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self):
            self.into_source = self.inplace  # setuptools builds elsewhere first, then copies the extensions it knows of
            super().run()

        def build_extensions(self):
            for extension in self.extensions:
                extension.libraries = ["torch_cpu"]  # the stable ABI lives there; nothing else of torch is linked
            say(f"building _C (CPU kernels: baseline, AVX2, AVX-512) with {os.environ['MAX_JOBS']} jobs")
            super().build_extensions()
            self.build_cuda()

        def build_cuda(self):
            if SWITCH == "0":
                return say("CUDA kernels: not built (TOKENPOOL_EXT_CUDA=0)")
            builder = cuda_builder()
            reason = builder.cannot_build()
            if reason:
                if SWITCH == "1":
                    sys.exit(f"tokenpool_ext: TOKENPOOL_EXT_CUDA=1, but CUDA cannot be built: {reason}")
                return say(f"CUDA kernels: not built ({reason})")
            target = ROOT / "tokenpool_ext" if self.into_source else Path(self.build_lib).resolve() / "tokenpool_ext"
            builder.build_cuda(str(target), say=say)

    return [cpu_extension()], {"build_ext": Build.with_options(use_ninja=True)}


extensions, commands = wanted()
setup(ext_modules=extensions, cmdclass=commands)
