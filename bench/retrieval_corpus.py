"""``python -m bench.retrieval_corpus``: examples/pool_corpus.py by every engine, one Ray worker killed on the way: are
the bytes the same, and is no document lost?"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import machine

SCRIPT = machine.ROOT / "examples" / "pool_corpus.py"


def digest(folder: Path) -> str:
    """Of every file's name and bytes."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def descendants(pid: int) -> list[int]:
    found = []
    for child in subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout.split():
        found += [int(child), *descendants(int(child))]
    return found


def kill_a_worker(process: subprocess.Popen, out: Path, after: int) -> int:
    """Kill one of this run's Ray workers that pools, once `after` shards are there -> its process id, or 0."""
    while process.poll() is None and len(list(out.glob("shard-*.json"))) < after:
        time.sleep(0.05)
    for pid in descendants(process.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        except OSError:
            continue
        if words.startswith("ray::") and "PoolShard" in words:
            os.kill(pid, signal.SIGKILL)
            return pid
    return 0


def run(source: Path, out: Path, engine: str, kill_after: int | None = None) -> dict:
    command = [sys.executable, str(SCRIPT)]
    if engine == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT)]
    command += ["pool", str(source), str(out), "--pool-factor", "3", "--engine", engine]
    environment = {
        **os.environ,
        "PYTHONPATH": str(machine.ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
        killed = kill_a_worker(process, out, kill_after) if kill_after is not None else 0
        code = process.wait()
        log.seek(0)
        text = log.read()
    if code:
        raise RuntimeError(f"{engine}: exit {code}\n{text[-3000:]}")
    last = [line for line in text.replace("\r", "\n").split("\n") if " documents = " in line][-1]
    return {"engine": engine, "seconds": round(time.perf_counter() - start, 1), "killed": bool(killed), "counts": last}


def check(folder: Path, documents: int, shards: int, engines: list[str], say=print) -> list[dict]:
    source = folder / "in"
    make = [sys.executable, str(SCRIPT), "make", str(source), "--documents", str(documents), "--shards", str(shards)]
    subprocess.run(make, check=True, env={**os.environ, "PYTHONPATH": str(machine.ROOT)})
    rows = []
    for engine in ["serial", *engines]:
        out = folder / engine
        row = run(source, out, engine, kill_after=shards // 8 if engine == "ray" else None)
        row["same_bytes"] = digest(out) == digest(folder / "serial")
        rows.append(row)
        say(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20000)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--engines", default="ray,loader,torchrun")
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = check(Path(folder), options.documents, options.shards, options.engines.split(","))
    if options.json:
        facts = machine.stamp("bench.retrieval_corpus")
        facts["versions"] |= {name: machine.package_version(name) for name in ("ray", "pyarrow")}
        facts |= {"documents": options.documents, "shards": options.shards, "records": rows}
        machine.write(options.json, facts)
    if not all(row["same_bytes"] for row in rows):
        raise SystemExit("the bytes differ")


if __name__ == "__main__":
    main()
