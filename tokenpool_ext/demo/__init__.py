"""``python -m tokenpool_ext demo``: a real pretrained ViT pooled on real photographs. See `main`."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run the demo; ``argv`` as after ``python -m tokenpool_ext demo``. Returns the process's exit status."""
    from .app import main as run

    return run(argv)


__all__ = ["main"]
