"""The layer in a transformer of your own: pool, go on with fewer tokens, and give every place a vector again.

python examples/your_own_model.py
"""

import torch
from torch import nn

import tokenpool_ext as tp


class Attention(nn.Module):
    """Fused attention that also tells how much attention each token received."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        return self.out(y), tp.attention_received(q, k)  # the attention matrix is never made


class Block(nn.Module):
    """One module of a pair whose sums stand in the model's own loop (as in vit_pytorch), so that ``patch`` takes it."""

    def __init__(self, attention, mlp):
        super().__init__()
        self.attention, self.mlp = attention, mlp

    def forward(self, x):
        x = self.attention(x)[0] + x
        return self.mlp(x) + x


def main():
    torch.manual_seed(0)
    attention = Attention(64, 4)
    x = torch.randn(2, 196, 64)

    y, scores = attention(x)
    x = x + y

    # Heavy tokens count more: weighted K-Means, exact, five iterations at most.
    clusters = tp.kmeans(x, 49, weights=scores, sort=True)
    print("cluster centers", tuple(clusters.centers.shape), "inertia", [round(v, 1) for v in clusters.inertia.tolist()])

    y, _ = attention(clusters.centers)  # any layers, on a quarter of the tokens
    pooled = clusters.centers + y

    dense = tp.unpool(pooled, clusters.assignment)  # (2, 196, 64): every place has its cluster's vector
    positions = torch.stack(torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij"), -1).view(1, 196, 2)
    where = tp.pool(positions.expand(2, -1, -1), clusters.assignment, 49)  # pool anything else with the same clusters
    print("dense", tuple(dense.shape), "mean positions of the clusters", tuple(where.shape))

    # Or all of that in one line, where blocks stand in a list; for vit_pytorch, with its attention in Block:
    # vit.transformer = nn.Sequential(nn.Sequential(*(Block(*p) for p in vit.transformer.layers)), vit.transformer.norm)
    pairs = [(Attention(64, 4), nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU())) for _ in range(4)]
    model = nn.Sequential(nn.Sequential(*(Block(*pair) for pair in pairs)), nn.LayerNorm(64))
    print(tp.supported(model, num_prefix_tokens=0))
    tp.patch(model, keep_ratio=0.5, num_prefix_tokens=0)
    print("patched", tuple(model(x).shape))  # as many outside, fewer from block to block inside


if __name__ == "__main__":
    main()
