"""python -m bench.profile_cpu [N D K [PATH]]: where a clustering's time goes on one core (needs g++ and AVX2).

PATH: 0 gram, 1 direct, 2 grouped; without it the planner's choice. The copy of the kernels is the one that a call
takes:
TOKENPOOL_EXT_CPU_ISA=avx2 asks for that one.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .machine import cpu_flags

ROOT = Path(__file__).resolve().parent.parent
AVX2 = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c"}  # as /proc/cpuinfo and as the compiler calls them
AVX512 = {
    **AVX2,
    **{name: f"-m{name}" for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl")},
    "avx512_vnni": "-mavx512vnni",
}
COPIES = {"avx512": AVX512, "avx2": AVX2}
OPTIMISED = "-O3"


def copies() -> list[str]:
    """Those of the kernels' copies that can be profiled here, the best first."""
    return [name for name, needed in COPIES.items() if cpu_flags().issuperset(needed)]


def chosen() -> str:
    asked, here = os.environ.get("TOKENPOOL_EXT_CPU_ISA"), copies()
    if not here or (asked and asked not in here):
        sys.exit(
            f"profile_cpu: this processor can profile {' and '.join(here) or 'no copy of the kernels'}, not "
            f"{asked or 'another'}"
        )
    return asked or here[0]


def main(sizes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/profile_cpu"
        sources = [str(ROOT / "bench/native/profile_cpu.cpp"), str(ROOT / "csrc/planner.cpp")]
        flags = ["-std=c++17", OPTIMISED, "-fno-math-errno", "-I", str(ROOT / "csrc"), *COPIES[chosen()].values()]
        subprocess.run(["g++", *flags, *sources, "-o", program], check=True)
        return subprocess.run([program, *sizes]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
