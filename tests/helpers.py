"""Shared test helpers: data, tolerances with their origin, and tie-aware comparison.

Lloyd's algorithm is discontinuous: two correct implementations may break a near-tie differently and from there
on walk to different local optima.  So nothing here compares labels of two backends blindly:

* `assert_nearest`      every token sits at a center whose distance is minimal within the rounding of the dtype,
                        and only few tokens differ from the float64 argmin;
* `assert_consistent`   everything a result promises about itself (contract sections 2, 3, 5), recomputed in float64;
* `assert_identical`    bit for bit, for determinism, batch invariance and exact integer data.

The helpers are tested themselves in test_helpers.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os

import numpy as np
import torch

U32, U64 = 2.0**-24, 2.0**-53  # unit roundoff of float32 / float64


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Error bounds for one dtype.  `acc` is the accumulation dtype (contract section 5).

    distance: squared distances, relative to the largest squared token norm that enters the products
    center:   centers, relative to the largest |x|
    inertia:  relative, on top of the distance tolerance summed over tokens
    """

    acc: torch.dtype
    distance: float
    center: float
    inertia: float


# Origin of the numbers.  A dot product of D terms accumulated with unit roundoff u has a typical error of sqrt(D) u
# (worst case D u) times the norms; D <= 1536 here gives 40 u, rounded up to 64 u.  A mean of n <= 1024 members has
# a typical error of sqrt(n) u = 32 u, again 64 u; half types add the rounding of the output: 2^-11 (fp16),
# 2^-8 (bf16), taken 1.05 times.  Inertia sums N such terms: 64 u, and 1% is asked for in half types
# (measured far below: the products are exact in float32).
TOLERANCES = {
    torch.float64: Tolerance(torch.float64, 64 * U64, 64 * U64, 256 * U64),
    torch.float32: Tolerance(torch.float32, 64 * U32, 64 * U32, 256 * U32),
    torch.float16: Tolerance(torch.float32, 64 * U32, 1.05 * 2.0**-11 + 64 * U32, 1e-3),
    torch.bfloat16: Tolerance(torch.float32, 64 * U32, 1.05 * 2.0**-8 + 64 * U32, 1e-3),
}
DTYPES = list(TOLERANCES)


@dataclasses.dataclass(frozen=True)
class Target:
    """One backend under test: its registry name, the device its tensors live on, and environment to set."""

    name: str
    device: str = "cpu"
    env: tuple[tuple[str, str], ...] = ()

    @property
    def id(self) -> str:
        return "-".join([self.name, *(value for _, value in self.env)])

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter: thousands of times slower than a kernel, so bodies run it on less."""
        return self.name == "triton" and self.device == "cpu"

    @property
    def dtypes(self) -> list[torch.dtype]:
        """float64 is for the reference and the CPU (contract section 5)."""
        return [d for d in DTYPES if d != torch.float64 or self.name not in ("cuda", "triton")]

    @property
    def widest(self) -> torch.dtype:
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    @contextlib.contextmanager
    def active(self):
        old = {key: os.environ.get(key) for key, _ in self.env}
        os.environ.update(dict(self.env))
        try:
            yield self
        finally:
            for key, value in old.items():
                os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


def tokens(B, N, D, dtype=torch.float32, device="cpu", seed=0, groups=None, spread=0.3, offset=0.0):
    """(B, N, D) tokens scattered around `groups` blobs (None: plain normal).  Same values for every device/dtype."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, N, D))
    if groups:
        blobs = rng.standard_normal((B, groups, D))
        x = spread * x + np.take_along_axis(blobs, rng.integers(0, groups, (B, N))[..., None], 1)
    return torch.from_numpy(x + offset).to(dtype).to(device)


def integer_tokens(B, N, D, dtype=torch.float32, device="cpu", seed=0, low=-4, high=5):
    """Small integers: every product and sum of a first iteration is exact in float32 (N a power of two)."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(low, high, (B, N, D))).to(dtype).to(device)


def positive_weights(B, N, dtype=torch.float32, device="cpu", seed=1):
    """(B, N) weights in [0.1, 2.1)."""
    return torch.from_numpy(np.random.default_rng(seed).random((B, N)) * 2 + 0.1).to(dtype).to(device)


def spread_indices(B, N, K, device="cpu", seed=2):
    """(B, K) distinct token indices, int64."""
    rng = np.random.default_rng(seed)
    picks = [rng.permutation(N)[:K] for _ in range(B)]
    return torch.from_numpy(np.stack(picks).astype(np.int64) if B else np.zeros((0, K), np.int64)).to(device)


def f64(t):
    """Tensor -> float64 numpy array."""
    return t.detach().double().cpu().numpy()


def squared_distances(x, c):
    """(N, D), (K, D) float64 arrays -> (N, K), by differences (no cancellation)."""
    return np.stack([((x - row) ** 2).sum(-1) for row in c], -1) if len(c) else np.zeros((len(x), 0))


def distance_slack(x, dtype):
    """Absolute error allowed in one squared distance between tokens of `x` (N, D) float64.

    float32/float64 subtract the image's mean token first, so the centered norm counts; half types may use raw tokens.
    """
    if x.size == 0:
        return 0.0
    y = x - x.mean(0) if dtype in (torch.float32, torch.float64) else x
    # centering itself rounds each coordinate by a few u * max|x|, a vector of length e = 4 sqrt(D) u max|x|
    u = U64 if dtype == torch.float64 else U32
    norm = np.sqrt((y * y).sum(-1).max())
    e = 4 * np.sqrt(x.shape[1]) * u * np.abs(x).max()
    return TOLERANCES[dtype].distance * norm**2 + 2 * norm * e + e * e


def assert_nearest(x, centers, labels, dtype, *, max_flips=0.02, what=""):
    """Labels (N,) name a nearest center up to ties.  All arguments are float64/int arrays of one image.

    A label that differs from the argmin must be a tie within `distance_slack`; at most `max_flips` of the tokens
    (and one) may differ, so a systematic error cannot hide behind the tolerance.
    """
    d = squared_distances(x, centers)
    rows = np.arange(len(x))
    best = d.argmin(1)
    excess = d[rows, labels] - d[rows, best]
    slack = 2 * distance_slack(x, dtype)
    worst = int(excess.argmax()) if len(x) else 0
    assert not len(x) or excess[worst] <= slack, (
        f"{what} token {worst}: label {labels[worst]} is {excess[worst]:.3g} farther than center {best[worst]} "
        f"(allowed {slack:.3g})"
    )
    flips = int(((labels != best) & (excess > 0)).sum())
    assert flips <= 1 + max_flips * len(x), f"{what} {flips} of {len(x)} labels differ from the float64 argmin"


def weighted_mean(x, w):
    """Contract: weighted mean; plain mean when the weights add up to zero.  (n, D), (n,) float64."""
    total = w.sum()
    if total == 0:
        return x.mean(0)
    p = w / w.max()  # avoids overflow for any scale of the weights
    return (p[:, None] * x).sum(0) / p.sum()


def _cost(w, d):
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(w == 0, 0.0, w * d)


def assert_consistent(
    result, x, K, *, weights=None, mask=None, counts=None, algorithm="kmeans", init=None, finite=True, sort=False
):
    """Everything a `Clusters` result promises about itself, recomputed in float64.

    x (B, N, D) tensor; K the padded number of clusters; weights/mask/counts as passed to the call.
    `init`: when the call ran one iteration from (B, K) indices with no empty cluster, checks the labels too.
    """
    B, N, D = x.shape
    tol = TOLERANCES[x.dtype]
    assert result._fields == ("centers", "assignment", "mass", "medoids", "inertia")
    assert result.centers.shape == (B, K, D) and result.centers.dtype == x.dtype
    assert result.assignment.shape == (B, N) and result.assignment.dtype == torch.int64
    assert result.mass.shape == (B, K) and result.mass.dtype == tol.acc
    assert result.inertia.shape == (B,) and result.inertia.dtype == tol.acc
    assert result.medoids.shape == (B, K) and result.medoids.dtype == torch.int64
    for t in result:
        assert t.device.type == x.device.type
    X, centers, mass, inertia = f64(x), f64(result.centers), f64(result.mass), f64(result.inertia)
    labels = result.assignment.cpu().numpy()
    medoids = result.medoids.cpu().numpy()
    W = np.ones((B, N)) if weights is None else f64(weights)
    valid = np.ones((B, N), bool) if mask is None else mask.cpu().numpy()
    per_image = np.full(B, K) if counts is None else np.asarray(counts)
    if finite:
        assert np.isfinite(centers).all() and np.isfinite(mass).all() and np.isfinite(inertia).all()
    for b in range(B):
        real = np.flatnonzero(valid[b])
        k = min(int(per_image[b]), len(real))
        where = f"image {b}:"
        assert (labels[b][~valid[b]] == -1).all(), f"{where} padding must be labelled -1"
        got = labels[b][real]
        assert ((got >= 0) & (got < max(k, 1))).all(), f"{where} labels outside [0, {k}): {got.min()}..{got.max()}"
        assert (centers[b, k:] == 0).all() and (mass[b, k:] == 0).all(), f"{where} padded clusters must be zero"
        assert (medoids[b, k:] == -1).all(), f"{where} padded medoids must be -1"
        sizes = np.bincount(got, minlength=K)[:K] if len(real) else np.zeros(K, int)
        assert (sizes[:k] > 0).all(), f"{where} empty clusters {np.flatnonzero(sizes[:k] == 0)}"
        if not finite:
            continue
        largest = np.abs(X[b][real]).max() if len(real) and D else 0.0
        slack = distance_slack(X[b][real], x.dtype)
        total, used = 0.0, 0.0
        first, totals, means = [], [], []
        for j in range(k):
            members = real[got == j]
            first.append(members[0])
            w, rows = W[b][members], X[b][members]
            mu = weighted_mean(rows, w)
            totals.append(w.sum())
            means.append(mu)
            m = medoids[b, j]
            assert m in members, f"{where} medoid {m} of cluster {j} is not one of its members"
            if algorithm == "kmedoids" and w.sum() == 0:
                assert m == members[0], f"{where} weightless cluster {j}: medoid must be its lowest member"
            else:
                d = ((rows - mu) ** 2).sum(-1)
                if algorithm == "kmedoids":  # what weighs nothing moves nothing
                    d[w == 0] = np.inf
                assert d[list(members).index(m)] <= d.min() + 2 * slack, (
                    f"{where} medoid {m} of cluster {j} is not the member nearest to its mean"
                )
            if algorithm == "kmeans":
                c = mu
            else:
                assert torch.equal(result.centers[b, j].cpu(), x[b, m].cpu()), f"{where} center {j} is not row {m}"
                c = X[b, m]
            with np.errstate(over="ignore"):
                total += _cost(w, ((rows - c) ** 2).sum(-1)).sum()
            used += w.sum()
        np.testing.assert_allclose(  # once for all clusters: it takes longer than all the rest
            mass[b, :k],
            totals,
            rtol=64 * (U64 if tol.acc == torch.float64 else U32),
            err_msg=f"{where} masses of clusters",
        )
        if algorithm == "kmeans" and k:
            np.testing.assert_allclose(
                centers[b, :k],
                means,
                rtol=0,
                atol=tol.center * largest + 1e-300 + tiny_step(x.dtype),
                err_msg=f"{where} centers are not their means",
            )
        if sort:
            assert first == sorted(first), f"{where} clusters are not ordered by their smallest member"
        limit = float(torch.finfo(tol.acc).max)
        with np.errstate(over="ignore"):
            bound = tol.inertia * total + used * slack + float(torch.finfo(tol.acc).tiny)
        if total + bound < limit:
            assert abs(inertia[b] - total) <= bound, f"{where} inertia {inertia[b]:.9g}, recomputed {total:.9g}"
        else:  # beyond the largest number, or only with the room left for rounding
            least = 0.9 * limit if np.isinf(total) else min(total - bound, 0.9 * limit)
            assert inertia[b] >= least, (
                f"{where} inertia must saturate at the largest {tol.acc}, recomputed {total:.9g}"
            )
        if init is not None:
            keep = init[b, :k].cpu().numpy()
            assert_nearest(X[b][real], X[b][keep], got, x.dtype, what=where)


def tiny_step(dtype):
    """Spacing of the subnormal numbers: the absolute error a rounding may make near zero."""
    info = torch.finfo(dtype)
    return float(info.tiny) * float(info.eps)


def assert_identical(a, b, *, what=""):
    """Two results (tensors, tuples, None) agree bit for bit, NaN equal to NaN; says where they first differ."""
    if a is None or b is None:
        assert a is None and b is None, f"{what}: one is None"
        return
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape and a.dtype == b.dtype, (
            f"{what}: {a.dtype}{tuple(a.shape)} vs {b.dtype}{tuple(b.shape)}"
        )
        same = (a == b) | ((a != a) & (b != b))
        if not bool(same.all()):
            at = tuple((~same).nonzero()[0].tolist())
            raise AssertionError(
                f"{what}: {int((~same).sum())} of {a.numel()} differ, first at {at}: "
                f"{a[at].item()!r} vs {b[at].item()!r}"
            )
        return
    assert len(a) == len(b), f"{what}: lengths {len(a)} and {len(b)}"
    for i, (p, q) in enumerate(zip(a, b)):
        assert_identical(p, q, what=f"{what}.{getattr(a, '_fields', range(len(a)))[i]}")


def assert_same_bits(backend, a, b, *, what=""):
    """Bit for bit on a backend with kernels; within rounding on the reference, whose library products may sum in
    another order for another layout or batch size (its documentation says so)."""
    if backend.name != "reference":
        return assert_identical(a, b, what=what)
    pairs = [(a, b)] if isinstance(a, torch.Tensor) else zip(a, b)
    for p, q in pairs:
        if p is not None:
            torch.testing.assert_close(p, q, msg=lambda m: f"{what} {m}")


def take(result, index):
    """`Clusters` (or any tuple of tensors) restricted to some images."""
    items = [None if t is None else t[index] for t in result]
    return type(result)(*items) if hasattr(result, "_fields") else tuple(items)


def distinct_partitions(a, b):
    """True when two label arrays describe different partitions (labels may be renamed)."""
    pairs = set(zip(a.tolist(), b.tolist()))
    return not (len(pairs) == len({p for p, _ in pairs}) == len({q for _, q in pairs}))


def tiny_vit(name: str, **extra):
    """A model of transformers for 5 labels: 4 blocks of width 32, 4 heads, 16 patches of a 56 x 56 image."""
    import transformers

    kind = {"dinov2": "Dinov2", "dinov2-registers": "Dinov2WithRegisters", "vit": "ViT", "deit": "DeiT"}[name]
    config = getattr(transformers, f"{kind}Config")(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "num_labels": 5,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **({"layerscale_value": 0.5} if "dinov2" in name else {"intermediate_size": 64}),
            **extra,
        }
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    with torch.no_grad():  # the initial weights are so small that attention is uniform
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
            elif "token" in name or "position" in name:
                parameter.normal_()
    return model
