"""Builds tokenpool_ext/_ops.so (op schemas, CPU kernels; no Python in it, so one wheel serves every Python) and, where
nvcc is found, the library _cuda.

Switches: TOKENPOOL_EXT_CUDA=auto|0|1 (1: fail when CUDA cannot be built), TORCH_CUDA_ARCH_LIST, MAX_JOBS.
Neither a GPU nor a network is needed, and of torch only the headers of its stable ABI and libtorch_cpu to link with.
Without a C++ compiler the package installs without kernels (plain PyTorch).
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))
import build_cuda  # noqa: E402
from build_backend import torch_folder  # noqa: E402

SWITCH = os.environ.get("TOKENPOOL_EXT_CUDA", "auto")
JOBS = int(os.environ.get("MAX_JOBS") or max(1, min(os.cpu_count() or 1, 8)))


def say(text):
    print(f"tokenpool_ext: {text}", file=sys.stderr, flush=True)


def cpu_library():
    """_ops. What it wants of libstdc++ and glibc is what a manylinux_2_28 system has: csrc/portable.h."""
    torch = torch_folder()
    sources = [f"cpu/{name}" for name in ("kernels_avx512", "kernels_avx2", "kernels_baseline", "dispatch")]
    sources += ["ops", "introspection", "planner", "planner_cuda", "portable"]
    flags = ["-O3", "-g0", "-fno-math-errno", "-std=c++17", "-fno-semantic-interposition", "-Wall", "-Wextra"]
    return Extension(
        "tokenpool_ext._ops",
        [f"csrc/{name}.cpp" for name in sources],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))],
        define_macros=[("TORCH_TARGET_VERSION", build_cuda.TARGET_VERSION)],  # one binary for every torch from there on
        extra_compile_args=[*flags, *build_cuda.PORTABLE, "-isystem", os.path.join(torch, "include")],
        library_dirs=[os.path.join(torch, "lib")],
        libraries=["torch_cpu"],  # the stable ABI lives there; nothing else of torch is linked
        extra_link_args=["-Wl,-soname,_ops.so", f"-Wl,--version-script={ROOT / 'csrc' / 'ops.map'}"],
        language="c++",
    )


class Wheel(bdist_wheel):
    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])  # the libraries are no modules of Python


class Build(build_ext):
    def run(self):
        self.into_source = self.inplace  # setuptools builds elsewhere first, then copies the extensions it knows of
        super().run()

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"  # without the Python's tag

    def get_export_symbols(self, ext):
        return ext.export_symbols  # there is no PyInit

    def build_extensions(self):
        say(f"building the CPU kernels (baseline, AVX2, AVX-512) with {JOBS} jobs; torch from {torch_folder()}")
        self.compile_in_parallel()
        super().build_extensions()
        self.build_cuda()

    def compile_in_parallel(self):
        """setuptools compiles the files of an extension one after another: compile them at once, then hand them out."""
        compile_one = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor(JOBS) as pool:
                return [found for done in pool.map(lambda s: compile_one([s], **options), sources) for found in done]

        self.compiler.compile = compile_all

    def build_cuda(self):
        if SWITCH == "0":
            return say("CUDA kernels: not built (TOKENPOOL_EXT_CUDA=0)")
        reason = build_cuda.cannot_build()
        if reason:
            return say(f"CUDA kernels: not built ({reason})")
        target = ROOT / "tokenpool_ext" if self.into_source else Path(self.build_lib).resolve() / "tokenpool_ext"
        build_cuda.build_cuda(str(target), say=say)


def extensions():
    if SWITCH not in ("auto", "0", "1"):
        sys.exit(f"TOKENPOOL_EXT_CUDA must be auto, 0 or 1, got {SWITCH!r}")
    reason = build_cuda.cannot_build() if SWITCH == "1" else None
    if reason:
        sys.exit(f"tokenpool_ext: TOKENPOOL_EXT_CUDA=1, but CUDA cannot be built: {reason}")
    if not build_cuda.compiler():
        say("no C++ compiler on PATH: installing without compiled kernels (plain PyTorch only)")
        return []
    if not torch_folder():  # asked only for what the build needs, where it will be there
        return []
    return [cpu_library()]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
