"""``python -m bench.init_study``: which start is best? Decides the defaults of ``init=``.

For each start of the library, on real tokens: the loss after T iterations relative to scikit-learn's k-means++ run to
convergence (one run, and the best of ten), weighted (attention received) and unweighted, and what the start costs.
1.000 means equal; below is better. The weighted loss is sum_i w_i ||x_i - c||^2, with the same weights for everyone.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import torch

from . import machine, timing, tokens

STARTS = ("strided", "topk", "random", "kmeans++", "farthest", "bipartite")


def sklearn_losses(x, weights, K: int) -> dict[str, torch.Tensor]:
    """scikit-learn's converged loss of every image: k-means++ with n_init=1 and the best of 10."""
    from sklearn.cluster import KMeans

    found: dict[str, list] = {"one": [], "ten": []}
    for b, image in enumerate(x.numpy()):
        w = None if weights is None else weights[b].numpy()
        for name, n_init in (("one", 1), ("ten", 10)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = KMeans(K, init="k-means++", n_init=n_init, random_state=b).fit(image, sample_weight=w)
            found[name].append(model.inertia_)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def start_cost_ms(call, given, clock, repeats: int) -> tuple[float, float]:
    """Milliseconds of a call that makes its own start, and of that start alone: the call, less the same with the start
    given."""
    samples, errors = timing.interleave({"named": call, "given": given}, repeats=repeats, clock=clock, pause=0)
    if errors:
        raise next(iter(errors.values()))
    differences = [a - b for a, b in zip(samples["named"], samples["given"])]
    return timing.percentile(samples["named"], 50) * 1e3, timing.percentile(differences, 50) * 1e3


def study(x, scores, clusters, iters, repeats: int, say=print) -> list[dict]:
    import tokenpool_ext as tp
    from tokenpool_ext.starts import initial

    records = []
    clock = timing.CpuClock() if torch.get_num_threads() == 1 else timing.WallClock()
    for K in clusters:
        for weights, word in ((None, "unweighted"), (scores, "weighted")):
            base = sklearn_losses(x, weights, K)
            say(
                f"\n{word}, {x.shape[1]}x{x.shape[2]} -> {K}, {x.shape[0]} images; loss after T iterations over "
                f"scikit-learn's converged k-means++: mean (worst image)"
            )
            say(f"  {'start':10s} {'T':>3s} {'/ one run':>16s} {'/ best of 10':>16s} {'start ms':>9s} {'all ms':>8s}")
            for start in STARTS:
                for T in iters:
                    record = {"clusters": K, "weighted": weights is not None, "start": start, "iters": T}
                    generator = torch.Generator().manual_seed(0)

                    def call(init=start, generator=generator, T=T, weights=weights, K=K):
                        return tp.kmeans(x, K, weights=weights, init=init, num_iters=T, generator=generator)

                    try:
                        loss = call().inertia.double()
                    except ValueError as error:
                        record.update(status="failed", reason=str(error))
                        records.append(record)
                        say(f"  {start:10s} {T:3d} not possible: {error}")
                        break
                    one, ten = loss / base["one"], loss / base["ten"]
                    made = initial(start, x, K, weights, None, None, generator, False)
                    total, cost = (ms / x.shape[0] for ms in start_cost_ms(call, lambda: call(made), clock, repeats))
                    record.update(
                        status="ok",
                        over_one_run={"mean": one.mean().item(), "worst": one.max().item()},
                        over_best_of_10={"mean": ten.mean().item(), "worst": ten.max().item()},
                        start_ms_per_image=cost,
                        total_ms_per_image=total,
                    )
                    records.append(record)
                    say(
                        f"  {start:10s} {T:3d}  {one.mean():.4f} ({one.max():.3f})  {ten.mean():.4f} ({ten.max():.3f})"
                        f" {cost:9.4f} {total:8.3f}"
                    )
    return records


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.init_study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--clusters", default="128,64,32")
    parser.add_argument("--iters", default="1,5,20")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found, words = tokens.real_with_scores()
    if found is None:
        print(f"real tokens are needed: {words}", file=sys.stderr)
        return 2
    x, scores = found["tokens"][: args.images].contiguous(), found["scores"][: args.images].contiguous()
    records = study(
        x, scores, [int(k) for k in args.clusters.split(",")], [int(t) for t in args.iters.split(",")], args.repeats
    )
    if args.json:
        content = {
            "schema": 1,
            **machine.stamp("bench.init_study"),
            "threads": args.threads,
            "tokens": "real",
            "images": x.shape[0],
            "reference": "scikit-learn KMeans(init='k-means++') to "
            "convergence, n_init 1 and 10, random_state = image number",
            "records": records,
        }
        machine.write(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
