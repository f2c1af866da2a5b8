"""Which pooled token stands for which image patch: what :func:`record` keeps of a patched model's forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import counted
from ..functional import Clusters
from .reducing import Setup, through

__all__ = ["Record", "record", "tokens_per_layer"]


class Record:
    """The clusters of the last forward run inside ``with record(model)``; each forward replaces those of the one
    before.

    B images of n patch tokens; prefix tokens are not counted, in rows nor in labels.

    Attributes:
        num_prefix_tokens: P, tokens in front that were never pooled.
    """

    def __init__(self, setup: Setup, blocks: list[int]) -> None:
        self.num_prefix_tokens: int = setup.num_protected
        self._setup, self._blocks = setup, blocks
        self._layers: list[tuple[int, Clusters]] = []
        self._start: Tensor | None = None

    @property
    def layers(self) -> list[tuple[int, Clusters]]:
        """``(block index, Clusters)`` of every block that had tokens to pool, in order; detached from autograd.

        Raises:
            RuntimeError: no forward of the model was recorded.
        """
        self._started()
        return list(self._layers)

    @property
    def assignment(self) -> Tensor:
        """(B, n) int64: the patch token left after the last pooling block for every patch; -1 where it was dropped.

        ``tokenpool_ext.unpool(tokens[:, P:], r.assignment)`` spreads the final (B, P + K, D) tokens over the patches.

        Raises:
            RuntimeError: no forward of the model was recorded.
        """
        return self.assignment_after(self._blocks[-1])

    def assignment_after(self, block: int) -> Tensor:
        """(B, n) int64: like :attr:`assignment`, but for the tokens that leave block ``block``, counted from 0.

        Raises:
            RuntimeError: no forward of the model was recorded.
            ValueError: ``block`` is negative.
        """
        if block < 0:
            raise ValueError(f"record: block must be at least 0, got {block}")
        labels = self._started()
        for index, clusters in self._layers:
            if index <= block:
                labels = through(labels, clusters.assignment)
        return labels

    def _started(self) -> Tensor:
        if self._start is None:
            raise RuntimeError(
                "record: no forward of the patched model was seen; run it inside the context, in the same thread and"
                " not through torch.compile, whose graphs record nothing"
            )
        return self._start

    def enter(self, index: int, x: Tensor) -> None:
        """A pooling block got these tokens."""
        if index == self._blocks[0]:
            n = x.shape[1] - self.num_prefix_tokens
            self._start = torch.arange(n, device=x.device).expand(x.shape[0], n).contiguous()
            self._layers = []

    def add(self, index: int, clusters: Clusters) -> None:
        """It pooled them into these clusters."""
        parts: Any = (t.detach() if isinstance(t, Tensor) else t for t in clusters)
        self._layers.append((index, Clusters(*parts)))


_ACTIVE: ContextVar[tuple[Record, ...]] = ContextVar("tokenpool_ext.vit.record", default=())


@contextmanager
def record(model: nn.Module) -> Iterator[Record]:
    """Keep the assignments of a patched model's forward, so that its tokens can be unpooled again.

        >>> tokenpool_ext.patch(model, keep_ratio=0.5, outside="short")
        >>> with tokenpool_ext.vit.record(model) as r:
        ...     tokens = model.forward_features(images)                                     # (B, P + K, D)
        >>> tokenpool_ext.unpool(tokens[:, r.num_prefix_tokens :], r.assignment)            # (B, n, D)

    Nothing is kept on the model: what is recorded belongs to this context, and to the thread (or asynchronous task)
    that entered it. Forwards compute what they compute without it. Recomputation by gradient checkpointing is not
    recorded.

    Args:
        model: a model given to :func:`patch`, not compiled.

    Yields:
        :class:`Record`, which stays valid after the context.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is not patched, or compiled by ``torch.compile``.
    """
    made = _of("record", model)
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError(
            "record: model is compiled by torch.compile, and compiled graphs record nothing; run the model itself,"
            " uncompiled"
        )
    with _filled(made):
        yield made


def tokens_per_layer(model: nn.Module, *inputs: Any, **keywords: Any) -> list[int]:
    """Tokens that leave each block of a patched model, those that are never pooled included.

        >>> tokenpool_ext.vit.tokens_per_layer(tokenpool_ext.patch(model, num_tokens={3: 128, 7: 64}))
        [197, 197, 197, 129, 129, 129, 129, 65, 65, 65, 65, 65]

    One forward is run, without gradients and in eval mode (modes are restored).

    Args:
        model: a model given to :func:`patch`, compiled or not.
        inputs, keywords: of its forward. None at all: one image or sequence of the model's own size.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is not patched, or does not tell the size of its input.
    """
    made = _of("tokens_per_layer", model)
    with _filled(made), torch.compiler.set_stance("force_eager"):
        counted(model, inputs, keywords)
    left, counts, out = made.assignment.shape[1], dict(made.layers), []
    for i in range(made._setup.depth):
        left = counts[i].medoids.shape[1] if i in counts else left
        out.append(left + made.num_prefix_tokens)
    return out


def _of(caller: str, model: nn.Module) -> Record:
    from .patching import patched_blocks, patches

    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, got {type(model).__name__}")
    pools = patched_blocks(model)
    if not pools:
        raise ValueError(
            f"{caller}: {type(model).__name__} is not patched, so there is nothing to tell; patch it first"
        )
    return Record(patches(model)[0][1].setup, list(pools))


@contextmanager
def _filled(made: Record) -> Iterator[None]:
    token = _ACTIVE.set((*_ACTIVE.get(), made))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


# Of the backward that is under way, in which gradient checkpointing runs blocks again; -1 outside.
graph_task = torch._C._current_graph_task_id


def active(setup: Setup) -> tuple[Record, ...]:
    """The records that want to know of this forward."""
    records = () if torch.compiler.is_compiling() else _ACTIVE.get()
    if not records or graph_task() != -1:
        return ()
    return tuple(r for r in records if r._setup is setup)
