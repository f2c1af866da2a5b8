"""``python -m bench.evidence STUDY [options]``: the studies of docs/evidence.md, and their tables and figures."""

from __future__ import annotations

import importlib
import sys

STUDIES = (
    "cost",
    "one_line",
    "images",
    "reconstruction",
    "lowpass",
    "positions",
    "text",
    "speech",
    "schedules",
    "latency",
    "train",
    "report",
)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in STUDIES:
        print(f"{__doc__}\n\nSTUDY: {', '.join(STUDIES)}; each has --help", file=sys.stderr)
        return 2
    return importlib.import_module(f"{__package__}.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
