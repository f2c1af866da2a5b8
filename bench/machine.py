"""Facts about the machine, the versions and the commit that go into every record."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    info: dict[str, str] = {}
    for key, value in pairs:
        info.setdefault(key.strip(), value.strip())
    return info


def cpu_flags() -> set[str]:
    """Instruction set flags as /proc/cpuinfo names them (empty where there is no such file)."""
    return set(_cpuinfo().get("flags", "").split())


def machine(device: str = "cpu") -> dict:
    flags, info = cpu_flags(), _cpuinfo()
    facts = {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cpu_family_model": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "cores": os.cpu_count(),
        "avx2": "avx2" in flags,
        "fma": "fma" in flags,
        "avx512f": "avx512f" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "amx_bf16": "amx_bf16" in flags,
        "system": platform.platform(terse=True),
    }
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu_capability"] = f"{properties.major}.{properties.minor}"
        facts["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["gpu_sms"] = properties.multi_processor_count
        facts["cuda"] = torch.version.cuda
    return facts


class OthersCpu:
    """CPU cores that other processes keep busy between the making of this object and `cores()`; None if unknown.

    Timings taken while others use the cores are not to be trusted: thread barriers then wait for whole time slices.
    """

    def __init__(self):
        self.start = self._read()

    @staticmethod
    def _read():
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.monotonic(), busy, own.user + own.system + own.children_user + own.children_system

    def cores(self) -> float | None:
        stop = self._read()
        if self.start is None or stop is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self.start, stop))
        return round(max(0.0, busy - own) / max(wall, 1e-9), 2)


def wait_idle(limit_s: float, threshold: float = 0.15, say=print) -> float | None:
    """Wait until others use less than `threshold` cores for two seconds, at most limit_s -> cores they use now."""
    until = time.monotonic() + limit_s
    while True:
        others = OthersCpu()
        time.sleep(2)
        used = others.cores()
        if used is None or used < threshold or time.monotonic() > until:
            return used
        say(f"waiting: other processes use {used} cores")
        time.sleep(3)


def package_version(name: str | None) -> str | None:
    if not name:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict:
    return {
        "python": platform.python_version(),
        **{name: package_version(name) for name in ("torch", "numpy", "triton")},
    }


def commit() -> str:
    """Short commit hash, with '+' when tracked files other than records and text differ from it. Outside a checkout (a
    copy on another machine) what the file COMMIT says, or 'unknown'."""
    named = ROOT / "COMMIT"
    elsewhere = named.read_text().strip() if named.exists() else "unknown"

    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=20)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode:
            return elsewhere
        dirty = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!*.md"
        ).stdout.strip()
        return head.stdout.strip() + ("+" if dirty else "")
    except (OSError, subprocess.TimeoutExpired):
        return elsewhere


def command(module: str = "bench") -> str:
    """What was typed, with the variables that choose a path or an instruction set."""
    choices = ("TOKENPOOL_EXT_CPU_ISA", "TOKENPOOL_EXT_CPU_PATH", "TOKENPOOL_EXT_CUDA_PATH")
    chosen = [f"{name}={os.environ[name]}" for name in choices if os.environ.get(name)]
    return " ".join([*chosen, "python", "-m", module, *sys.argv[1:]])


def stamp(module: str = "bench", device: str = "cpu") -> dict:
    """What every record says of its making."""
    return {
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "command": command(module),
        "date": now(),
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write(path, content: dict) -> None:
    """Write what was measured as JSON that reads well in a diff: one entry, or one record of a list, a line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_text(_lines(content) + "\n")
    temporary.replace(path)


def _lines(value) -> str:
    inside = list(value.values()) if isinstance(value, dict) else value
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
    if isinstance(value, dict) and any(isinstance(item, (dict, list)) and item for item in inside):
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(item)}" for key, item in value.items()) + "\n}"
    return json.dumps(value)
