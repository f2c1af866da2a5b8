"""python -m bench.profile_cpu [N D K]: where a clustering's time goes on one core (needs g++ and AVX2)."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(sizes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/profile_cpu"
        sources = [str(ROOT / "bench/native/profile_cpu.cpp"), str(ROOT / "csrc/planner.cpp")]
        subprocess.run(["g++", "-std=c++17", "-O3", "-fno-math-errno", "-I", str(ROOT / "csrc"), *sources, "-o", program], check=True)
        return subprocess.run([program, *sizes]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
