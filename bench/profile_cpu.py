"""python -m bench.profile_cpu [N D K [PATH]]: where a clustering's time goes on one core (needs g++ and AVX2).

PATH: 0 gram, 1 direct, 2 streamed; without it the planner's choice.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(sizes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/profile_cpu"
        sources = [str(ROOT / "bench/native/profile_cpu.cpp"), str(ROOT / "csrc/planner.cpp")]
        flags = ["-std=c++17", "-O3", "-fno-math-errno", "-I", str(ROOT / "csrc")]
        subprocess.run(["g++", *flags, *sources, "-o", program], check=True)
        return subprocess.run([program, *sizes]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
