"""Host side of kmeans and kmedoids: workspaces and launches, no arithmetic, no synchronisation."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from . import direct, exact, finish, gram, heuristics, nearest, prepare, start
from .launch import launch


def precision(dtype: torch.dtype) -> str:
    """Input precision of products: TF32 only for float32 and only where the user has allowed it for matmuls."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    try:
        allowed = matmul.allow_tf32
    except RuntimeError:  # set through its successor, which the old name refuses to read
        allowed = matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def strides(tensor: torch.Tensor, **names: int) -> dict[str, int]:
    """Strides in elements by argument name: strides(x, x_b=0, x_n=1)."""
    return {name: tensor.stride(dim) for name, dim in names.items()}


def aligned_rows(x: torch.Tensor) -> bool:
    """Rows (last dimension) may be read in 16-byte pieces."""
    return (
        x.stride(-1) == 1
        and x.shape[-1] % 8 == 0
        and x.stride(-2) % 8 == 0
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
    )


@functools.cache
def parameters(kernel) -> tuple[str, ...]:
    return tuple(inspect.signature(kernel.fn).parameters)


class Chunk:
    """One chunk of the batch: inputs, per-image state and outputs, all in `known` by the names kernels call them."""

    def __init__(self, x, weights, mask, counts, init, K, medoids: bool):
        self.x, self.shape, self.K = x, x.shape, K
        B, N, D = x.shape
        new = x.new_empty
        f32, i32, i64 = torch.float32, torch.int32, torch.int64
        self.device, self.itemsize = heuristics.device_of(x), x.element_size()
        half = x.dtype != f32  # products of the raw half values are exact in float32: no centering
        scaled = x.dtype != torch.float16  # every float16 product is in float32's range: no scaling
        self.from_tokens = not init.is_floating_point()
        self.farthest = self.from_tokens and init.shape[1] == 0  # no indices: chosen by start.py
        indexed = self.from_tokens and not self.farthest
        # Two sets of counts, each from a multiple of 16 bytes on: Triton compiles anew for another alignment.
        room = -(-B * K // 4) * 4
        self.members = torch.zeros((2, room), dtype=i32, device=x.device)[:, : B * K].view(2, B, K)
        self.label_out, self.high = new((B, N), dtype=i64), new((B, K, D))
        self.known = known = dict(x=x, N=N, D=D, K=K, PRECISION=precision(x.dtype), **strides(x, x_b=0, x_n=1, x_d=2))
        known |= dict(HAS_X=scaled and D > 0, CENTER=not half, SCALE=scaled, SPLIT=half, CONTIG=aligned_rows(x))
        known |= dict(HAS_MASK=mask is not None, HAS_WEIGHTS=weights is not None, HAS_COUNTS=counts is not None)
        known |= dict(HAS_INDEX=indexed, FROM_TOKENS=self.from_tokens, FARTHEST=self.farthest, MEDOIDS=medoids)
        known |= {name: new(B, dtype=f32) for name in ("scale", "unscale", "w_unscale")}
        known |= {name: new(B, dtype=i32) for name in ("keff", "done", "exact")}
        known |= {name: new((B, N), dtype=f32) for name in ("wn", "cost", "coef")}
        known |= {name: new((B, N), dtype=i32) for name in ("lab", "prev", "lst")}
        known |= {name: new((B, K), dtype=i32) for name in ("start", "cnt")}
        known |= {name: new((B, K), dtype=f32) for name in ("mass", "norms")}
        known |= dict(
            label_out=self.label_out,
            loss=new(B, dtype=torch.float64),
            center=new((B, D) if not half else (1,), dtype=f32),
            medoids=new((B, K) if medoids else (1,), dtype=i32),
            # A center is kept in x's dtype, and for half types with what that rounds off.
            high=self.high,
            low=new((B, K, D)) if half else self.high,
        )
        # What a kernel is given for an argument that it does not use: anything of the right dtype.
        mask = known["lab"] if mask is None else mask.view(torch.uint8)
        weights = known["wn"] if weights is None else weights
        counts = self.label_out if counts is None else counts
        known |= dict(mask=mask, weights=weights, k_per_image=counts, init=init if indexed else self.label_out)
        known |= strides(mask, mask_b=0, mask_n=1) | strides(weights, w_b=0, w_n=1) | strides(counts, counts_b=0)
        known |= strides(known["init"], init_b=0, init_k=1)
        self.given = new((1, 1, 1), dtype=f32) if self.from_tokens else init

    def run(self, kernel, configs, over: int, tile: str | None = None, **given) -> None:
        """Launch for each image `over` programs, or as many as it has tiles of config[tile]."""

        def make(config):
            tiles = -(-over // config[tile]) if tile else over
            known = {**self.known, "tiles": tiles, **given}
            return self.shape[0] * tiles, {name: known[name] for name in parameters(kernel) if name not in config}

        launch(kernel, self.x, configs, make)

    # ---- before the iterations ----
    def prepare(self) -> None:
        known, (B, N, D) = self.known, self.shape
        chunks, has_x = -(-N // heuristics.STATS_CHUNK), known["HAS_X"]
        shape = (B, chunks, D) if has_x else (1,)
        part = {name: self.x.new_empty(shape, dtype=torch.float32) for name in ("part_sum", "part_min", "part_max")}
        part |= dict(chunks=chunks, pre=2.0 ** -max(0, (N - 1).bit_length()))
        if has_x:
            configs = heuristics.stats_configs(D)
            d_tiles = -(-D // configs[0]["BD"])
            self.run(prepare.x_stats_kernel, configs, chunks * d_tiles, d_tiles=d_tiles, **part)
        self.run(prepare.prepare_kernel, heuristics.block_configs(), 1, **part)

    def centers(self) -> None:
        """Initial centers, from tokens or as given."""
        init = dict(init=self.given, **strides(self.given, init_b=0, init_k=1, init_d=2))
        self.run(direct.init_kernel, heuristics.init_configs(self.shape[2]), self.K, **init)

    def assign(self, members: torch.Tensor, first: bool = False, only_exact: bool = False) -> None:
        configs = heuristics.assign_configs(self.device, self.shape[2], self.itemsize)
        options = dict(counts=members, squares=self.known["coef"], first=int(first), only_exact=int(only_exact))
        self.run(nearest.assign_kernel, configs, self.shape[1], "BN", **options)

    # ---- direct ----
    def direct_iterate(self, num_iters: int) -> None:
        known, (_, N, D) = self.known, self.shape
        tmp = torch.empty_like(known["lst"])
        if self.farthest:
            self.run(start.farthest_kernel, heuristics.farthest_configs(D), 1, state=known["cost"])
        self.centers()
        settle, update = heuristics.settle_configs(N), heuristics.update_configs(N, D)
        for t in range(num_iters):
            members, following = self.members[t % 2], self.members[(t + 1) % 2]
            self.assign(members, first=t == 0)
            if t == 0:  # once more, by differences, where products cannot tell the distances apart
                self.run(nearest.resolve_kernel, settle, 1, counts=members, squares=known["coef"])
                self.assign(members, only_exact=True)
            self.run(direct.settle_kernel, settle, 1, counts=members, t=t)
            means = int(known["MEDOIDS"] or t + 1 < num_iters)  # finish_kernel takes the last means itself
            options = dict(counts=members, next_counts=following, tmp=tmp, means=means)
            self.run(direct.update_kernel, update, self.K, "BC", **options)

    # ---- gram ----
    def gram_iterate(self, num_iters: int) -> None:
        x, known, (B, N, D) = self.x, self.known, self.shape
        row = heuristics.gram_row(N)
        known |= dict(gram=x.new_empty((B, N, row), dtype=torch.float32), row=row, counts=self.members[0])
        share, inner = torch.empty_like(known["coef"]), torch.empty_like(known["coef"])
        if not self.from_tokens:  # the first assignment is to given centers, which have no row in the Gram matrix
            self.centers()
            self.assign(self.members[0])
        self.gram_product()
        if self.farthest:
            configs = heuristics.farthest_gram_configs()
            self.run(start.farthest_gram_kernel, configs, 1, state=known["cost"], squares=share)
        unit = dict(
            unit_coef=torch.ones(self.K, dtype=torch.float32, device=x.device),
            unit_cnt=torch.ones(self.K, dtype=torch.int32, device=x.device),
            unit_start=torch.arange(self.K, dtype=torch.int32, device=x.device),
        )
        options: dict[str, Any] = dict(
            share=share, inner=inner, num_iters=num_iters, labelled=int(not self.from_tokens), **unit
        )
        self.run(gram.iterate_kernel, heuristics.iterate_configs(), 1, **options)
        tmp = share.view(torch.int32)
        self.run(exact.exact_kernel, heuristics.exact_configs(D), 1, tmp=tmp, num_iters=num_iters)

    def gram_product(self) -> None:
        configs = heuristics.gram_configs(self.device, self.shape[2], self.itemsize)

        def make(config):
            tiles = -(-self.shape[1] // config["BM"])
            known = {**self.known, "tiles": tiles}
            names = parameters(gram.gram_kernel)
            return self.shape[0] * tiles * tiles, {name: known[name] for name in names if name not in config}

        launch(gram.gram_kernel, self.x, configs, make)

    # ---- after the iterations ----
    def finish(self, sort: bool):
        x, known, (B, _, D), K = self.x, self.known, self.shape, self.K
        mass, part = (x.new_empty((B, K), dtype=torch.float32) for _ in range(2))
        medoid = x.new_empty((B, K), dtype=torch.int64)
        inertia = x.new_empty(B, dtype=torch.float32)
        results = dict(
            centers_out=self.high, mass_out=mass, medoid_out=medoid, part=part, apart=known["cost"], SORT=sort
        )
        self.run(finish.finish_kernel, heuristics.finish_configs(D), K, **results)
        self.run(finish.inertia_kernel, heuristics.block_configs(), 1, part=part, inertia=inertia)
        return self.high, self.label_out, mass, medoid, inertia


def cluster(x, weights, mask, counts, init, K: int, num_iters: int, sort: bool, medoids: bool):
    """(centers, assignment, mass, medoids, inertia) of one call; arguments as tokenpool_ext_triton::kmeans."""
    B, N, D = x.shape
    if B == 0 or N == 0:
        return (
            x.new_zeros((B, K, D)),
            x.new_empty((B, N), dtype=torch.int64),
            x.new_zeros((B, K), dtype=torch.float32),
            x.new_full((B, K), -1, dtype=torch.int64),
            x.new_zeros(B, dtype=torch.float32),
        )
    which, _ = heuristics.path(N, K, num_iters, counts is not None)
    return _chunks(x, weights, mask, counts, init, K, sort, medoids, which, num_iters)


def _chunks(x, weights, mask, counts, init, K: int, sort: bool, medoids: bool, which: str, num_iters: int):
    """One chunk of the batch after the other."""
    B, N, _ = x.shape
    step = heuristics.chunk_images(B, N, K, which)
    results = []
    for b in range(0, B, step):
        images = slice(b, min(B, b + step))
        x_, weights_, mask_, counts_, init_ = (
            None if t is None else t[images] for t in (x, weights, mask, counts, init)
        )
        chunk = Chunk(x_, weights_, mask_, counts_, init_, K, medoids)
        chunk.prepare()
        if which == "gram":
            chunk.gram_iterate(num_iters)
        else:
            chunk.direct_iterate(num_iters)
        results.append(chunk.finish(sort))
    if len(results) == 1:
        return results[0]
    return tuple(torch.cat(parts) for parts in zip(*results))
