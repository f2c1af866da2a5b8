"""Exceptions that several layers know."""


class KernelUnavailable(RuntimeError):
    """A kernel that should run here cannot (it failed to compile, or needs more of a resource than the device has)."""
