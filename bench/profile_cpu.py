"""python -m bench.profile_cpu [N D K [PATH]]: where a clustering's time goes on one core (needs g++ and AVX2).

PATH: 0 gram, 1 direct, 2 streamed; without it the planner's choice. The copy of the kernels is the one that a call takes:
TOKENPOOL_EXT_CPU_ISA=avx2 asks for that one.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .machine import cpu_flags

ROOT = Path(__file__).resolve().parent.parent
AVX2 = ("avx2", "fma", "f16c")
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")


def target() -> tuple[str, ...]:
    """The compiler's names of the instructions to profile with."""
    asked, flags = os.environ.get("TOKENPOOL_EXT_CPU_ISA"), cpu_flags()
    return AVX2 + AVX512 if asked == "avx512" or (not asked and flags.issuperset(name.replace("vnni", "_vnni") for name in AVX512)) else AVX2


def main(sizes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/profile_cpu"
        sources = [str(ROOT / "bench/native/profile_cpu.cpp"), str(ROOT / "csrc/planner.cpp")]
        flags = ["-std=c++17", "-O3", "-fno-math-errno", "-I", str(ROOT / "csrc"), *(f"-m{name}" for name in target())]
        subprocess.run(["g++", *flags, *sources, "-o", program], check=True)
        return subprocess.run([program, *sizes]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
