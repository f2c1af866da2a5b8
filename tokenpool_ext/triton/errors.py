"""The one exception with which this backend hands a problem back to the registry."""

from __future__ import annotations

from .. import errors


class KernelUnavailable(errors.KernelUnavailable):
    """A Triton kernel could not be compiled or does not fit this GPU, in any of its plans.

    Raised before any output has been produced, so the caller may run the same operation on another backend.
    Never raised for an error of the device itself (an illegal access, a lost GPU) or for running out of memory:
    those reach the user unchanged.

    Attributes: `kernel` (name), `tried` (one line for each plan and why it failed).
    """

    def __init__(self, kernel: str, tried: list[str]):
        self.kernel = kernel
        self.tried = tried
        plans = "; ".join(tried) if tried else "no plan fits"
        super().__init__(f"Triton kernel {kernel} cannot run on this device: {plans}")
