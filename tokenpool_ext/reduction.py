"""What every layer here shares: how many tokens to keep, the prefix, sizes, and one ``forward``.

Shapes: B images, N tokens an image of which the first P are prefix tokens (class, distillation, registers), n = N - P
patch tokens, D features a token, K patch tokens kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from .checks import (
    check_backend,
    check_bool,
    check_device,
    check_dims,
    check_int,
    check_negative,
    check_position_weight,
    check_ratio,
    check_tensor,
)
from .functional import Clusters, register_result
from .ops import accumulate_dtype
from .positions import with_positions

__all__ = ["Reduced", "TokenReduction"]

Function = TypeVar("Function", bound=Callable[..., Any])
Count = TypeVar("Count", int, Tensor)


class Reduced(NamedTuple):
    """What a layer makes of B images of N tokens, P of them prefix tokens, n patch tokens.

    tokens    (B, P + K, D) in x.dtype; ``x`` itself, the same object, when it has no more than K patch tokens.
    clusters  over the patch tokens, ``assignment`` (B, n); None where they were not asked for.
    sizes     (B, P + K) or (B, K), as given: how many image patches each token stands for; None where none were given.
    """

    tokens: Tensor
    clusters: Clusters | None
    sizes: Tensor | None


register_result(Reduced)


class TokenReduction(nn.Module):
    """Base of all layers here: how many tokens to keep, the prefix, sizes, and one ``forward``.

    A subclass implements :meth:`reduce`. ``needs_scores`` tells a model adapter whether ``scores`` make a difference.

    Args:
        num_tokens: K, the number of *patch* tokens kept (prefix tokens come on top); -r: all but r, but at least half.
        keep_ratio: instead of ``num_tokens``: K = keep_ratio * n, 0 < keep_ratio <= 1, rounded to the nearest (halves
            down), at least 1. With a mask, -r and the ratio are of each image's real tokens; K is the most that may be.
        num_prefix_tokens: P, tokens in front that pass through unchanged.
        return_clusters: whether ``forward`` also returns :class:`~tokenpool_ext.Clusters`.
        backend: passed to the functions of ``tokenpool_ext.functional``; None chooses.
    """

    position_weight = 0.0

    @property
    def needs_scores(self) -> bool:
        """Whether scores make a difference."""
        return False

    def __init__(
        self,
        num_tokens: int | None = None,
        *,
        keep_ratio: float | None = None,
        num_prefix_tokens: int = 1,
        return_clusters: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if (num_tokens is None) == (keep_ratio is None):
            raise ValueError(
                f"{type(self).__name__}: give exactly one of num_tokens and keep_ratio, got num_tokens={num_tokens!r},"
                f" keep_ratio={keep_ratio!r}"
            )
        if keep_ratio is None:
            self.num_tokens = num_tokens
        else:
            self.keep_ratio = keep_ratio
        self.num_prefix_tokens = num_prefix_tokens
        self.return_clusters = return_clusters
        self.backend = backend

    def __setattr__(self, attribute: str, value: Any) -> None:
        """Every assignment, also one after construction, is checked by ``_check_<attribute>`` where there is one."""
        check = getattr(self, f"_check_{attribute}", None)
        super().__setattr__(attribute, value if check is None else check(value))
        other = {"num_tokens": "keep_ratio", "keep_ratio": "num_tokens"}.get(attribute)
        if other is not None:  # two rules for one number: the one set last holds
            self.__dict__[other] = None

    def _check_num_tokens(self, value: Any) -> int:
        if value is None:
            raise ValueError(f"{type(self).__name__}: num_tokens must be an int, got None; set keep_ratio instead")
        value = check_int(type(self).__name__, "num_tokens", value, -(2**31))
        return value or check_int(type(self).__name__, "num_tokens", value, 1)

    def _check_keep_ratio(self, value: Any) -> float:
        if value is None:
            raise ValueError(f"{type(self).__name__}: keep_ratio must be a float, got None; set num_tokens instead")
        return check_ratio(type(self).__name__, "keep_ratio", value)

    def _check_num_prefix_tokens(self, value: Any) -> int:
        return check_int(type(self).__name__, "num_prefix_tokens", value, 0)

    def _check_position_weight(self, value: Any) -> float:
        return check_position_weight(type(self).__name__, value)

    def _check_return_clusters(self, value: Any) -> bool:
        return check_bool(type(self).__name__, "return_clusters", value)

    def _check_backend(self, value: Any) -> str | None:
        return check_backend(type(self).__name__, value)

    def tokens_kept(self, num_patches: int) -> int:
        """K for an image of ``num_patches`` patch tokens (never more than it has)."""
        if self.num_tokens is not None:
            return kept_by_count(num_patches, self.num_tokens)
        return kept_by_ratio(num_patches, *as_fraction(self.keep_ratio))

    def _keeps_all(self, n: int, k: int) -> bool:
        """k >= n; of a ratio as a bound on n alone, which torch.export can decide for any n."""
        if self.keep_ratio is None or type(self).tokens_kept is not TokenReduction.tokens_kept:
            return k >= n
        return n <= as_fraction(self.keep_ratio)[2]

    def _counts(self, mask: Tensor, k: int) -> Tensor | None:
        """(B,) tokens kept of each image, by its own real tokens; None: K of all, or as many as there are."""
        if self.num_tokens is not None and self.num_tokens > 0:
            return None
        real = mask.sum(1)
        if type(self).tokens_kept is not TokenReduction.tokens_kept:
            kept = torch.tensor([self.tokens_kept(i) for i in range(mask.shape[1] + 1)], device=mask.device)[real]
        elif self.num_tokens is not None:
            kept = kept_by_count(real, self.num_tokens)
        else:
            kept = kept_by_ratio(real, *as_fraction(self.keep_ratio))
        return kept.clamp(1, k)

    def _weights(self, scores: Tensor | None, sizes: Tensor | None) -> Tensor | None:
        """What each token counts in ``Clusters.mass``; None: 1."""
        return sizes

    def reduce(
        self,
        x: Tensor,
        k: int,
        scores: Tensor | None,
        features: Tensor | None,
        mask: Tensor | None,
        sizes: Tensor | None,
        want_clusters: bool,
    ) -> tuple[Tensor, Clusters | None]:
        """Patch tokens (B, n, D) to (B, k, D), k < n; and the clusters when wanted. All arguments: patch tokens
        only."""
        raise NotImplementedError(f"{type(self).__name__} must implement reduce(...)")

    def forward(
        self,
        x: Tensor,
        scores: Tensor | None = None,
        *,
        features: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor | tuple[Any, ...]:
        """Pool the patch tokens of ``x``; prefix tokens stay in front, unchanged.

        Args:
            x: (B, N, D) tokens, floating.
            scores: (B, N) or (B, n) significance of the tokens, >= 0 (see ``functional.attention_received``).
                None: every token counts the same, or its size.
            features: (B, N, E) or (B, n, E): decide on this tensor (attention keys, say) and pool ``x``. None: ``x``.
            positions: (B, N, P) or (B, n, P): coordinates of the tokens, for ``position_weight``.
            mask: (B, N) or (B, n) bool, True = real token. Padding is never pooled. Where an image has fewer real
                patch tokens than K, or keeps fewer (``keep_ratio``, -r), its last tokens are zeros of ``mass`` 0.
            sizes: (B, N) or (B, n): how many image patches each token stands for. Without scores they are the weights.

        Returns:
            The parts asked for of :meth:`reduced`, in its order. The pooled tokens (B, P + K, D); with
            ``return_clusters=True`` ``(tokens, clusters)``; with ``sizes`` the new sizes come last in the tuple.
        """
        out = self.reduced(
            x,
            scores,
            features=features,
            positions=positions,
            mask=mask,
            sizes=sizes,
            clusters_wanted=self.return_clusters,
        )
        if self.return_clusters:
            return tuple(out if sizes is not None else out[:2])
        return out.tokens if sizes is None else (out.tokens, out.sizes)

    def reduced(
        self,
        x: Tensor,
        scores: Tensor | None = None,
        *,
        features: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        sizes: Tensor | None = None,
        clusters_wanted: bool = True,
    ) -> Reduced:
        """:meth:`forward` with one result, whatever is asked for. Hooks of the module do not see it."""
        name = type(self).__name__
        check_dims(name, "x", x, 3, 3, "(B, N, D) (a single image: x[None])")
        prefix = self.num_prefix_tokens
        n = x.shape[1] - prefix
        if n < 0:
            raise ValueError(
                f"{name}: x must have at least num_prefix_tokens = {prefix} tokens, got {x.shape[1]};"
                " lower num_prefix_tokens"
            )
        given = {"scores": scores, "features": features, "positions": positions, "mask": mask, "sizes": sizes}
        scores, features, positions, mask, patch_sizes = self._patches(x, given)
        if patch_sizes is not None:
            check_negative(name, "sizes", patch_sizes, x, mask)
        k = self.tokens_kept(n)
        if self._keeps_all(n, k):
            tokens, new_sizes = x, sizes
            clusters: Clusters | None = None
            if clusters_wanted:
                clusters = _identity(x[:, prefix:], self._weights(scores, patch_sizes), mask)
        else:
            if self.position_weight:
                if positions is None:
                    raise ValueError(f"{name}: position_weight={self.position_weight:g} needs positions, got None")
                features = x[:, prefix:] if features is None else features
                features = with_positions(features, positions, self.position_weight, mask)
            want = clusters_wanted or sizes is not None
            pooled, clusters = self.reduce(x[:, prefix:] if prefix else x, k, scores, features, mask, patch_sizes, want)
            tokens = torch.cat([x[:, :prefix], pooled], dim=1) if prefix else pooled
            new_sizes = None
            if sizes is not None:
                assert patch_sizes is not None and clusters is not None, "both were asked for"
                new_sizes = _cluster_sums(patch_sizes, clusters.assignment, k)
                if sizes.shape[1] == x.shape[1] and prefix:
                    new_sizes = torch.cat([sizes[:, :prefix], new_sizes], dim=1)
        return Reduced(tokens, clusters, new_sizes)

    def extra_repr(self) -> str:
        kept = f"num_tokens={self.num_tokens}" if self.num_tokens is not None else f"keep_ratio={self.keep_ratio}"
        parts = [kept, *self._options(), f"num_prefix_tokens={self.num_prefix_tokens}"]
        if self.return_clusters:
            parts.append("return_clusters=True")
        if self.backend is not None:
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)

    def _options(self) -> list[str]:
        return []

    def _patches(self, x: Tensor, given: dict[str, Tensor | None]) -> list[Tensor | None]:
        """The parts of per-token tensors that belong to the patch tokens; they may or may not include the prefix."""
        name, (b, total) = type(self).__name__, x.shape[:2]
        n = total - self.num_prefix_tokens
        parts: list[Tensor | None] = []
        for argument, value in given.items():
            if value is None:
                parts.append(None)
                continue
            check_tensor(name, argument, value, floating=argument == "features")
            check_device(name, argument, value, x)
            if value.is_complex():
                raise TypeError(f"{name}: {argument} must be real, got {value.dtype}")
            dims = 3 if argument in ("features", "positions") else 2
            if value.dim() != dims or value.shape[0] != b or value.shape[1] not in (total, n):
                tail = ", E" if dims == 3 else ""
                raise ValueError(
                    f"{name}: {argument} must have shape ({b}, {total}{tail}), all tokens, or ({b}, {n}{tail}), patch"
                    f" tokens only, for x of shape {tuple(x.shape)}, got {tuple(value.shape)}"
                )
            if argument == "mask" and value.dtype != torch.bool:
                raise TypeError(f"{name}: mask must be bool (True = real token), got {value.dtype}; write mask != 0")
            if value.shape[1] == total and n < total:
                value = value[:, self.num_prefix_tokens :]
                value = value.contiguous() if dims == 2 else value  # copied here once, not at each look
            parts.append(value)
        return parts


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) of ``x`` (B, N, D); zeros where the index is -1."""
    rows = x.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[2]))
    return torch.where(index[:, :, None] >= 0, rows, 0)


def _cluster_sums(sizes: Tensor, assignment: Tensor, k: int) -> Tensor:
    """(B, K) sums of the sizes in every cluster; tokens assigned -1 vanish. Sums of integers: exact in any order."""
    if not sizes.is_floating_point():
        sizes = sizes.long()  # of bool or uint8 the sums would be no number, or a small one
    return sizes.new_zeros(sizes.shape[0], k + 1).scatter_add(1, assignment + 1, sizes)[:, 1:]


def _identity(x: Tensor, weights: Tensor | None, mask: Tensor | None) -> Clusters:
    """The clusters of a sequence that was short enough: one a token."""
    acc = accumulate_dtype(x.dtype)
    b, n, _ = x.shape
    index = torch.arange(n, device=x.device).expand(b, n).contiguous()
    mass = x.new_ones(b, n, dtype=acc) if weights is None else weights.detach().to(acc, copy=True)
    if mask is not None:
        index, mass = torch.where(mask, index, -1), torch.where(mask, mass, 0)
    return Clusters(x, index, mass, index.clone(), x.new_zeros(b, dtype=acc))


def cached(function: Function) -> Function:
    """Remembers results, except while torch.compile looks: it traces the function itself."""
    remembered = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return (function if torch.compiler.is_compiling() else remembered)(*args)

    return cast(Function, call)


@cached
def as_fraction(ratio: float) -> tuple[int, int, float]:
    """A ratio as numerator and denominator, to a ten-thousandth of it (0.7 is 7/10), and the largest n of which it
    keeps all."""
    exact = Fraction(ratio)
    fraction = exact.limit_denominator(10000 * min(exact.denominator // exact.numerator + 1, 2**31))
    numerator, denominator = max(fraction.numerator, 1), fraction.denominator if fraction.numerator else 2**31
    lost = denominator - numerator
    return numerator, denominator, max(1, (denominator - 1) // (2 * lost)) if lost else math.inf


def kept_by_count(n: Count, count: int) -> Count:
    """Tokens kept of n, an int or a tensor: ``count``, or, if that is negative, all but so many, of which at most half
    go."""
    at_most: Any = torch.clamp_max if isinstance(n, Tensor) else min
    return cast(Count, at_most(n, count) if count > 0 else n - at_most(n // 2, -count))


def kept_by_ratio(n: Count, numerator: int, denominator: int, all_up_to: float) -> Count:
    """Tokens kept of n, by `as_fraction`: the nearest integer, halves down, of an int at least 1 (0 of 0).

    In integers, so that one compiled graph serves every n. 196 tokens at 1/2 three times: 98, 49, 24.
    """
    if not isinstance(n, Tensor):
        if n <= all_up_to:
            return n
        if n <= denominator // (2 * numerator):
            return 1
    return (2 * numerator * n + denominator - 1) // (2 * denominator)
