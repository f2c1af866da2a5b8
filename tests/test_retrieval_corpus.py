"""examples/pool_corpus.py: every engine the same bytes, a killed worker loses nothing, a bad document is named."""

import json
import subprocess
import sys

import pytest

from bench.machine import ROOT
from bench.retrieval_corpus import SCRIPT, check, digest, run


def test_loader_and_torchrun_give_the_bytes_of_one_process(tmp_path):
    pytest.importorskip("pyarrow")
    rows = check(tmp_path, 120, 6, ["loader", "torchrun"])
    assert all(row["same_bytes"] and row["counts"] == "120 documents = 118 pooled + 2 skipped" for row in rows)
    report = json.loads((tmp_path / "serial" / "shard-0001.parquet.json").read_text())
    assert report["reasons"] == {"doc000023": "not finite"}
    expected = digest(tmp_path / "serial")
    (tmp_path / "serial" / "shard-0003.parquet").unlink()  # a run that was stopped: what is there is kept
    for half in (".shard-0003.parquet.77", ".shard-0003.parquet.json.77"):  # but halves that a dead worker left
        (tmp_path / "serial" / half).write_text("half")
    before = (tmp_path / "serial" / "shard-0002.parquet").stat().st_mtime_ns
    run(tmp_path / "in", tmp_path / "serial", "serial")
    assert digest(tmp_path / "serial") == expected
    assert (tmp_path / "serial" / "shard-0002.parquet").stat().st_mtime_ns == before


def test_ray_with_a_worker_killed(tmp_path):
    pytest.importorskip("ray.data", exc_type=ImportError)
    rows = check(tmp_path, 2000, 40, ["ray"])
    assert rows[1]["killed"] and rows[1]["same_bytes"]
    assert rows[1]["counts"] == "2000 documents = 1998 pooled + 2 skipped"


def test_safetensors_shards(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    make = [sys.executable, str(SCRIPT), "make", str(tmp_path / "in"), "--documents", "40", "--shards", "2"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    subprocess.run([*make, "--format", "safetensors"], check=True, env=environment)
    assert run(tmp_path / "in", tmp_path / "out", "serial")["counts"] == "40 documents = 38 pooled + 2 skipped"
    with safetensors.safe_open(tmp_path / "out" / "shard-0000.safetensors", "pt") as file:
        ids = json.loads(file.metadata()["ids"])
        assert len(ids) == 19 and "doc000003" not in ids
        assert int(file.get_tensor("cu_seqlens")[-1]) == len(file.get_tensor("vectors"))
