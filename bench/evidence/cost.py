"""``python -m bench.evidence cost``: MACs of the paper's models by component, counted by ``tokenpool_ext.cost``."""

from __future__ import annotations

from dataclasses import asdict

from tokenpool_ext.cost import cost
from tokenpool_ext.models import PLAIN_VITS, build

from . import data


def main(argv=None) -> int:
    rows = []
    for name in PLAIN_VITS:
        found = cost(build(name, "meta"))
        shares = {part: count / found.total for part, count in asdict(found).items()}
        fully = found.fully_connected / found.total
        rows.append({"model": name, "gmacs": found.gmacs, "fully_connected": fully, **shares})
    print(data.save("cost", {}, {"records": rows}))
    return 0
