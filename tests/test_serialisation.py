"""Clusters and layers through files, processes, copies and data loaders."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import assert_identical, tokens
from torch.utils.data import DataLoader, Dataset, default_collate

import tokenpool_ext as tp

RESULTS = {
    "kmeans": lambda x: tp.kmeans(x, 4),
    "kmedoids": lambda x: tp.kmedoids(x, 4, sort=True),
    "bfloat16": lambda x: tp.kmeans(x.bfloat16(), 4),
    "of a layer": lambda x: tp.TokenPooling(4, num_prefix_tokens=0, return_clusters=True)(x.view(-1, 12, 3))[1],
    "of a selection": lambda x: tp.ScorePruning(4, num_prefix_tokens=0, return_clusters=True)(
        x.view(-1, 12, 3), x.view(-1, 12, 3)[..., 0].exp()
    )[1],
}


@pytest.fixture(params=RESULTS)
def clusters(request):
    return RESULTS[request.param](tokens(2, 12, 3))


def test_saved_clusters_load_with_weights_only(clusters):
    file = io.BytesIO()
    torch.save({"clusters": clusters}, file)
    file.seek(0)
    back = torch.load(file, weights_only=True)["clusters"]
    assert isinstance(back, tp.Clusters)
    assert_identical(clusters, back)


def test_what_layers_and_compress_return_is_saved_and_batched_as_clusters_are():
    x = tokens(2, 12, 3)
    pooled = [tp.TokenPooling(4, num_prefix_tokens=0).reduced(x[i : i + 1]) for i in range(2)]
    merged = [tp.compress(image, 4) for image in x]  # without positions
    placed = [tp.compress(image, 4, grid=(3, 4)) for image in x]
    for results in (pooled, merged, placed):
        file = io.BytesIO()
        torch.save(results, file)
        file.seek(0)
        back = torch.load(file, weights_only=True)
        assert [type(r) for r in back] == [type(r) for r in results] and torch.equal(back[1].tokens, results[1].tokens)
    for results, batch in ((merged, tp.compress(x, 4)), (placed, tp.compress(x, 4, grid=(3, 4)))):
        together = default_collate(results)
        for part, expected in zip(together, batch):
            assert part is expected is None or torch.equal(part, expected)
    assert default_collate(pooled).sizes is None and default_collate(pooled).clusters.mass.shape == (2, 1, 4)


def test_saved_clusters_load_in_another_process(tmp_path):
    clusters = tp.kmeans(tokens(2, 12, 3), 4)
    torch.save(clusters, tmp_path / "clusters.pt")
    code = "import sys, torch, tokenpool_ext; print(torch.load(sys.argv[1]).centers.sum().item())"
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "clusters.pt"], capture_output=True, text=True, check=True
    )
    assert float(out.stdout) == pytest.approx(clusters.centers.sum().item())


def test_copies(clusters):
    for twin in (copy.copy(clusters), copy.deepcopy(clusters), pickle.loads(pickle.dumps(clusters))):
        assert isinstance(twin, tp.Clusters)
        assert_identical(clusters, twin)


@pytest.mark.parametrize("name", ["kmeans", "kmedoids"])
def test_collated_clusters_are_those_of_the_batch(name):
    x = tokens(3, 12, 3)
    alone = [RESULTS[name](image) for image in x]
    together = default_collate(alone)
    assert isinstance(together, tp.Clusters)
    assert_identical(RESULTS[name](x), together)
    nested = default_collate([{"clusters": c, "label": i} for i, c in enumerate(alone)])
    assert_identical(together, nested["clusters"])


class Pages(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return tp.kmeans(tokens(1, 12, 3, seed=index)[0], 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_gives_clusters(workers):
    got = list(DataLoader(Pages(), batch_size=2, num_workers=workers))
    assert [type(batch) for batch in got] == [tp.Clusters] * 2
    want = tp.kmeans(torch.cat([tokens(1, 12, 3, seed=i) for i in range(4)]), 4)
    assert_identical(want.assignment, torch.cat([batch.assignment for batch in got]))
    assert_identical(want.centers, torch.cat([batch.centers for batch in got]))
