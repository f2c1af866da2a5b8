"""Benchmarks of tokenpool_ext. Run ``python -m bench --help`` at the repository root."""
