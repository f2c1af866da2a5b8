"""The plain C functions of `_ops.so` (csrc/introspection.cpp), through ctypes: what was built, what would be done,
values in memory, signals. The library is built without Python, so one serves every Python."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_int64, c_void_p

_TEXT_BYTES = 512
_PYTHON = [  # in the order of csrc/introspection.cpp
    *("Py_IsInitialized", "PyGILState_Ensure", "PyGILState_Release", "PyErr_CheckSignals", "PyErr_Fetch"),
    "PyErr_Restore",
]


class Native:
    """The functions of one library. Raises AttributeError where the library is of another version."""

    def __init__(self, path: str):
        library = ctypes.PyDLL(path)  # keeps the lock of the interpreter: each call is short

        def function(name, result, *arguments):
            found = getattr(library, f"tokenpool_{name}")
            found.restype, found.argtypes = result, arguments
            return found

        # (values, count, bytes a value): is one of the float32 or float64 numbers below 0?
        self.any_negative = function("any_negative", c_bool, c_void_p, c_int64, c_int)
        self._extremes = function("extremes", None, c_void_p, c_int64, c_void_p)
        self._fill_largest = function("fill_largest", c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64)
        self._cpu_isa = function("cpu_isa", c_int, c_char_p, c_int)
        self._compiler = function("compiler", c_char_p)
        paths = function("paths", None, c_int, c_char_p, c_int)

        def names(of_cuda: int) -> list[str]:
            text = ctypes.create_string_buffer(_TEXT_BYTES)
            paths(of_cuda, text, _TEXT_BYTES)
            return text.value.decode().split()

        self.cpu_paths, self.cuda_paths = names(0), names(1)  # of csrc/paths.h, in its order
        self._plan_cpu = function("plan_cpu", None, c_void_p, c_void_p, c_char_p, c_int)
        self._plan_cuda = function("plan_cuda", None, c_void_p, c_void_p, c_char_p, c_int)
        self._raise_interruption = function("raise_interruption", None)
        # (indices, images, tokens, clusters): writes evenly spaced token indices, (images, clusters) int64
        self.fill_strided = function("fill_strided", None, c_void_p, c_int64, c_int64, c_int64)
        hear_signals = function("hear_signals", None, c_void_p)
        addresses = [ctypes.cast(ctypes.pythonapi[name], c_void_p).value for name in _PYTHON]
        hear_signals((c_void_p * len(addresses))(*addresses))

    def take_interruption(self) -> BaseException | None:
        """The exception (KeyboardInterrupt) for which a call stopped, once, or None."""
        try:
            self._raise_interruption()
        except BaseException as error:
            return error
        return None

    def build_info(self) -> dict[str, str]:
        """What was compiled, and which instruction set the CPU kernels use here. RuntimeError: none can be used."""
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        if not self._cpu_isa(text, _TEXT_BYTES):
            raise RuntimeError(text.value.decode())
        return {"compiler": self._compiler().decode(), "torch_target": "2.11", "cpu_isa": text.value.decode()}

    def extremes(self, values: int, count: int) -> tuple[int, int]:
        """The least and the largest of the int64 at this address."""
        found = (c_int64 * 2)()
        self._extremes(values, count, found)
        return found[0], found[1]

    def fill_largest(self, indices: int, scores: int, images: int, tokens: int, clusters: int) -> None:
        """Write the indices of the largest of (images, tokens) float32 scores, (images, clusters) int64."""
        if not self._fill_largest(indices, scores, images, tokens, clusters):
            raise MemoryError(f"no memory for {tokens} tokens")

    def plan_cpu(
        self,
        problem: tuple[int, ...],  # the 9 numbers of csrc/introspection.cpp
    ) -> dict:
        """How the CPU backend would compute one image, and why."""
        plan, text = (ctypes.c_double * 5)(), ctypes.create_string_buffer(_TEXT_BYTES)
        self._plan_cpu((c_int64 * 9)(*problem), plan, text, _TEXT_BYTES)
        found = dict(zip(("path", "flops", "workspace_bytes", "gram_ns", "direct_ns"), plan))
        return {**found, "path": self.cpu_paths[int(plan[0])], "reason": text.value.decode()}

    def plan_cuda(
        self,
        problem: tuple[int, ...],  # the 15 numbers of csrc/planner_cuda.h
    ) -> dict:
        """How the CUDA backend would compute a batch on a GPU, and why."""
        plan, text = (c_int64 * 16)(), ctypes.create_string_buffer(_TEXT_BYTES)
        self._plan_cuda((c_int64 * 15)(*problem), plan, text, _TEXT_BYTES)
        return {
            "path": self.cuda_paths[plan[0]],
            "launches": plan[1] * plan[9],
            "workspace_bytes": plan[11],
            "flops": plan[14],
            "bytes": plan[15],
            "reason": text.value.decode(),
        }
