"""Every choice of path and tile of this backend, in one place.

Tiles are keyed on the compute capability and on the shared memory one block may have, never on a GPU's name, and are
fitted to that limit for every dtype.  A plan depends on N, D, the dtype, num_iters and the device, on K only where all
images have the same, never on the batch size: so an image's result does not depend on its batch.  What decides in which
order something is added does not depend on K, and on N only on either side of LONG.  There is no autotuning, and
no row below has been tuned on a GPU: all are the safe plan.
"""

from __future__ import annotations

import dataclasses
import functools
import os

import torch

KIB = 1024
GRAM_BYTES_LIMIT = 256 * KIB * KIB  # Gram matrices of one chunk of the batch
GRAM_MAX_TOKENS = 1536  # one program walks an image's Gram matrix: N^2 * 4 bytes, 9.4 MB, still L2-resident
LONG = 4096  # above this many tokens member lists have wider tiles of clusters, which add up weights in another order
GRID_LIMIT = 2**31 - 1  # programs a launch (grid.x)
STATS_CHUNK = 1024  # prepare.CHUNK
PATH_VARIABLE = "TOKENPOOL_EXT_TRITON_PATH"  # gram | direct: overrides the planner (tests)

Config = dict  # tile sizes by constexpr name, plus num_warps and num_stages


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan may depend on."""

    capability: int  # 10 * major + minor; 0: unknown (another vendor, or the interpreter)
    shared: int  # bytes of shared memory one block may use

    def __str__(self) -> str:
        name = f"sm_{self.capability}" if self.capability else "unknown device"
        return f"{name}, {self.shared // KIB} KiB shared memory a block"


UNKNOWN = Device(0, 64 * KIB)  # 64 KiB: what AMD's LDS and any NVIDIA GPU since Volta give


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return UNKNOWN
    limit = getattr(properties, "shared_memory_per_block_optin", 0) or UNKNOWN.shared
    return Device(10 * properties.major + properties.minor, int(limit))


def device_of(x: torch.Tensor) -> Device:
    return _cuda_device(x.get_device()) if x.is_cuda else UNKNOWN


def bucket(size: int, low: int, high: int) -> int:
    """The power of two that covers `size`, between `low` and `high`."""
    return min(high, max(low, 1 << max(0, size - 1).bit_length()))


def path(N: int, K: int, num_iters: int, per_image: bool = False) -> tuple[str, str]:
    """("gram" | "direct", why).  Costs in multiply-adds a feature: the Gram product N^2 / 2 by symmetry, direct
    N K num_iters.

    per_image: K is the largest of a tensor num_clusters, which batch mates decide, so N alone chooses.  An image then
    gives the same bits as alone with num_clusters of one element, and also as alone with an int, padding cut off its
    end,
    if both calls take the same path: not where 2 K num_iters <= N (direct for the int, gram here), or where N is above
    GRAM_MAX_TOKENS, or LONG, with padding and not above it without.
    """
    forced = os.environ.get(PATH_VARIABLE)
    if forced in ("gram", "direct"):
        return forced, f"{PATH_VARIABLE}={forced}"
    if N > GRAM_MAX_TOKENS:
        return "direct", f"N = {N} is above {GRAM_MAX_TOKENS}: a Gram matrix an image would leave the cache"
    if per_image:
        return "gram", f"N = {N} is at most {GRAM_MAX_TOKENS}, and K differs by image"
    if 2 * K * num_iters > N:
        return "gram", f"2 K num_iters = {2 * K * num_iters} > N = {N}: one Gram product costs less"
    return "direct", f"2 K num_iters = {2 * K * num_iters} <= N = {N}: {num_iters} thin products cost less"


# ---- tiles -------------------------------------------------------------------------------------------------------
# Each function lists configs, the preferred one first; launch.py tries the next when one does not compile or fit.


def shared_assign(c: Config, itemsize: int) -> int:
    """Upper bound of assign_kernel's shared memory in bytes (checked against the compiler in the tests)."""
    planes = 2 if itemsize == 2 else 1
    tokens, centers = c["BN"] * c["BD"] * itemsize, c["BK"] * c["BD"] * itemsize * planes
    stages = max(1, c["num_stages"])
    operands = (tokens + stages * centers) if c["HOLD"] else (tokens + stages * (tokens + centers))
    return max(operands, c["BN"] * c["BK"] * 4) + 4 * KIB


def shared_gram(c: Config, itemsize: int) -> int:
    tile = c["BM"] * c["BD"] * itemsize
    return max(2 * max(1, c["num_stages"]) * tile, c["BM"] * (c["BM"] + 4) * 4) + 2 * KIB


def shared_attention(c: Config, itemsize: int) -> int:
    tiles = (c["BQ"] + c["BK"]) * c["BD"] * itemsize
    return max(max(1, c["num_stages"]) * tiles, c["BQ"] * c["BK"] * 4) + 4 * KIB


def _fit(device: Device, itemsize: int, estimate, candidates: list[Config]) -> list[Config]:
    """The candidates whose shared memory fits the device; the smallest one always stays."""
    fitting = [c for c in candidates if estimate(c, itemsize) <= device.shared]
    return fitting or candidates[-1:]


def assign_configs(device: Device, D: int, itemsize: int) -> list[Config]:
    # Tokens of up to 128 half features stay in shared memory (HOLD).  Above, and for float32, steps of few features:
    # wider ones would spill registers, and take longer to compile.
    step = bucket(D, 16, 128) if D <= 128 else 32
    half = ((128, 64, step, 8, 2), (64, 64, 64 if D <= 64 else 32, 4, 2), (32, 32, 32, 4, 1), (16, 16, 16, 4, 1))
    single = ((64, 64, 16, 4, 2), (32, 32, 32, 4, 1), (16, 16, 16, 4, 1))
    found = []
    for bn, bk, bd, warps, stages in half if itemsize == 2 else single:
        bd = bucket(D, 16, bd)
        config = dict(BN=bn, BK=bk, BD=bd, HOLD=D <= bd, num_warps=warps, num_stages=stages)
        if config not in found:
            found.append(config)
    return _fit(device, itemsize, shared_assign, found)


def gram_configs(device: Device, D: int, itemsize: int) -> list[Config]:
    table = (
        ((64, 64, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1))
        if itemsize == 2
        else ((64, 32, 8, 2), (32, 32, 4, 1), (16, 16, 4, 1))
    )
    found = [dict(BM=bm, BD=bucket(D, 16, bd), num_warps=warps, num_stages=stages) for bm, bd, warps, stages in table]
    return _fit(device, itemsize, shared_gram, found)


def attention_configs(device: Device, d: int, itemsize: int) -> list[Config]:
    table = (
        ((64, 64, 128, 8, 2), (64, 64, 64, 8, 2), (32, 32, 32, 4, 1), (16, 16, 16, 4, 1))
        if itemsize == 2
        else ((64, 64, 64, 8, 2), (32, 32, 32, 4, 1), (16, 16, 16, 4, 1))
    )
    found = [
        dict(BQ=bq, BK=bk, BD=bucket(d, 16, bd), num_warps=warps, num_stages=stages)
        for bq, bk, bd, warps, stages in table
    ]
    return _fit(device, itemsize, shared_attention, found)


# The kernels below keep nothing in shared memory but the scratch of reductions (at most 16 KiB).


def iterate_configs() -> list[Config]:
    big = dict(BI=128, BJ=16, TI=16, TL=128, BLOCK=256, BLOCK_K=256, num_warps=8, num_stages=1)
    small = dict(BI=64, BJ=16, TI=16, TL=64, BLOCK=256, BLOCK_K=256, num_warps=4, num_stages=1)
    return [big, small]


def rows_config(D: int) -> Config:
    """Tile of a sum over members: R members x BD features.  R decides the order of the sum, hence one R for all."""
    return dict(R=8, BD=bucket(D, 16, 128))


def init_configs(D: int) -> list[Config]:
    return [dict(BD=bucket(D, 16, 128), num_warps=1, num_stages=1)]


def lists_configs(N: int) -> list[Config]:
    few = N <= LONG
    tile = dict(BC=4 if few else 16, BLOCK=256 if few else 1024, BLOCK_E=128, BLOCK_K=256)
    return [dict(tile, num_warps=4, num_stages=1)]


def update_configs(N: int, D: int) -> list[Config]:
    return [dict(rows_config(D), **lists_configs(N)[0])]


def exact_configs(D: int) -> list[Config]:
    return [dict(rows_config(D), BN=64, BK=32, BC=4, BLOCK=256, BLOCK_E=128, BLOCK_K=256, num_warps=8, num_stages=1)]


def finish_configs(D: int) -> list[Config]:
    return [dict(rows_config(D), BLOCK=128, num_warps=2, num_stages=1)]


def segment_configs(D: int) -> list[Config]:
    return [dict(rows_config(D), num_warps=2, num_stages=1)]


def stats_configs(D: int) -> list[Config]:
    return [dict(BN=32, BD=bucket(D, 16, 64), num_warps=4, num_stages=1)]


def settle_configs(N: int) -> list[Config]:
    return [dict(BLOCK=256 if N <= LONG else 2048, BLOCK_K=256, num_warps=4 if N <= LONG else 8, num_stages=1)]


def farthest_configs(D: int) -> list[Config]:
    return [dict(BN=64, BD=bucket(D, 16, 128), BLOCK=256, num_warps=8, num_stages=1)]


def farthest_gram_configs() -> list[Config]:
    return [dict(BLOCK=512, num_warps=4, num_stages=1)]


def block_configs() -> list[Config]:
    """Of prepare, inertia, labels and heads."""
    return [dict(BLOCK=256, num_warps=4, num_stages=1)]


def token_configs(D: int) -> list[Config]:
    """Of pool_backward and unpool."""
    return [dict(BN=16, BD=bucket(D, 16, 128), num_warps=4, num_stages=1)]


# ---- the plan of a whole clustering ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one kmeans / kmedoids call does.  Bytes are what its loops read and write of tokens, centers, Gram matrix
    and labels, an image of clusters of equal size: what goes through L2 where no cache above it helps."""

    path: str
    reason: str
    launches_before: int
    launches_per_iteration: int
    launches_after: int
    images_per_chunk: int
    bytes_per_iteration: int
    bytes_once: int
    workspace_bytes: int  # a chunk of the batch: all it allocates, results too
    flops: int  # an image, all iterations; a multiply-add is 2
    tiles: dict[str, Config]
    device: Device

    def __str__(self) -> str:
        each = (
            f"{self.launches_per_iteration} launches an iteration"
            if self.launches_per_iteration
            else "all iterations in one launch"
        )
        return (
            f"triton, {self.path} path ({self.reason}) on {self.device}: {self.launches_before} launches before, "
            f"{each}, {self.launches_after} after; {self.images_per_chunk} images a chunk, "
            f"{self.workspace_bytes / KIB / KIB:.1f} MiB of workspace; tiles {self.tiles}. Not tuned on a GPU."
        )


def gram_row(N: int) -> int:
    """Elements from one row of a Gram matrix to the next: N rounded up to 16, so that rows stay aligned."""
    return -(-N // 16) * 16


def chunk_images(B: int, N: int, K: int, which: str, gram_tile: int = 16) -> int:
    """Images a chunk: bounds the Gram workspace, and every grid to GRID_LIMIT programs."""
    programs = max(K, -(-N // 16), 1)
    images = B
    if which == "gram":
        programs = max(programs, (-(-N // gram_tile)) ** 2)
        images = min(images, GRAM_BYTES_LIMIT // max(1, 4 * N * gram_row(N)))
    return max(1, min(images, GRID_LIMIT // programs))


def plan(
    B: int,
    N: int,
    K: int,
    D: int,
    dtype: torch.dtype,
    num_iters: int = 5,
    device: Device = UNKNOWN,
    algorithm: str = "kmeans",
    per_image: bool = False,
) -> Plan:
    """The plan of `algorithm` on (B, N, D) tokens; `B` only enters the number of chunks and the workspace.  per_image:
    num_clusters is a tensor, whose largest is K."""
    itemsize = dtype.itemsize
    which, reason = path(N, K, num_iters, per_image)
    half, scaled, medoids = itemsize == 2, dtype != torch.float16, algorithm == "kmedoids"
    planes = 2 if half else 1
    images = chunk_images(B, N, K, which)
    # clustering.Chunk: numbers an image, a token, a cluster; centers; the partial statistics.
    common = 7 * 4 + 8 + N * (6 * 4 + 8) + K * (8 * 4 + 8 + D * itemsize * planes) + 4 * K * medoids
    shared = 3 * 4 * K if which == "gram" else 0  # lists of one token, the same for all images
    common += (0 if half else 4 * D) + (3 * 4 * D * -(-N // STATS_CHUNK) if scaled else 0)
    if which == "gram":
        tiles = {"gram": gram_configs(device, D, itemsize)[0], "iterate": iterate_configs()[0]}
        workspace = common + 4 * N * gram_row(N) + 2 * 4 * N
        before, each = scaled + 2 + 2, 0
        # The members' rows once for the assignment, beside lists of a token and a share; in the update labels, weights,
        # shares and products of all tokens for every tile of TI, and the rows of a cluster for each of its members.
        c = tiles["iterate"]
        per_iteration = 4 * N * N + 8 * N * -(-N // c["BI"]) + 28 * N * -(-N // c["TI"]) + 4 * N * N // K
        once = 3 * N * D * itemsize + N * D * itemsize * -(-N // tiles["gram"]["BM"]) + 4 * N * N
        flops = N * N * D + 2 * N * N * num_iters
    else:
        tiles = {"assign": assign_configs(device, D, itemsize)[0], "update": update_configs(N, D)[0]}
        workspace = common + 4 * N
        before, each = scaled + 2 + 2, 3
        assign = N * D * itemsize + -(-N // tiles["assign"]["BN"]) * K * D * itemsize * planes
        update = 4 * N * -(-K // tiles["update"]["BC"]) + N * D * itemsize + K * D * itemsize * planes
        flops = 2 * N * K * D * planes * num_iters
        per_iteration, once = assign + update + 12 * N, 4 * N * D * itemsize
    return Plan(
        which, reason, before, each, 2, images, per_iteration, once, images * workspace + shared, flops, tiles, device
    )
