"""Facts about the machine, the versions and the commit that go into every record."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
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


def load() -> float | None:
    """One-minute load average before anything of ours ran on this problem; high means shared cores and noise."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def package_version(name: str | None) -> str | None:
    if not name:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict:
    return {"python": platform.python_version(),
            **{name: package_version(name) for name in ("torch", "numpy", "triton")}}


def commit() -> str:
    """Short commit hash, with '+' when tracked files differ from it; 'unknown' outside a checkout."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=20)
    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode:
            return "unknown"
        dirty = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
        return head.stdout.strip() + ("+" if dirty else "")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def command(module: str = "bench") -> str:
    return " ".join(["python", "-m", module, *sys.argv[1:]])


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
