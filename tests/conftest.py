"""Which backends are tested, and all rules about GPUs.

Every test that takes the fixture `backend` runs once per backend present on this machine:

* `reference` and `cpu` (the planner's choice, and each path forced) on CPU tensors;
* `cuda` and `triton` on CUDA tensors when a GPU is there;
* with TRITON_INTERPRET=1 in the environment: `triton` alone (with its paths as `cpu`), on CPU tensors, small shapes
only.

An absent backend is named with its reason in pytest's header.  Options: --require=cpu,cuda turns absence into failure,
so that a run with everything skipped cannot look green (cuda-build: the CUDA library is built, which takes minutes);
--backends=name,name tests only these; --hypothesis-profile=deep tries more examples; --seed-shift=N draws other random
inputs; --simulator runs on the CUDA kernels' source alone (simulator/README.md); --cover keeps of every body that takes
a backend only as many cases as it needs for each value of each parameter to occur.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from helpers import Target

import tokenpool_ext

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# The same examples on every run and machine; the number is bounded so that the whole suite stays under minutes.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, print_blob=True)
settings.register_profile("deep", deadline=None, max_examples=500)
settings.register_profile("interpreter", parent=settings.get_profile("ci"), max_examples=3)  # of each path
settings.load_profile("interpreter" if INTERPRET else "ci")


def _targets() -> list[Target]:
    present = tokenpool_ext.backends()
    found = []
    if INTERPRET:
        if present.get("triton") == "ok":
            path = "TOKENPOOL_EXT_TRITON_PATH"
            found += [
                Target("triton"),
                Target("triton", env=((path, "gram"),)),
                Target("triton", env=((path, "direct"),)),
            ]
    else:
        found.append(Target("reference"))
        if present.get("cpu") == "ok":
            path = "TOKENPOOL_EXT_CPU_PATH"
            found += [Target("cpu"), Target("cpu", env=((path, "gram"),)), Target("cpu", env=((path, "direct"),))]
        if torch.cuda.is_available():
            found += [Target(name, "cuda") for name in ("cuda", "triton") if present.get(name) == "ok"]
    return found


TARGETS = _targets()


def named(config, option: str, *more: str) -> list[str]:
    """The names in a comma-separated option: backends, or one of ``more``."""
    names = [name for name in config.getoption(option).split(",") if name]
    known = (*tokenpool_ext.backends(), *more)
    if not set(names) <= set(known):
        raise pytest.UsageError(f"{option}: expected names among {','.join(known)}, got {','.join(names)}")
    return names


def missing(config) -> list[str]:
    """Backends this run requires but this machine lacks, with the reason."""
    present, names = tokenpool_ext.backends(), {t.name for t in TARGETS}
    required = [name for name in named(config, "--require", "cuda-build") if name != "cuda-build"]
    required += ["triton"] if INTERPRET else []
    return [f"{name}: {present[name]}" for name in required if name not in names]


def pytest_addoption(parser):
    paths = dict(nargs="?", const="all", metavar="PATHS")
    parser.addoption("--require", default="", metavar="NAMES", help="fail where one is absent: backends, cuda-build")
    parser.addoption("--backends", default="", metavar="NAMES", help="test only these backends")
    parser.addoption("--simulator", **paths, help="test the CUDA kernels' source on the CPU: all paths, or a list")
    parser.addoption("--seed-shift", type=int, default=0, metavar="N", help="other random inputs: every seed moved")
    parser.addoption("--cover", action="store_true", help="the fewest cases in which every parameter's values occur")


def _shift_seeds(shift: int) -> None:
    """Every seed that a test (or what it calls in this process) hands to torch or NumPy, and Hypothesis' own."""
    torch_seed, numpy_generator, Generator = torch.manual_seed, np.random.default_rng, torch.Generator

    class AnyGenerator(type(Generator)):
        def __instancecheck__(self, value):
            return isinstance(value, Generator)

    class ShiftedGenerator(Generator, metaclass=AnyGenerator):
        def manual_seed(self, seed):
            return super().manual_seed(seed + shift)

    torch.Generator = ShiftedGenerator
    torch.manual_seed = lambda seed: torch_seed(seed + shift)
    np.random.default_rng = lambda seed=None: numpy_generator(seed + shift if isinstance(seed, int) else seed)
    torch.manual_seed(0)  # for tests that draw without a seed
    settings.register_profile("shifted", settings(), derandomize=False, database=None)
    settings.load_profile("shifted")
    hypothesis.core.global_force_seed = shift


def pytest_configure(config):
    if config.getoption("--seed-shift"):
        _shift_seeds(1000 * config.getoption("--seed-shift"))  # so that a shifted seed is not another test's
    if config.getoption("--simulator"):
        from simulator.plugin import targets

        TARGETS[:] = targets(config.getoption("--simulator"))
    named(config, "--require", "cuda-build")  # refused at once where a name is unknown
    chosen = named(config, "--backends")
    if chosen:
        TARGETS[:] = [target for target in TARGETS if target.name in chosen]
    config.addinivalue_line(
        "markers", "large: shapes too large for Triton's interpreter and the simulator; skipped there"
    )
    config.addinivalue_line("markers", "one_path: a backend's path makes no difference; not repeated for each")
    config.addinivalue_line("markers", "each_path: a backend with each path forced, not the planner's choice as well")
    config.addinivalue_line("markers", "kernels: a promise of backends with kernels; not made by the reference")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")


def pytest_report_header(config):
    lines = ["tokenpool_ext backends tested: " + (", ".join(t.id for t in TARGETS) or "none")]
    tested = {t.name for t in TARGETS}
    for name, state in tokenpool_ext.backends().items():
        if name not in tested:
            lines.append(f"  not tested: {name}: {state if state != 'ok' else 'ok, but no device for it in this run'}")
    lines += [f"  REQUIRED BUT ABSENT: {line}" for line in missing(config)]
    return lines


def _cover(items: list) -> list:
    """Of the cases of one body the fewest, greedily, in which every value of every parameter occurs."""
    values = {id(item): {(name, repr(value)) for name, value in item.callspec.params.items()} for item in items}
    missing = set().union(*values.values())
    chosen = []
    while missing:
        chosen.append(max(items, key=lambda item: len(missing & values[id(item)])))
        missing -= values[id(chosen[-1])]
    return chosen


def _too_large(item) -> bool:
    return bool((INTERPRET or item.config.getoption("--simulator")) and item.get_closest_marker("large"))


def _runs(item) -> bool:
    """Whether a case of a shared body is more than a skip: not too large here, and of a dtype its backend takes."""
    parameters = item.callspec.params
    refused = parameters.get("dtype") is not None and parameters["dtype"] not in parameters["backend"].dtypes
    return not refused and not _too_large(item)


def _keep_cover(config, items: list) -> None:
    bodies = {}
    for item in items:
        if "backend" in item.fixturenames and _runs(item):
            bodies.setdefault((item.path, item.originalname), []).append(item)
    kept = {id(item) for cases in bodies.values() for item in _cover(cases)}
    kept |= {id(item) for item in items if item.path.name == "test_triton_cases.py"}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def pytest_collection_modifyitems(config, items):
    if config.getoption("--cover"):
        _keep_cover(config, items)
    for item in items:
        if _too_large(item):
            item.add_marker(pytest.mark.skip(reason="too large for an interpreter or the simulator"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        one_path = metafunc.definition.get_closest_marker("one_path")
        each_path = metafunc.definition.get_closest_marker("each_path")
        forced = {t.name for t in TARGETS if t.env}
        kernels = metafunc.definition.get_closest_marker("kernels")
        targets = [t for t in TARGETS if not (kernels and t.name == "reference")]
        targets = [t for t in targets if not (one_path and t.env or each_path and t.name in forced and not t.env)]
        metafunc.parametrize("backend", targets, indirect=True, ids=[t.id for t in targets])


@pytest.fixture
def backend(request):
    """The `Target` under test; its environment is set while the test runs.  Skips a `dtype` it does not take."""
    dtype = request.node.callspec.params.get("dtype")
    if dtype is not None and dtype not in request.param.dtypes:
        pytest.skip(f"{request.param.name} takes no {dtype}")
    with request.param.active():
        yield request.param


@pytest.fixture(scope="session", autouse=True)
def _required_backends_are_present(pytestconfig):
    absent = missing(pytestconfig)
    if absent:
        pytest.fail("required backends are absent: " + "; ".join(absent), pytrace=False)


@pytest.fixture(scope="module")
def one_thread():
    """For models so tiny that more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads():
    """Restores torch's thread count; call it with a number to set it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
