"""``python -m bench.evidence images``: k-NN accuracy of a pretrained DINOv2 whose *queries* are pooled.

The gallery is not pooled: pooled against pooled hides how far features move. Features are the final class token,
cosine similarity, votes weighted by exp(similarity / 0.07). ``stamps``: every picture against all others, k = 5.
``fashion``: ``--queries`` test pictures against ``--gallery`` training pictures, k = 10. Pictures have ``--size``
pixels a side. Nothing is trained.

Pooled features are kept in bench/.cache, a file a variant and chunk: an interrupted run goes on where it stopped, and
``--report`` makes the record from the chunks that every variant has. Fashion-MNIST in an hour of one core:
--data fashion --size 112 --gallery 5000 --queries 2000.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch

from tokenpool_ext import patch
from tokenpool_ext.demo.pretrained import load_dinov2_small

from . import data, methods

CHUNK = 53


def variants(budgets, settings: bool) -> dict[tuple[str, str, float], dict]:
    """(group, name, budget) -> arguments of patch without the ratio."""
    found = {("method", name, b): kw for b in budgets for name, kw in methods.METHODS.items()}
    if settings:
        for setting, values in methods.SETTINGS.items():
            found |= {(setting, name, b): kw for b in methods.CENTRAL for name, kw in values.items()}
    return found


def features(model, pixels, batch: int = 16) -> torch.Tensor:
    """(n, 384) normalised class tokens."""
    with torch.inference_mode():
        rows = [model(pixels[part]).last_hidden_state[:, 0] for part in data.batches(len(pixels), batch)]
    return torch.nn.functional.normalize(torch.cat(rows), dim=1).clone()


class Passed(torch.nn.Module):
    """Stands for a part of the model whose output is given."""

    def forward(self, x, *args, **kwargs):
        return x


def before_pooling(model, pixels, batch: int = 16) -> torch.Tensor:
    """(n, N, 384): the tokens that enter the first block that pools, which all variants share."""
    front = shared_copy(model)
    front.encoder.layer, front.layernorm = front.encoder.layer[: methods.LAYERS[0]], Passed()
    with torch.inference_mode():
        return torch.cat([front(pixels[part]).last_hidden_state for part in data.batches(len(pixels), batch)])


def vote(queries, gallery, labels, k: int, own: torch.Tensor | None = None) -> torch.Tensor:
    """Predicted label of each query; ``own``: its index in the gallery, which is left out."""
    similarity = queries @ gallery.T
    if own is not None:
        similarity[torch.arange(len(own)), own] = -torch.inf
    best, index = similarity.topk(k, dim=1)
    votes = torch.zeros(len(queries), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[index], (best / 0.07).exp())
    return votes.argmax(1)


class Task:
    """Pictures and labels of one data set, as chunks of queries."""

    def __init__(self, name: str, gallery: int, queries: int, size: int = 224):
        self.name, self.size = name, size
        if name == "stamps":
            self.files, self.labels, self.names = data.stamps()
            self.gallery_labels, self.k = self.labels, 5
            self.order = torch.randperm(len(self.files), generator=torch.Generator().manual_seed(0))
            self.key = f"stamps{len(self.files)}"
        else:
            pictures, labels = data.fashion("train")
            keep = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:gallery]
            self.gallery_pictures, self.gallery_labels, self.k = pictures[keep.numpy()], labels[keep], 10
            self.pictures, self.labels = data.fashion("t10k")
            self.order = torch.randperm(len(self.pictures), generator=torch.Generator().manual_seed(1))[:queries]
            self.key = f"fashion{gallery}"
        self.key += f"-{size}" if size != 224 else ""

    def chunks(self):
        return list(self.order.split(CHUNK))

    def pixels(self, index) -> torch.Tensor:
        if self.name == "stamps":
            return data.stamp_pixels([self.files[i] for i in index], self.size)
        return data.fashion_pixels(self.pictures[index.numpy()], self.size)

    def gallery(self, model) -> torch.Tensor:
        def make():
            if self.name == "stamps":
                make_pixels, pictures = data.stamp_pixels, self.files
            else:
                make_pixels, pictures = data.fashion_pixels, self.gallery_pictures
            chunks = (make_pixels(pictures[p], self.size) for p in data.batches(len(pictures), 50))
            return torch.cat([features(model, pixels) for pixels in chunks])

        return data.cached(f"{self.key}-gallery", make)


def shared_copy(model):
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def pooled(model, arguments: dict, budget: float, tokens: int):
    """A copy of the model that shares its weights, pools to the budget and takes the tokens of `before_pooling`."""
    ratio = methods.ratio_for(budget, tokens, 384, arguments["position"])
    model = patch(shared_copy(model), keep_ratio=ratio, layers=methods.LAYERS, **arguments)
    model.embeddings = Passed()
    for i in range(methods.LAYERS[0]):
        model.encoder.layer[i] = Passed()
    return model


def chunk_file(task: Task, number: int, variant) -> str:
    return f"{task.key}-{number}-{data.digest(repr(variant))}"


def run(task: Task, wanted: dict, say) -> None:
    model = load_dinov2_small()
    task.gallery(model)
    say(f"{task.name}: gallery ready, {len(wanted)} variants, {len(task.order)} queries")
    models = {}
    for number, index in enumerate(task.chunks()):
        tokens = None
        for variant, arguments in wanted.items():
            name = chunk_file(task, number, variant)
            if (data.CACHE / f"{name}.pt").is_file():
                continue
            tokens = before_pooling(model, task.pixels(index)) if tokens is None else tokens
            if variant not in models:
                models[variant] = pooled(model, arguments, variant[2], (task.size // 14) ** 2)
            torch.manual_seed(number)
            data.cached(name, lambda: features(models[variant], tokens))
        say(f"{task.name}: {(number + 1) * CHUNK} of {len(task.order)} queries")


def report(task: Task, wanted: dict) -> list[dict]:
    """One record a variant: accuracy, its difference to all tokens and to WK-Means, with 95% paired intervals."""
    gallery = task.gallery(load_dinov2_small())
    whole = [
        n
        for n, _ in enumerate(task.chunks())
        if all((data.CACHE / f"{chunk_file(task, n, v)}.pt").is_file() for v in wanted)
    ]
    index = torch.cat([task.chunks()[n] for n in whole])
    truth = task.labels[index]
    own = index if task.name == "stamps" else None

    def right(queries):
        return (vote(queries, gallery, task.gallery_labels, task.k, own) == truth).double()

    if own is None:
        model = load_dinov2_small()
        parts = [
            data.cached(f"{task.key}-{n}-whole", lambda: features(model, task.pixels(task.chunks()[n]))) for n in whole
        ]
        base = torch.cat(parts)
    else:
        base = gallery[index]
    all_tokens, records, hits = right(base), [], {}
    records.append(
        {"group": "all tokens", "name": "all tokens", "accuracy": all_tokens.mean().item(), "queries": len(index)}
    )
    for variant in wanted:
        found = torch.cat([data.cached(chunk_file(task, n, variant), None) for n in whole])
        hits[variant] = right(found), (found * base).sum(1).mean().item()
    for (group, name, budget), (hit, cosine) in hits.items():
        reference = hits[("method", "WK-Means", budget)][0]
        row = {"group": group, "name": name, "budget": budget, "accuracy": hit.mean().item(), "cosine": cosine}
        row |= data.difference("minus_all", hit - all_tokens)
        records.append(row | data.difference("minus_wkmeans", hit - reference))
    return records


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", choices=("stamps", "fashion"), required=True)
    parser.add_argument("--gallery", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=318)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side; patches are of 14")
    parser.add_argument("--budgets", type=float, nargs="+", default=methods.BUDGETS, help="shares of the blocks' MACs")
    parser.add_argument("--settings", action="store_true", help="also the settings of WK-Means")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", metavar="NAME", help="write bench/results/evidence-images-NAME.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    task, wanted = Task(args.data, args.gallery, args.queries, args.size), variants(args.budgets, args.settings)
    if not args.report:
        run(task, wanted, lambda line: print(line, flush=True))
        return 0
    about = {
        "data": args.data,
        "gallery": len(task.gallery_labels),
        "k": task.k,
        "size": task.size,
        "layers": methods.LAYERS,
    }
    print(data.save(f"images-{args.report}", about, {"records": report(task, wanted)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
