"""This project's gram path written in PyTorch eager: x x^T once, then only its rows are summed by cluster.

Nobody ships this; it is here so that the idea and the kernels can be told apart.
"""

from __future__ import annotations

import torch

NAME = "torch eager gram"
PACKAGE = "torch"
OPS = ("kmeans",)
DEVICES = ("cpu", "cuda")
OBJECTIVE = "same"
NOTE = "batched PyTorch: x x^T once, rows summed by cluster with index_add_, means from the tokens at the end"


def unavailable(problem):
    if problem.N > 8192 or problem.B * problem.N * problem.N * 4 > 4 << 30:
        return "the N x N products of the batch need more than 4 GiB"
    return None


def run_gram(x, c, iters, init):
    """Initial centers are the tokens `init`; centers appear only after the last iteration."""
    (B, N, D), K = x.shape, c.shape[1]
    x0 = x - x.mean(1, keepdim=True)
    G = torch.bmm(x0, x0.transpose(1, 2))
    rows = G.gather(1, init[..., None].expand(-1, -1, N))  # (B, K, N): c_j . x_i
    square = G.diagonal(dim1=1, dim2=2).gather(1, init)
    offset = torch.arange(B, device=x.device)[:, None] * K
    for index in range(iters):
        a = (square[..., None] - 2 * rows).argmin(1)
        flat = (a + offset).reshape(-1)
        counts = torch.bincount(flat, minlength=B * K).view(B, K, 1).clamp(min=1).to(x.dtype)
        if index == iters - 1:
            sums = torch.zeros(B * K, D, dtype=x.dtype, device=x.device).index_add_(0, flat, x.reshape(B * N, D))
            return sums.view(B, K, D) / counts
        sums = torch.zeros(B * K, N, dtype=x.dtype, device=x.device).index_add_(0, flat, G.view(B * N, N))
        rows = sums.view(B, K, N) / counts
        own = rows.gather(1, a[:, None, :]).squeeze(1)  # c_{a_i} . x_i
        square = torch.zeros(B * K, dtype=x.dtype, device=x.device).index_add_(0, flat, own.reshape(-1)).view(B, K)
        square = square / counts.squeeze(-1)
    return c


def setup(data):
    return lambda: run_gram(data.x32, data.centers, data.problem.iters, data.init)


def centers(result, data):
    return result
