"""Host side of kmeans and kmedoids: workspaces and launches, no arithmetic, no synchronisation."""

from __future__ import annotations

import torch

from . import direct, finish, gram, heuristics, prepare, start
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


class Chunk:
    """One chunk of the batch: inputs, per-image state and outputs."""

    def __init__(self, x, weights, mask, counts, init, K, medoids: bool):
        B, N, D = x.shape
        new = x.new_empty
        f32, i32, i64 = torch.float32, torch.int32, torch.int64
        self.x, self.weights, self.counts, self.init, self.K, self.medoids = x, weights, counts, init, K, medoids
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.device, self.itemsize = heuristics.device_of(x), x.element_size()
        self.half = x.dtype != f32  # products of the raw half values are exact in float32: no centering
        self.scaled = x.dtype != torch.float16  # every float16 product is in float32's range: no scaling
        self.flags = dict(CENTER=not self.half, SCALE=self.scaled, CONTIG=aligned_rows(x))
        self.xs = strides(x, x_b=0, x_n=1, x_d=2)
        self.from_tokens = not init.is_floating_point()
        self.farthest = self.from_tokens and init.shape[1] == 0  # no indices: chosen by start.py
        self.scale, self.unscale, self.w_unscale = (new(B, dtype=f32) for _ in range(3))
        self.keff, self.done = (new(B, dtype=i32) for _ in range(2))
        self.center = new((B, D) if not self.half else (1,), dtype=f32)
        self.wn, self.cost, self.coef = (new((B, N), dtype=f32) for _ in range(3))
        self.lab, self.prev, self.lst = (new((B, N), dtype=i32) for _ in range(3))
        self.start, self.cnt = (new((B, K), dtype=i32) for _ in range(2))
        self.mass, self.norms = (new((B, K), dtype=f32) for _ in range(2))
        self.medoid = new((B, K) if medoids else (1,), dtype=i32)
        # Two sets of counts, each from a multiple of 16 bytes on: Triton compiles anew for another alignment.
        room = -(-B * K // 4) * 4
        self.members = torch.zeros((2, room), dtype=i32, device=x.device)[:, : B * K].view(2, B, K)
        self.label_out = new((B, N), dtype=i64)

    # ---- before the iterations ----
    def prepare(self) -> None:
        x, (B, N, D), K = self.x, self.x.shape, self.K
        has_x = self.scaled and D > 0
        chunks = -(-N // heuristics.STATS_CHUNK)
        pre = 2.0 ** -max(0, (N - 1).bit_length())
        parts = [x.new_empty((B, chunks, D) if has_x else (1,), dtype=torch.float32) for _ in range(3)]
        part = dict(zip(("part_sum", "part_min", "part_max"), parts))
        mask = self.mask if self.mask is not None else self.lab
        mask_s = strides(mask, mask_b=0, mask_n=1)
        if has_x:

            def stats(config):
                d_tiles = -(-D // config["BD"])
                return B * chunks * d_tiles, dict(
                    part,
                    x=x,
                    mask=mask,
                    N=N,
                    D=D,
                    chunks=chunks,
                    d_tiles=d_tiles,
                    pre=pre,
                    **self.xs,
                    **mask_s,
                    HAS_MASK=self.mask is not None,
                    CONTIG=self.flags["CONTIG"],
                )

            launch(prepare.x_stats_kernel, x, heuristics.stats_configs(D), stats)
        weights = self.weights if self.weights is not None else self.wn
        counts = self.counts if self.counts is not None else self.label_out
        indexed = self.from_tokens and not self.farthest
        init = self.init if indexed else self.label_out
        launch(
            prepare.prepare_kernel,
            x,
            heuristics.block_configs(),
            lambda config: (
                B,
                dict(
                    part,
                    mask=mask,
                    weights=weights,
                    k_per_image=counts,
                    init=init,
                    scale=self.scale,
                    unscale=self.unscale,
                    center=self.center,
                    wn=self.wn,
                    w_unscale=self.w_unscale,
                    keff=self.keff,
                    done=self.done,
                    prev=self.prev,
                    label_out=self.label_out,
                    lst=self.lst,
                    coef=self.coef,
                    start=self.start,
                    cnt=self.cnt,
                    N=N,
                    D=D,
                    K=K,
                    chunks=chunks,
                    pre=pre,
                    **mask_s,
                    **strides(weights, w_b=0, w_n=1),
                    **strides(counts, counts_b=0),
                    **strides(init, init_b=0, init_k=1),
                    HAS_X=has_x,
                    CENTER=self.flags["CENTER"],
                    HAS_MASK=self.mask is not None,
                    HAS_WEIGHTS=self.weights is not None,
                    HAS_COUNTS=self.counts is not None,
                    HAS_INDEX=indexed,
                ),
            ),
        )

    # ---- direct ----
    def direct_centers(self) -> None:
        """Initial centers into the rounded planes `high` and `low`."""
        x, (B, N, D), K = self.x, self.x.shape, self.K
        self.high = x.new_empty((B, K, D))
        self.low = x.new_empty((B, K, D)) if self.half else self.high
        init = self.init if not self.from_tokens else x.new_empty((1, 1, 1), dtype=torch.float32)
        launch(
            direct.init_kernel,
            x,
            heuristics.init_configs(D),
            lambda config: (
                B * K,
                dict(
                    x=x,
                    init=init,
                    scale=self.scale,
                    center=self.center,
                    keff=self.keff,
                    lst=self.lst,
                    high=self.high,
                    low=self.low,
                    norms=self.norms,
                    medoids=self.medoid,
                    D=D,
                    K=K,
                    N=N,
                    **self.xs,
                    **strides(init, init_b=0, init_k=1, init_d=2),
                    **self.flags,
                    SPLIT=self.half,
                    FROM_TOKENS=self.from_tokens,
                    MEDOIDS=self.medoids,
                ),
            ),
        )

    def direct_assign(self, members: torch.Tensor) -> None:
        x, (B, N, D), K = self.x, self.x.shape, self.K

        def make(config):
            tiles = -(-N // config["BN"])
            return B * tiles, dict(
                x=x,
                scale=self.scale,
                center=self.center,
                wn=self.wn,
                keff=self.keff,
                done=self.done,
                high=self.high,
                low=self.low,
                norms=self.norms,
                medoids=self.medoid,
                lab=self.lab,
                cost=self.cost,
                counts=members,
                N=N,
                D=D,
                K=K,
                tiles=tiles,
                **self.xs,
                **self.flags,
                SPLIT=self.half,
                MEDOIDS=self.medoids,
                PRECISION=precision(x.dtype),
            )

        launch(direct.assign_kernel, x, heuristics.assign_configs(self.device, D, self.itemsize), make)

    def direct_iterate(self, num_iters: int) -> None:
        x, (B, N, D), K = self.x, self.x.shape, self.K
        tmp = torch.empty_like(self.lst)
        if self.farthest:
            configs = heuristics.farthest_configs(D)
            launch(
                start.farthest_kernel,
                x,
                configs,
                lambda config: (
                    B,
                    dict(
                        x=x,
                        scale=self.scale,
                        wn=self.wn,
                        keff=self.keff,
                        lst=self.lst,
                        coef=self.coef,
                        state=self.cost,
                        N=N,
                        D=D,
                        **self.xs,
                        SCALE=self.flags["SCALE"],
                        CONTIG=self.flags["CONTIG"],
                    ),
                ),
            )
        self.direct_centers()
        for t in range(num_iters):
            members, following = self.members[t % 2], self.members[(t + 1) % 2]
            self.direct_assign(members)
            configs = heuristics.settle_configs(N)
            launch(
                direct.settle_kernel,
                x,
                configs,
                lambda config: (
                    B,
                    dict(
                        keff=self.keff,
                        done=self.done,
                        lab=self.lab,
                        prev=self.prev,
                        cost=self.cost,
                        counts=members,
                        N=N,
                        K=K,
                    ),
                ),
            )
            means = int(self.medoids or t + 1 < num_iters)  # finish_kernel takes the last means itself

            def make(config):
                tiles = -(-K // config["BC"])
                return B * tiles, dict(
                    x=x,
                    scale=self.scale,
                    center=self.center,
                    wn=self.wn,
                    keff=self.keff,
                    done=self.done,
                    lab=self.lab,
                    counts=members,
                    next_counts=following,
                    tmp=tmp,
                    lst=self.lst,
                    coef=self.coef,
                    start=self.start,
                    cnt=self.cnt,
                    mass=self.mass,
                    high=self.high,
                    low=self.low,
                    norms=self.norms,
                    medoids=self.medoid,
                    N=N,
                    D=D,
                    K=K,
                    tiles=tiles,
                    means=means,
                    **self.xs,
                    **self.flags,
                    SPLIT=self.half,
                    MEDOIDS=self.medoids,
                )

            launch(direct.update_kernel, x, heuristics.update_configs(N, D), make)

    # ---- gram ----
    def gram_iterate(self, num_iters: int) -> None:
        x, (B, N, D), K = self.x, self.x.shape, self.K
        row = heuristics.gram_row(N)
        product = x.new_empty((B, N, row), dtype=torch.float32)
        share, inner = torch.empty_like(self.coef), torch.empty_like(self.coef)
        if not self.from_tokens:  # the first assignment is to given centers, which have no row in the Gram matrix
            self.direct_centers()
            self.direct_assign(self.members[0])

        def make(config):
            tiles = -(-N // config["BM"])
            return B * tiles * tiles, dict(
                x=x,
                scale=self.scale,
                center=self.center,
                wn=self.wn,
                gram=product,
                N=N,
                D=D,
                row=row,
                tiles=tiles,
                **self.xs,
                **self.flags,
                PRECISION=precision(x.dtype),
            )

        launch(gram.gram_kernel, x, heuristics.gram_configs(self.device, D, self.itemsize), make)
        if self.farthest:
            configs = heuristics.farthest_gram_configs()
            launch(
                start.farthest_gram_kernel,
                x,
                configs,
                lambda config: (
                    B,
                    dict(
                        gram=product,
                        wn=self.wn,
                        keff=self.keff,
                        lst=self.lst,
                        coef=self.coef,
                        state=self.cost,
                        squares=share,
                        N=N,
                        row=row,
                    ),
                ),
            )
        unit_coef = torch.ones(K, dtype=torch.float32, device=x.device)
        unit_cnt = torch.ones(K, dtype=torch.int32, device=x.device)
        unit_start = torch.arange(K, dtype=torch.int32, device=x.device)
        launch(
            gram.iterate_kernel,
            x,
            heuristics.iterate_configs(),
            lambda config: (
                B,
                dict(
                    gram=product,
                    wn=self.wn,
                    keff=self.keff,
                    lab=self.lab,
                    prev=self.prev,
                    cost=self.cost,
                    counts=self.members[0],
                    share=share,
                    inner=inner,
                    norms=self.norms,
                    lst=self.lst,
                    coef=self.coef,
                    start=self.start,
                    cnt=self.cnt,
                    mass=self.mass,
                    medoids=self.medoid,
                    unit_coef=unit_coef,
                    unit_start=unit_start,
                    unit_cnt=unit_cnt,
                    N=N,
                    K=K,
                    row=row,
                    num_iters=num_iters,
                    labelled=int(not self.from_tokens),
                    MEDOIDS=self.medoids,
                ),
            ),
        )

    # ---- after the iterations ----
    def finish(self, sort: bool):
        x, (B, N, D), K = self.x, self.x.shape, self.K
        centers = x.new_empty((B, K, D))
        mass, part = (x.new_empty((B, K), dtype=torch.float32) for _ in range(2))
        medoid = x.new_empty((B, K), dtype=torch.int64)
        inertia = x.new_empty(B, dtype=torch.float32)
        configs = heuristics.finish_configs(D)
        launch(
            finish.finish_kernel,
            x,
            configs,
            lambda config: (
                B * K,
                dict(
                    x=x,
                    scale=self.scale,
                    unscale=self.unscale,
                    center=self.center,
                    wn=self.wn,
                    w_unscale=self.w_unscale,
                    keff=self.keff,
                    lst=self.lst,
                    coef=self.coef,
                    start=self.start,
                    cnt=self.cnt,
                    mass=self.mass,
                    medoids=self.medoid,
                    centers_out=centers,
                    label_out=self.label_out,
                    mass_out=mass,
                    medoid_out=medoid,
                    part=part,
                    apart=self.cost,
                    N=N,
                    D=D,
                    K=K,
                    **self.xs,
                    **self.flags,
                    MEDOIDS=self.medoids,
                    SORT=sort,
                ),
            ),
        )
        launch(
            finish.inertia_kernel,
            x,
            heuristics.block_configs(),
            lambda config: (B, dict(part=part, unscale=self.unscale, w_unscale=self.w_unscale, inertia=inertia, K=K)),
        )
        return centers, self.label_out, mass, medoid, inertia


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
