"""Thousands of small k-means at once, and labels for new points.

python examples/point_sets.py [--sets 2000]
"""

import argparse
import time

import torch

import tokenpool_ext as tp


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=2000)
    args = parser.parse_args()

    torch.manual_seed(0)
    points = torch.randn(args.sets, 100, 3)  # sets, points, features

    start = time.perf_counter()
    clusters = tp.kmeans(points, 8, num_iters=20)
    seconds = time.perf_counter() - start
    print("cluster centers", tuple(clusters.centers.shape))
    print(f"{args.sets} sets of 100 points into 8 clusters: {seconds * 1e3:.0f} ms, {args.sets / seconds:.0f} sets/s")

    # Sets of different sizes: pad, say which points are real, and how many clusters each set gets.
    real = torch.arange(100) < torch.randint(10, 101, (args.sets, 1))
    ragged = tp.kmeans(points, torch.randint(2, 9, (args.sets,)), mask=real)
    print("centers", tuple(ragged.centers.shape), "- rows beyond a set's own number have mass 0")

    # One set needs no batch, and new points get the nearest center.
    one = tp.kmeans(points[0], 8, num_iters=20)
    labels = tp.assign(torch.randn(5, 3), one.centers)
    print("labels of five new points", labels.tolist())


if __name__ == "__main__":
    main()
