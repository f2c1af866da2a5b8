"""What the compiled libraries want of a system, and that they hold nothing of torch's C++ interface."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tokenpool_ext
from tokenpool_ext import loader, native

FOLDER = Path(tokenpool_ext.__file__).parent
pytestmark = [
    pytest.mark.skipif(loader.ops_reason is not None, reason=str(loader.ops_reason)),
    pytest.mark.skipif(shutil.which("nm") is None or shutil.which("readelf") is None, reason="binutils are absent"),
]
# manylinux_2_28
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
LIBRARIES = [FOLDER / name for name in ("_ops.so", "_cuda.so") if (FOLDER / name).exists()]

BARE = {key: value for key, value in os.environ.items() if not key.startswith(("TOKENPOOL_EXT", "PYTHONPATH"))}


def output(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


@pytest.fixture(params=LIBRARIES, ids=lambda path: path.name.split(".")[0])
def library(request):
    return request.param


def test_runs_on_old_systems(library):
    for name, version in re.findall(r"@+(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", output("nm", "-D", library)):
        assert tuple(map(int, version.split("."))) <= NEWEST[name], f"{library.name} wants {name}_{version}"


def test_wants_only_the_stable_interface_of_torch(library):
    wanted = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", library).splitlines()]
    assert not [name for name in wanted if re.match(r"_Z\w*?N?K?(3c10|2at|5torch)", name)]
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", library))
    assert not [name for name in needed if name.startswith(("libc10", "libtorch_python", "libcudart", "libpython"))]


def test_holds_no_debug_information(library):
    assert ".debug_info" not in output("readelf", "-S", "-W", library)


def test_one_library_serves_every_python():
    ops = FOLDER / "_ops.so"
    names = [line.split()[-1] for line in output("nm", "-D", ops).splitlines()]
    assert not [name for name in names if name.startswith(("Py", "_Py"))]
    assert all(name.startswith("tokenpool_") for name in re.findall(r" [TVWBD] (\S+)", output("nm", "-D", ops)))


def test_a_library_without_the_functions_of_today_is_named():
    with pytest.raises(AttributeError, match="tokenpool_"):
        native.Native("libc.so.6")


def test_without_the_library_there_is_the_reference_and_a_reason(tmp_path):
    package = tmp_path / "tokenpool_ext"
    shutil.copytree(FOLDER, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    script = (
        "import warnings, torch, tokenpool_ext as tp\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    assert tp.kmeans(torch.randn(9, 2), 3).centers.isfinite().all()\n"
        "print(tp.__file__, *(w.message for w in said))\n"
        "try: tp.explain(1, 9, 3, 2, compute_capability=(9, 0))\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=BARE)
    assert done.returncode == 0, done.stderr
    assert str(package) in done.stdout
    assert done.stdout.count("did not load") == 2 and "slow backend 'reference'" in done.stdout, done.stdout
