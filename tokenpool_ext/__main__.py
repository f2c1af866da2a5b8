"""python -m tokenpool_ext info | doctor | demo | cost | bench-model [options]"""

from __future__ import annotations

import os
import platform
import sys

import torch

from . import __version__, loader
from .backends import ENVIRONMENT, backends

USAGE = """usage: python -m tokenpool_ext COMMAND

  info          versions, backends and, for each absent one, why
  doctor        info, a plan, and a short self-test of every backend: for bug reports
  demo          pool a pretrained ViT on real photos: a table and pictures (see demo --help)
  cost          multiply-accumulates of a model by component, whole and pooled (see cost --help)
  bench-model   how much faster a model is when pooled (see bench-model --help)
"""


def info() -> int:
    print(
        f"tokenpool_ext {__version__}, torch {torch.__version__}, python {platform.python_version()}, "
        f"{platform.platform()}"
    )
    if loader.extension is not None:
        built = loader.extension.build_info()
        print(f"compiled extension: g++ {built['compiler']}, CPU kernels for {built['cpu_isa']}")
    print(f"threads: {torch.get_num_threads()}")
    if torch.cuda.is_available():
        print(
            f"GPU: {torch.cuda.get_device_name()}, compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}"
        )
    print("backends, in order of preference:")
    for name, state in backends().items():
        print(f"  {name:10} {state}")
    asked = os.environ.get(ENVIRONMENT)
    if asked:
        print(f"{ENVIRONMENT}={asked} asks for this one in every call")
    return 0


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else "--help"
    if command == "info":
        return info()
    if command == "doctor":
        from . import doctor

        info()
        return doctor.main()
    if command == "demo":
        from . import demo

        return demo.main(argv[1:])
    if command == "cost":
        from .cost import main as cost

        return cost(argv[1:])
    if command == "bench-model":
        from . import bench_model

        return bench_model.main(argv[1:])
    print(USAGE, end="", file=sys.stdout if command in ("-h", "--help", "help") else sys.stderr)
    return 0 if command in ("-h", "--help", "help") else 2


if __name__ == "__main__":
    sys.exit(main())
