"""Pool a corpus of multi-vector documents that is bigger than one machine's memory: shards in, smaller shards out.

    python examples/pool_corpus.py make IN --documents 20000           # a corpus to try it with
    python examples/pool_corpus.py pool IN OUT --pool-factor 3                           # this process
    python examples/pool_corpus.py pool IN OUT --pool-factor 3 --engine ray --workers 2  # Ray Data, a cluster if there
    python examples/pool_corpus.py pool IN OUT --pool-factor 3 --engine loader --workers 2         # PyTorch DataLoader
    torchrun --nproc-per-node 2 examples/pool_corpus.py pool IN OUT --pool-factor 3 --engine torchrun

Every engine calls the same `PoolShard`, and writes the same bytes. A shard is pooled as a whole and its file appears at
once (written aside, then renamed), so a killed worker's shard is simply done again, and a run that was stopped goes on
where it was. A bad document (not finite, or its length does not fit) is skipped; its id and the reason are in
OUT/<shard>.json, and at the end the counts must add up.

Shards: Parquet with the columns id (string), num_vectors (int) and vectors (list of float32, row after row); or
safetensors with vectors (total, D), cu_seqlens (B + 1,) and metadata {"ids": JSON list}. --width says what D is.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch

from tokenpool_ext.retrieval import TokenPooler


def read_shard(path: Path, width: int) -> tuple[list[str], list[torch.Tensor | str]]:
    """Ids and documents; in place of a bad document the reason."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            ids = json.loads(file.metadata()["ids"])
            ends = file.get_tensor("cu_seqlens").tolist()
            vectors = file.get_tensor("vectors")
        documents = [vectors[a:b] for a, b in zip(ends, ends[1:])]
    else:
        import pyarrow.parquet as parquet

        table = parquet.read_table(path)
        ids = table["id"].to_pylist()
        documents = []
        for n, flat in zip(table["num_vectors"].to_pylist(), table["vectors"]):
            values = np.asarray(flat.values, dtype=np.float32)
            fits = len(values) == n * width
            documents.append(
                torch.from_numpy(values.reshape(n, width).copy())
                if fits
                else f"{len(values)} numbers are not {n} vectors of {width}"
            )
    return ids, ["not finite" if isinstance(x, torch.Tensor) and not torch.isfinite(x).all() else x for x in documents]


def write_shard(path: Path, ids: list[str], documents: list[torch.Tensor], width: int) -> None:
    """At once: a reader sees the whole file or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    flat = torch.cat([torch.zeros(0, width), *documents])
    lengths = [len(x) for x in documents]
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        tensors = {"vectors": flat, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
        save_file(tensors, aside, metadata={"ids": json.dumps(ids)})
    else:
        import pyarrow
        import pyarrow.parquet as parquet

        offsets = np.concatenate([[0], np.cumsum(lengths)]) * width
        vectors = pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets, pyarrow.int64()), flat.flatten().numpy())
        table = pyarrow.table({"id": pyarrow.array(ids, pyarrow.string()), "num_vectors": lengths, "vectors": vectors})
        parquet.write_table(table, aside)
    aside.rename(path)


class PoolShard:
    """Pools one shard: {"path": [path]} -> {"path", "documents", "pooled", "skipped"}, one number each."""

    def __init__(self, out: str, width: int, options: dict) -> None:
        self.out, self.width, self.pooler = Path(out), width, TokenPooler(**options)

    def __call__(self, batch: dict) -> dict:
        reports = [self.one(Path(str(path))) for path in batch["path"]]
        return {key: np.array([r[key] for r in reports]) for key in ("path", "documents", "pooled", "skipped")}

    def one(self, path: Path) -> dict:
        target, report = self.out / path.name, self.out / f"{path.name}.json"
        if not target.exists():  # a run before this one, or a worker that died after writing it, has it done
            ids, documents = read_shard(path, self.width)
            good = [i for i, x in enumerate(documents) if isinstance(x, torch.Tensor)]
            pooled = self.pooler([documents[i] for i in good])
            skipped = {ids[i]: x for i, x in enumerate(documents) if not isinstance(x, torch.Tensor)}
            counts = {"documents": len(documents), "pooled": len(pooled), "skipped": len(skipped), "reasons": skipped}
            aside = report.with_name(f".{report.name}.{os.getpid()}")
            aside.write_text(json.dumps(counts) + "\n")
            aside.rename(report)
            write_shard(target, [ids[i] for i in good], pooled, self.width)
        return json.loads(report.read_text()) | {"path": str(path)}


# ---- engines: shards and the callable in, reports out ----------------------------------------------------------------


def serial(paths: list[str], pool: PoolShard, options):
    for path in paths:
        yield pool.one(Path(path))


def with_ray(paths: list[str], pool: PoolShard, options):
    import ray

    ray.init(num_cpus=None if options.address else options.workers + 1, address=options.address, log_to_driver=False)
    arguments = (str(pool.out), pool.width, options.pooler)
    rows = ray.data.from_items([{"path": str(Path(path).absolute())} for path in paths], override_num_blocks=len(paths))
    # An actor that dies is started again and its shard handed out again (Ray Data's defaults).
    reports = rows.map_batches(PoolShard, fn_constructor_args=arguments, batch_size=1, concurrency=options.workers)
    yield from reports.iter_rows()


def with_loader(paths: list[str], pool: PoolShard, options):
    class Shards(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            return pool.one(Path(paths[index]))

    yield from torch.utils.data.DataLoader(Shards(), batch_size=None, num_workers=options.workers)


def with_torchrun(paths: list[str], pool: PoolShard, options):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    own = [pool.one(Path(path)) for path in paths[dist.get_rank() :: dist.get_world_size()]]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    rank = dist.get_rank()
    dist.destroy_process_group()
    yield from (sum(everyone, []) if rank == 0 else ())


ENGINES = {"serial": serial, "ray": with_ray, "loader": with_loader, "torchrun": with_torchrun}


def pool(options) -> int:
    source, out = Path(options.source), Path(options.out).absolute()
    paths = sorted(str(p) for suffix in ("parquet", "safetensors") for p in source.glob(f"*.{suffix}"))
    if not paths:
        raise SystemExit(f"no *.parquet and no *.safetensors in {source}")
    out.mkdir(parents=True, exist_ok=True)
    options.pooler = {"pool_factor": options.pool_factor, "max_tokens": options.max_tokens}
    options.pooler |= {"max_error": options.max_error, "protected_tokens": options.protected_tokens}
    engine = ENGINES[options.engine](paths, PoolShard(str(out), options.width, options.pooler), options)
    totals, seen = {"documents": 0, "pooled": 0, "skipped": 0}, set()
    for report in engine:
        seen.add(Path(report["path"]).name)
        for key in totals:
            totals[key] += int(report[key])
        print(f"\r{len(seen)} of {len(paths)} shards, {totals['documents']} documents", end="", flush=True)
    if int(os.environ.get("RANK", 0)) != 0:
        return 0
    print()
    names = {Path(path).name for path in paths}
    for half in out.glob(".*"):  # of workers that died while they wrote
        if half.name[1:].rpartition(".")[0].removesuffix(".json") in names:
            half.unlink()
    for path in paths:
        for name, reason in json.loads((out / f"{Path(path).name}.json").read_text())["reasons"].items():
            print(f"skipped {name} of {Path(path).name}: {reason}")
    whole = len(seen) == len(paths) and totals["documents"] == totals["pooled"] + totals["skipped"]
    print(f"{totals['documents']} documents = {totals['pooled']} pooled + {totals['skipped']} skipped")
    if not whole:
        print(f"the counts do not add up: {len(seen)} of {len(paths)} shards were reported")
    return 0 if whole else 1


def make(options) -> int:
    """Clustered unit-norm vectors, 5 to 60 a document; two documents are bad on purpose."""
    target = Path(options.source)
    target.mkdir(parents=True, exist_ok=True)
    size = -(-options.documents // options.shards)
    for shard in range(options.shards):
        generator = torch.Generator().manual_seed(shard)
        ids = [f"doc{i:06d}" for i in range(shard * size, min((shard + 1) * size, options.documents))]
        directions = torch.randn(64, options.width, generator=generator)
        documents = []
        for _ in ids:
            n = int(torch.randint(5, 61, (1,), generator=generator))
            x = directions[torch.randint(64, (n,), generator=generator)]
            x = x + 0.5 * torch.randn(n, options.width, generator=generator)
            documents.append(torch.nn.functional.normalize(x, dim=-1))
        if shard < 2 and len(documents) > 3:
            documents[3][0, 0] = float("nan")
        write_shard(target / f"shard-{shard:04d}.{options.format}", ids, documents, options.width)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make")
    command.add_argument("source")
    command.add_argument("--documents", type=int, default=20000)
    command.add_argument("--shards", type=int, default=40)
    command.add_argument("--format", choices=("parquet", "safetensors"), default="parquet")
    command.add_argument("--width", type=int, default=64)
    command = commands.add_parser("pool")
    command.add_argument("source")
    command.add_argument("out")
    command.add_argument("--engine", choices=ENGINES, default="serial")
    command.add_argument("--workers", type=int, default=2)
    command.add_argument("--address", help="of a Ray cluster; a local one is started without")
    command.add_argument("--width", type=int, default=64, help="features of a vector")
    command.add_argument("--pool-factor", type=float)
    command.add_argument("--max-tokens", type=int)
    command.add_argument("--max-error", type=float)
    command.add_argument("--protected-tokens", type=int, default=0)
    options = parser.parse_args()
    return {"make": make, "pool": pool}[options.command](options)


if __name__ == "__main__":
    raise SystemExit(main())
