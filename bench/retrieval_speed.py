"""``python -m bench.retrieval_speed``: documents a second, against what multi-vector libraries run.

Pages of 1030 tokens x 128 (ColPali's), at factors 2, 3 and 4. Peers: the steps of sentence-transformers 6.2's Ward
pooling (cosine product, condensed distances, linkage, fcluster, means, norms), with fastcluster and with scipy; with 1
thread, and with documents dealt to 2. Ours: `TokenPooler` over a list, with 1 and 2 threads of torch. Rounds are
interleaved; a peer is timed on fewer pages. Every row has the elapsed and the CPU time of a page: where others use the
cores (`others_cores`), compare the CPU times of 1 thread. Then the memory over many pages.

Tokens: MiniLM's, where bench.retrieval_quality has cached them (documents joined to pages, a fixed orthonormal map 384
-> 128); random clustered ones otherwise.
"""

from __future__ import annotations

import argparse
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch
from torch.nn.functional import normalize

from . import machine
from .retrieval_quality import CACHE, ward_labels

N, D = 1030, 128


def pages(count: int) -> tuple[list[torch.Tensor], str]:
    generator = torch.Generator().manual_seed(0)
    cached = sorted(CACHE.glob("minilm-debian-*.pt"))
    if cached:
        tokens = torch.cat(torch.load(cached[0], weights_only=True)["documents"])
        words = f"MiniLM tokens of Debian descriptions ({cached[0].name}), joined, 384 -> 128"
        tokens = normalize(tokens @ torch.linalg.qr(torch.randn(384, D, generator=generator)).Q, dim=-1)
    else:
        words = "random: 400 directions with noise"
        tokens = torch.randn(400, D, generator=generator)[torch.randint(400, (200 * N,), generator=generator)]
        tokens = normalize(tokens + 0.7 * torch.randn(tokens.shape, generator=generator), dim=-1)
    starts = torch.arange(count) * N % (len(tokens) - N)
    return [tokens[s : s + N].clone() for s in starts.tolist()], words


def peer(linkage, threads: int, factor: int):
    def one(x):
        k = N // factor
        labels = ward_labels(x, k, linkage)
        sums = torch.zeros(k, D).index_add_(0, labels, x)
        return normalize(sums / torch.bincount(labels, minlength=k).clamp(min=1)[:, None], dim=-1)

    def run(documents):
        if threads == 1:
            return [one(x) for x in documents]
        with ThreadPoolExecutor(threads) as executor:
            return list(executor.map(one, documents))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=1000)
    parser.add_argument("--peer-pages", type=int, default=16, help="a peer's pages in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-pages", type=int, default=10000)
    parser.add_argument("--threads", default="1,2", help="on a machine that others use: 1")
    parser.add_argument("--json")
    options = parser.parse_args()
    import fastcluster
    from scipy.cluster.hierarchy import linkage as scipy_linkage

    from tokenpool_ext.retrieval import TokenPooler

    documents, words = pages(options.pages)
    counts = [int(t) for t in options.threads.split(",")]
    records = []
    for factor in (2, 3, 4):
        calls = {("tokenpool_ext", threads): TokenPooler(factor) for threads in counts}
        for name, linkage in (("fastcluster", fastcluster.linkage), ("scipy", scipy_linkage)):
            calls |= {(name, threads): peer(linkage, threads, factor) for threads in counts}
        share = options.pages // options.rounds
        times: dict = {key: [] for key in calls}
        others = machine.OthersCpu()
        for index in range(options.rounds):
            keys = list(calls)
            for key in keys[index % len(keys) :] + keys[: index % len(keys)]:
                own = key[0] == "tokenpool_ext"
                batch = documents[index * share :][: share if own else options.peer_pages]
                torch.set_num_threads(key[1] if own else 1)
                start = time.perf_counter(), time.process_time()
                calls[key](batch)
                stop = time.perf_counter(), time.process_time()
                times[key].append([(b - a) / len(batch) for a, b in zip(start, stop)])
        busy = others.cores()
        for (name, threads), seconds in times.items():
            row = {"factor": factor, "provider": name, "threads": threads, "others_cores": busy}
            row["pages_a_round"] = share if name == "tokenpool_ext" else options.peer_pages
            for clock, word in enumerate(("elapsed", "cpu")):
                own = times["tokenpool_ext", threads]
                row[f"{word}_ms_page"] = round(median([s[clock] for s in seconds]) * 1e3, 3)
                row[f"{word}_times_ours"] = round(median([a[clock] / b[clock] for a, b in zip(seconds, own)]), 1)
            records.append(row)
            print(row, flush=True)
    torch.set_num_threads(counts[-1])
    pooler, peaks = TokenPooler(3), []
    for start in range(0, options.memory_pages, 500):  # a corpus that comes by in pieces
        pooler([documents[i % len(documents)] for i in range(start, start + 500)])
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    memory = {"pages": options.memory_pages, "peak_mb_after_each_1000": peaks[1::2]}
    print(memory)
    if options.json:
        facts = machine.stamp("bench.retrieval_speed")
        facts["versions"] |= {name: machine.package_version(name) for name in ("scipy", "fastcluster")}
        facts |= {"tokens": words, "rounds": options.rounds, "records": records, "memory": memory}
        machine.write(options.json, facts)


if __name__ == "__main__":
    main()
