"""Builds the CUDA library `_cuda.so` with nvcc and the C++ compiler. Needs torch's headers (any build of torch, CPU
builds too), a CUDA toolkit and no GPU.

The kernels (.cu) see no torch header, so they compile fast; one plain C++ file holds the torch side on the stable ABI.
The CUDA runtime is linked statically. torch's stream getter lives in libtorch_cuda.so, which a CPU build of torch does
not have: the library is linked against a stub of that name, and the real one is found when a CUDA torch loads it.

    python csrc/build_cuda.py OUT_DIR [--archs "8.0;9.0a"] [--keep BUILD_DIR]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from build_backend import torch_folder

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
LIBRARY = "_cuda.so"
# 9.0a, 10.0a and 12.0a run on exactly one architecture each; the PTX of 8.9 covers what comes between and after.
DEFAULT_ARCHS = "8.0;8.6;8.9+PTX;9.0a;10.0a;12.0a"
KERNELS = ("resident", "spread", "clustering", "pooling")
MINIMUM_TOOLKIT = (12, 8)  # the first that knows sm_100 and sm_120
TARGET_VERSION = "0x020b000000000000"  # torch 2.11: the oldest the library loads under
PORTABLE = ["-include", str(CSRC / "portable.h")]  # no more of glibc and libstdc++ than manylinux_2_28 has


def find_nvcc() -> str | None:
    """Path of nvcc: that of CUDA_HOME or CUDA_PATH where one is set, else on PATH or in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_home() -> str | None:
    """Root of the toolkit. nvcc on PATH may be a link or a wrapper, so nvcc itself is asked."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", done.stderr + done.stdout, re.M)
    home = top.group(1).strip() if top else os.path.join(os.path.dirname(os.path.realpath(nvcc)), "..")
    return os.path.realpath(home)


def toolkit_version() -> tuple | None:
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    found = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    return (int(found[1]), int(found[2])) if found else None


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def cannot_build() -> str | None:
    """Why the CUDA library cannot be built here, or None."""
    if find_nvcc() is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        where = f" in {os.path.join(home, 'bin')}" if home else ""
        return f"nvcc was not found{where}; install a CUDA toolkit and put nvcc on PATH, or set CUDA_HOME to its folder"
    version = toolkit_version()
    if version is not None and version < MINIMUM_TOOLKIT and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        return (
            f"CUDA {version[0]}.{version[1]} does not know sm_100 and sm_120; use CUDA 12.8 or newer, or set "
            'TORCH_CUDA_ARCH_LIST to what it knows, for example "8.0;9.0a"'
        )
    if torch_folder() is None:
        return "no torch whose stable ABI headers one can build with; pip install 'torch>=2.11'"
    if compiler() is None:
        return "no C++ compiler was found; install g++ or set CXX"
    if not (Path(cuda_home()) / "include" / "cuda_runtime_api.h").exists() and not list(
        Path(cuda_home()).glob("targets/*/include")
    ):
        return f"{cuda_home()} has no CUDA headers"
    return None


def arch_flags(archs: str | None = None) -> list[str]:
    """-gencode flags for a list in the syntax of TORCH_CUDA_ARCH_LIST: "8.0;8.9+PTX;9.0a"."""
    flags = []
    for entry in re.split(r"[;,\s]+", (archs or os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS).strip()):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not found:
            raise ValueError(
                f'architecture list: expected entries such as "8.0", "9.0a" or "8.9+PTX", got {entry!r}; '
                "set TORCH_CUDA_ARCH_LIST"
            )
        number = found[1] + found[2] + found[3]
        if int(found[1]) < 8:
            raise ValueError(
                f"architecture list: compute capability 8.0 or newer is needed, got {entry!r}; set TORCH_CUDA_ARCH_LIST"
            )
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_extension_parameters(archs: str | None = None) -> dict[str, list[str]]:
    """Everything a build of `_cuda` needs: sources, include folders, flags of nvcc, of the compiler and of the link."""
    home, torch_root = cuda_home(), torch_folder()
    includes = [str(path) for path in (Path(home) / "include", *Path(home).glob("targets/*/include")) if path.exists()]
    folders = [Path(home) / "lib64", *Path(home).glob("targets/*/lib"), Path(home) / "lib"]
    return {
        "kernels": [str(CSRC / "cuda" / f"{name}.cu") for name in KERNELS],
        "cxx_sources": [
            str(CSRC / "cuda" / "ops_cuda.cpp"),
            str(CSRC / "cuda" / "pipeline.cpp"),
            str(CSRC / "planner_cuda.cpp"),
            str(CSRC / "portable.cpp"),
        ],
        "include_dirs": [os.path.join(torch_root, "include"), *includes],
        "nvcc_flags": ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", *arch_flags(archs)],
        "cxx_flags": [
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            *PORTABLE,
            "-DUSE_CUDA",
            f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
            *os.environ.get("CFLAGS", "").split(),  # setuptools adds them to the CPU kernels' flags
        ],
        "library_dirs": [os.path.join(torch_root, "lib"), *[str(path) for path in folders if path.exists()]],
        "libraries": ["torch_cpu", "torch_cuda", "cudart_static"],
    }


def _tasks(p: dict[str, list[str]], build: Path) -> list[tuple]:
    """(command, object) of every compilation, the longest first."""
    headers = ["-isystem", p["include_dirs"][0], *(f"-I{path}" for path in p["include_dirs"][1:])]  # torch's warn
    tasks = []
    for source in map(Path, p["kernels"]):
        output = build / (source.stem + ".cu.o")
        tasks.append(([find_nvcc(), *p["nvcc_flags"], "-c", str(source), "-o", str(output)], output))
    for source in map(Path, p["cxx_sources"]):
        output = build / (source.stem + ".o")
        tasks.append(([compiler(), *p["cxx_flags"], *headers, "-c", str(source), "-o", str(output)], output))
    return tasks


def _compile(command: list[str], output: Path) -> None:
    """Run `command`; the tool's report is kept beside its output."""
    done = subprocess.run(command, capture_output=True, text=True)
    output.with_suffix(".log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nfailed with status {done.returncode}:\n{done.stdout}{done.stderr}")


def _stub(library: Path, names: list[str], *flags: str) -> None:
    """A shared library that has these functions and does nothing."""
    source = library.with_suffix(".c")
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    flags = ("-shared", "-fPIC", "-nostdlib", "-fno-builtin", "-w", f"-Wl,-soname,{library.name}", *flags)
    subprocess.run([compiler(), "-x", "c", *flags, "-o", str(library), str(source)], check=True)


def _old_glibc(folder: Path) -> list[str]:
    """Stubs of the libraries whose functions glibc 2.34 moved into libc, with the versions that libc keeps for older
    programs: linked with them, the CUDA runtime needs no newer glibc than it was made for."""
    done = subprocess.run([compiler(), "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True)
    listing = subprocess.run(["nm", "-D", done.stdout.strip()], capture_output=True, text=True, check=True).stdout
    versions = re.findall(r" \w (\w+)(@@?)(GLIBC_[\d.]+)$", listing, re.M)
    moved = {name for name, default, version in versions if (default, version) == ("@@", "GLIBC_2.34")}
    kept = {name: version for name, default, version in versions if name in moved and default == "@"}
    libraries = []
    for library, prefixes in (("libdl.so.2", "dl"), ("libpthread.so.0", ("pthread_", "sem_")), ("librt.so.1", "shm_")):
        names = sorted(name for name in kept if name.startswith(prefixes))
        if names:
            script = folder / f"{library}.map"
            nodes = {version: [n for n in names if kept[n] == version] for version in {kept[n] for n in names}}
            script.write_text("".join(f"{version} {{ {'; '.join(found)}; }};\n" for version, found in nodes.items()))
            _stub(folder / library, names, f"-Wl,--version-script={script}")
            libraries.append(str(folder / library))
    return libraries


def _link(p: dict[str, list[str]], objects: list[Path], stub: Path, target: Path) -> None:
    stub.mkdir(exist_ok=True)
    _stub(stub / "libtorch_cuda.so", ["aoti_torch_get_current_cuda_stream"])
    command = [compiler(), "-shared", "-o", str(target), *map(str, objects), f"-L{stub}"]
    command += [f"-L{path}" for path in p["library_dirs"]] + ["-Wl,--exclude-libs,ALL"]
    command += [f"-l{name}" for name in p["libraries"]] + _old_glibc(stub) + ["-lrt", "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nfailed with status {done.returncode}:\n{done.stderr}")


def build_cuda(out_dir: str, archs: str | None = None, build_dir: str | None = None, say=print) -> Path:
    """Compile and link `out_dir/_cuda.so`; MAX_JOBS bounds the compilers that run at once. Returns its path.

    `build_dir` keeps objects and the assembler's reports (one .log per kernel file); without it a folder beside the
    sources, build/cuda, is used where it can be written.
    """
    reason = cannot_build()
    if reason:
        raise RuntimeError(f"the CUDA library cannot be built: {reason}")
    p = cuda_extension_parameters(archs)
    build = Path(build_dir or ROOT / "build" / "cuda")
    try:
        build.mkdir(parents=True, exist_ok=True)
    except OSError:
        build = Path(tempfile.mkdtemp(prefix="tokenpool_ext_cuda_"))
    jobs = max(1, int(os.environ.get("MAX_JOBS") or max(1, (os.cpu_count() or 1) // 2)))
    names = [flag.split(",code=")[1] for flag in arch_flags(archs)]
    say(f"tokenpool_ext: building the CUDA kernels for {', '.join(names)} with {find_nvcc()}, {jobs} job(s)")
    tasks = _tasks(p, build)
    objects = [output for _, output in tasks]
    start = time.time()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(_compile, *task) for task in tasks]:
            done.result()
    target = Path(out_dir) / LIBRARY
    target.parent.mkdir(parents=True, exist_ok=True)
    _link(p, objects, build / "stub", target)
    say(f"tokenpool_ext: {target} ({target.stat().st_size >> 10} KiB) in {time.time() - start:.0f} s")
    return target


def kernel_resources(build_dir: str) -> list[dict]:
    """The assembler's report of a build: one record per kernel and architecture with registers, stack and spills."""
    records, arch, kernel, stack = [], None, None, (0, 0, 0)
    for log in sorted(Path(build_dir).glob("*.log")):
        for line in log.read_text().splitlines():
            entry = re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line)
            frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
            used = re.search(r"Used (\d+) registers", line)
            if entry:
                kernel, arch = entry[1], entry[2]
            elif frame:
                stack = tuple(map(int, frame.groups()))
            elif used and kernel:
                short = re.search(r"\d+(\w+?_kernel)(I(f|6__half|13__nv_bfloat16|j|t)E)?", kernel)
                name = re.sub(r"^.*?cuda\d+", "", short[1]) if short else kernel
                kind = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16", None: ""}.get(
                    short[3] if short else None, ""
                )
                records.append(
                    {
                        "kernel": name,
                        "dtype": kind,
                        "arch": arch,
                        "registers": int(used[1]),
                        "stack": stack[0],
                        "spill_stores": stack[1],
                        "spill_loads": stack[2],
                    }
                )
                kernel = None
    return records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir")
    parser.add_argument("--archs", help="as TORCH_CUDA_ARCH_LIST; default: that variable, then " + DEFAULT_ARCHS)
    parser.add_argument("--keep", help="folder for objects and reports")
    options = parser.parse_args(argv)
    build_cuda(options.out_dir, options.archs, options.keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
