"""Host side of pool, unpool, their gradients and attention_received."""

from __future__ import annotations

import torch

from . import attention, heuristics, lists, pooling
from .clustering import precision, strides
from .launch import launch

LARGEST = torch.finfo(torch.float32).max


def _labels(assignment, weights, B: int, N: int, K: int):
    """int32 labels (B, N), float32 weights (B, N) and int32 cluster sizes (B, K)."""
    lab = assignment.new_empty((B, N), dtype=torch.int32)
    wn = assignment.new_empty((B, N), dtype=torch.float32)
    sizes = torch.zeros((B, K), dtype=torch.int32, device=assignment.device)
    given = weights if weights is not None else wn
    configs = heuristics.block_configs()
    launch(
        pooling.labels_kernel,
        assignment,
        configs,
        lambda config: (
            -(-B * N // config["BLOCK"]),
            dict(
                assignment=assignment,
                weights=given,
                lab=lab,
                wn=wn,
                counts=sizes,
                N=N,
                K=K,
                total=B * N,
                **strides(assignment, a_b=0, a_n=1),
                **strides(given, w_b=0, w_n=1),
                HAS_WEIGHTS=weights is not None,
            ),
        ),
    )
    return lab, wn, sizes


def segment(x, assignment, weights, K: int, mean: bool):
    """((B, K, D) means or sums of the rows of x by label, (B, K) float32 masses)."""
    B, N, D = x.shape
    if B == 0 or N == 0:
        return x.new_zeros((B, K, D)), x.new_zeros((B, K), dtype=torch.float32)
    lab, wn, sizes = _labels(assignment, weights, B, N, K)
    tmp, lst = torch.empty_like(lab), torch.empty_like(lab)
    start, cnt, coef = torch.empty_like(sizes), torch.empty_like(sizes), torch.empty_like(wn)
    mass = wn.new_empty((B, K))

    def grouped(config):
        tiles = -(-K // config["BC"])
        return B * tiles, dict(
            wn=wn,
            lab=lab,
            counts=sizes,
            tmp=tmp,
            lst=lst,
            coef=coef,
            start=start,
            cnt=cnt,
            mass=mass,
            N=N,
            K=K,
            tiles=tiles,
        )

    launch(lists.lists_kernel, x, heuristics.lists_configs(N), grouped)
    out = x.new_empty((B, K, D))
    configs = heuristics.segment_configs(D)
    launch(
        pooling.segment_kernel,
        x,
        configs,
        lambda config: (
            B * K,
            dict(
                x=x,
                lst=lst,
                coef=coef,
                start=start,
                cnt=cnt,
                out=out,
                N=N,
                D=D,
                K=K,
                **strides(x, x_b=0, x_n=1, x_d=2),
                MEAN=mean,
            ),
        ),
    )
    return out, mass


def pool_backward(grad_centers, x, centers, assignment, weights, mass):
    """(grad_x (B, N, D) x.dtype, grad_weights (B, N) float32; zeros without weights)."""
    B, N, D = x.shape
    K = centers.shape[1]
    grad_x = x.new_zeros((B, N, D)) if D == 0 else x.new_empty((B, N, D))
    grad_w = x.new_zeros((B, N), dtype=torch.float32)
    if B * N == 0:
        return grad_x, grad_w
    lab, wn, sizes = _labels(assignment, weights, B, N, K)

    def make(config):
        tiles = -(-N // config["BN"])
        return B * tiles, dict(
            grad=grad_centers,
            x=x,
            centers=centers,
            lab=lab,
            wn=wn,
            mass=mass.contiguous(),
            counts=sizes,
            grad_x=grad_x,
            grad_w=grad_w,
            N=N,
            D=D,
            K=K,
            tiles=tiles,
            **strides(grad_centers, g_b=0, g_k=1, g_d=2),
            **strides(x, x_b=0, x_n=1, x_d=2),
            **strides(centers, c_b=0, c_k=1, c_d=2),
            HAS_WEIGHTS=weights is not None,
        )

    launch(pooling.pool_backward_kernel, x, heuristics.token_configs(D), make)
    return grad_x, grad_w


def unpool(centers, assignment):
    (B, K, D), N = centers.shape, assignment.shape[1]
    out = centers.new_empty((B, N, D))
    if out.numel() == 0:
        return out

    def make(config):
        tiles = -(-N // config["BN"])
        return B * tiles, dict(
            centers=centers,
            assignment=assignment,
            out=out,
            N=N,
            D=D,
            K=K,
            tiles=tiles,
            **strides(centers, c_b=0, c_k=1, c_d=2),
            **strides(assignment, a_b=0, a_n=1),
        )

    configs = heuristics.token_configs(D)
    launch(pooling.unpool_kernel, centers, configs, make)
    return out


def attention_received(q, k, scale: float, lse):
    B, H, Nq, d = q.shape
    N = k.shape[2]
    out = q.new_zeros((B, N), dtype=torch.float32)
    if B * H * Nq * N == 0:
        return out
    if q.dtype != k.dtype:
        common = torch.promote_types(q.dtype, k.dtype)
        q, k = q.to(common), k.to(common)
    device = heuristics.device_of(q)
    configs = heuristics.attention_configs(device, d, q.element_size())
    shared = dict(
        q=q,
        k=k,
        factor=min(max(float(scale), -LARGEST), LARGEST),
        H=H,
        Nq=Nq,
        N=N,
        d=d,
        PRECISION=precision(q.dtype),
        **strides(q, q_b=0, q_h=1, q_n=2, q_d=3),
        **strides(k, k_b=0, k_h=1, k_n=2, k_d=3),
    )
    top, has_top = lse, lse is None
    if has_top:
        top, lse = q.new_empty((2, B, H, Nq), dtype=torch.float32)

        def rows(config):
            tiles = -(-Nq // config["BQ"])
            return B * H * tiles, dict(shared, top=top, lse=lse, tiles=tiles)

        launch(attention.lse_kernel, q, configs, rows)
    part = q.new_empty((B, H, N), dtype=torch.float32)

    def columns(config):
        tiles = -(-N // config["BK"])
        row = dict(top=top, lse=lse, HAS_TOP=has_top, **strides(lse, l_b=0, l_h=1, l_n=2))
        return B * H * tiles, dict(shared, **row, part=part, tiles=tiles)

    launch(attention.received_kernel, q, configs, columns)

    def heads(config):
        tiles = -(-N // config["BLOCK"])
        return B * tiles, dict(part=part, out=out, H=H, N=N, inverse=1.0 / (H * Nq), tiles=tiles)

    launch(attention.heads_kernel, q, heuristics.block_configs(), heads)
    return out
