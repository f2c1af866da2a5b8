"""Pooling the tokens of one block: what is pooled how (:class:`Setup`), and what is where after it (:class:`State`)."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..baselines import BipartiteMatching, GridPooling
from ..functional import Clusters
from ..modules import TokenPooling
from ..positions import grid_positions
from ..reduction import TokenReduction
from ..reference_steps import nearest_members
from .inputs import Form, take
from .tap import Tap

if TYPE_CHECKING:
    from .recording import Record

COVERING = (TokenPooling, BipartiteMatching, GridPooling)  # every token is in a cluster


class State(NamedTuple):
    """Where the tokens of one forward are. B images, N tokens before any pooling, K now."""

    labels: Tensor  # (B, N) int64: the current token each original one is in; -1 if dropped
    index: Tensor  # type: ignore[assignment]  # (B, K) int64: the original token each current one stands for, a member
    sizes: Tensor | None  # (B, K) float: how many original tokens it stands for
    drops: bool  # whether a label can be -1
    bias: Tensor | None  # (B, 1, 1, K) log sizes, for the attention product


@dataclass
class Setup:
    """What the blocks of one patched model share; it does not change between forwards."""

    depth: int
    first: int  # the first block that pools
    prefix: int  # protected tokens in front
    suffix: int  # protected tokens at the end
    protect: tuple[int, ...]  # other protected tokens; negative: from the end
    length: int  # of the tokens among which they were seen; 0: the user's
    outside: str  # "full" or "short"
    position: str  # "block" or "attention"
    cluster_on: str
    track_size: bool = False
    positions: Tensor | None = None  # (n, P) of the tokens that may be pooled; None: a square grid's
    form: Form = field(default=None)  # type: ignore[assignment]  # how the blocks take tokens and side inputs: the probe
    num_protected: int = 0

    def __post_init__(self) -> None:
        self.num_protected = self.prefix + self.suffix + len(self.protect)

    def protected(self, n: int) -> list[int]:
        if self.length not in (0, n):
            raise ValueError(
                f"patch: tokens {list(self.protect)} of {self.length} were seen to be the same for every input and are"
                f" never pooled; {n} tokens came, of which only you know: patch again with protect=..."
            )
        inner = {i % n for i in self.protect if -n <= i < n}
        return sorted({*range(self.prefix), *range(n - self.suffix, n), *inner})


def moved(index: Tensor, by: int) -> Tensor:
    """Indices of what now is ``by`` places further on; -1 stays."""
    return torch.where(index < 0, -1, index + by)


def through(labels: Tensor, on: Tensor) -> Tensor:
    """(B, N) labels of what is labelled ``on`` (B, K) in its turn; -1 stays."""
    return torch.where(labels < 0, -1, on.gather(1, labels.clamp(min=0)))


@dataclass
class Reducer:
    """Pools the tokens of one call of a block and brings the state up to date."""

    setup: Setup
    index: int  # of the block
    pooling: nn.Module
    tap: Tap
    valid: Tensor | None  # (B, T) True for real tokens
    state: State | None
    n: int
    records: tuple[Record, ...]
    scored: bool
    ends: list[int]  # where the sequences packed into one end
    before: Any = None  # (B, T, D) the tokens that were pooled

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, T, D) to (B, K, D)."""
        setup, state, pooling, valid, ends = self.setup, self.state, self.pooling, self.valid, self.ends
        self.before = tokens
        b, t, _ = tokens.shape
        p = setup.num_protected
        scores = self.tap.scores(valid) if self.scored else None
        features = self.tap.keys() if setup.cluster_on == "keys" else None
        places = self.places(b, tokens.device) if getattr(pooling, "position_weight", 0) else None
        sizes = None if state is None else state.sizes
        if setup.track_size and sizes is None:
            sizes = torch.ones(b, t, device=tokens.device, dtype=torch.float32)
        given: list[Any] = [tokens, scores, features, places, valid, sizes]
        order: Tensor | None = None
        if p > setup.prefix:  # bring the protected ones to the front
            order = self.front(b, tokens.device)
            given = [None if v is None else take(v, order) for v in given]
        if ends and p:  # of those that may be pooled
            free = (torch.arange(t, device=tokens.device) if order is None else order[0])[p:]
            ends = [int((free < end).sum()) for end in ends]
        pooled, clusters, sizes = reduce_each(pooling, given, p, ends) if ends else reduce(pooling, given, p)
        for record in self.records:
            record.add(self.index, clusters)
        tokens, *_, valid, _ = given
        labels, medoids = clusters.assignment, clusters.medoids
        covering = isinstance(pooling, COVERING)
        if setup.outside == "full" and not covering:
            labels = shown(tokens[:, p:], pooled[:, p:], clusters, None if valid is None else valid[:, p:], ends)
        complete = covering and valid is None  # every token is in a cluster, every cluster has a token
        if p:
            lead = torch.arange(p, device=labels.device).expand(b, p)
            up = operator.add if complete else moved
            labels, medoids = torch.cat([lead, up(labels, p)], dim=1), torch.cat([lead, up(medoids, p)], dim=1)
        if not complete:  # padding stands for a cluster that an image does not have
            spare = labels < 0 if valid is None else ~valid
            medoids = torch.where(medoids < 0, spare.int().argmax(dim=1, keepdim=True), medoids)
        if order is not None:
            medoids, labels = order.gather(1, medoids), labels.gather(1, order.argsort(dim=1))
        drops = valid is not None or (setup.outside == "short" and not covering)
        if state is not None:
            medoids, drops = state.index.gather(1, medoids), drops or state.drops
            labels = through(state.labels, labels) if drops else labels.gather(1, state.labels)
        if setup.form.layout == "packed" or (setup.outside == "short" and order is not None):
            by = medoids.argsort(dim=1)  # by what they stand for, so that a suffix is at the end again
            pooled, medoids, sizes = take(pooled, by), take(medoids, by), None if sizes is None else take(sizes, by)
            labels = through(labels, by.argsort(dim=1))
        bias = None if sizes is None else sizes.log()[:, None, None]
        self.state = State(labels, medoids, sizes, drops, bias)
        return pooled

    def places(self, b: int, device: torch.device) -> Tensor:
        """(B, T, P) coordinates of the tokens left; zeros of protected ones."""
        setup, n = self.setup, self.n
        free = n - setup.num_protected
        given = grid_positions(free, device) if setup.positions is None else setup.positions.to(device)
        if len(given) != free:
            raise ValueError(f"patch: positions must be of the {free} tokens that may be pooled, got {len(given)}")
        protected = set(setup.protected(n))
        places = given.new_zeros(n, given.shape[1])
        places[[i for i in range(n) if i not in protected]] = given
        return places.expand(b, -1, -1) if self.state is None else places[self.state.index]

    def front(self, b: int, device: torch.device) -> Tensor:
        """(B, T) the order that has the protected tokens first."""
        free = torch.ones(self.n, dtype=torch.int32, device=device)
        free[self.setup.protected(self.n)] = 0
        left = free.expand(b, -1) if self.state is None else free[self.state.index]
        return left.argsort(dim=1, stable=True)


def reduce_each(pooling: nn.Module, given: list[Any], p: int, ends: list[int]) -> tuple[Tensor, Clusters, Any]:
    """:func:`reduce` of packed sequences, each by itself; ``ends`` do not count the P protected tokens in front."""
    tokens, *_, sizes = given
    parts: list[Any] = []
    k = 0
    for start, end in pairwise([0, *ends]):
        own = [None if t is None else torch.cat([t[:, :p], t[:, p + start : p + end]], dim=1) for t in given]
        out, clusters, left = reduce(pooling, own, p)
        labels, medoids = moved(clusters.assignment, k), moved(clusters.medoids, start)
        parts.append((out[:, p:], labels, medoids, None if left is None else left[:, p:]))
        k += out.shape[1] - p
    outs, labels, medoids = (torch.cat(x, dim=1) for x in list(zip(*parts))[:3])
    sizes = None if sizes is None else torch.cat([sizes[:, :p], *(left for *_, left in parts)], dim=1)
    mass = outs.new_ones(medoids.shape)
    clusters = Clusters(outs, labels, mass, medoids, mass.sum(1))
    return torch.cat([tokens[:, :p], outs], dim=1), clusters, sizes


def reduce(pooling: nn.Module, given: list[Any], p: int) -> tuple[Tensor, Clusters, Any]:
    """(pooled tokens, clusters, sizes) of a pooling module, whichever it is."""
    tokens, scores, features, places, valid, sizes = given
    more = {} if places is None else {"positions": places}
    out = pooling(tokens, scores, features=features, mask=valid, sizes=sizes, **more)
    if isinstance(pooling, TokenReduction):
        pooled, clusters, *rest = out
        if clusters.medoids is None:  # of a reduction that is not ours
            medoids = nearest_members(tokens[:, p:], pooled[:, p:], clusters.assignment)
            clusters = clusters._replace(medoids=medoids)
        return pooled, clusters, rest[0] if rest else None
    pooled, left = (out[0], out[-1]) if isinstance(out, tuple) else (out, None)
    labels = nearest(tokens[:, p:], pooled[:, p:])  # it tells no clusters
    medoids = nearest_members(tokens[:, p:], pooled[:, p:], labels)
    unknown: Any = None
    return pooled, Clusters(pooled[:, p:], labels, unknown, medoids, unknown), left


def shown(tokens: Tensor, pooled: Tensor, clusters: Clusters, valid: Tensor | None, ends: list[int]) -> Tensor:
    """(B, N) labels in which tokens that were dropped show as the one most like them; padding stays -1."""
    labels, medoids = clusters.assignment, clusters.medoids
    apart = None if valid is None else medoids[:, None] < 0  # not as one that an image does not have
    if ends:  # not as one of another sequence
        limits = torch.tensor(ends, device=labels.device)
        ours = torch.bucketize(torch.arange(labels.shape[1], device=labels.device), limits, right=True)
        other = ours[:, None] != torch.bucketize(medoids, limits, right=True)
        apart = other if apart is None else apart | other
    labels = torch.where(labels < 0, nearest(tokens, pooled, apart), labels)
    return labels if valid is None else torch.where(valid, labels, -1)


def nearest(tokens: Tensor, centers: Tensor, apart: Tensor | None = None) -> Tensor:
    """(B, N) the center (B, K, D) nearest to each token (B, N, D), of those not ``apart`` (B or 1, N or 1, K)."""
    tokens, centers = tokens.detach().float(), centers.detach().float()
    distance = centers.square().sum(dim=2)[:, None, :] - 2 * tokens @ centers.transpose(1, 2)
    return (distance if apart is None else distance.masked_fill(apart, torch.inf)).argmin(dim=2)
