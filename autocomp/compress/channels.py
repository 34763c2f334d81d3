"""Which channel each element of a tensor comes from, as a tensor of labels, and which labels stand or fall together.

A label is the index of one output channel of a layer, or of one element of a free parameter; 0 is of what is always
there. Labels of a value have its shape and are expanded (stride 0) along the axes on which they do not vary, so that
following a whole map costs as much as following one of its pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

__all__ = ["Channels", "core_of", "cut_axis", "varying"]


def core_of(labels: Tensor) -> Tensor:
    """The labels with one entry on every axis that they are expanded along."""
    return labels[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in labels.stride())]


def varying(labels: Tensor) -> tuple[int, ...]:
    """Axes on which labels differ."""
    return tuple(axis for axis, size in enumerate(core_of(labels).shape) if size > 1)


class Channels:
    """Labels handed out so far, and the classes that unions made of them; a class is named by its smallest label."""

    def __init__(self) -> None:
        self._roots = torch.zeros(1, dtype=torch.int64)
        self._pending: list[Tensor] = []
        self._reasons: list[tuple[Tensor, str]] = []
        self._ties: list[tuple[Tensor, str]] = []

    def fresh(self, count: int) -> Tensor:
        """New labels (count,), each a class of its own."""
        start = len(self._roots)
        new = torch.arange(start, start + count)
        self._roots = torch.cat([self._roots, new])
        return new

    def classes(self, labels: Tensor) -> Tensor:
        """The labels' classes, expanded along axes on which those do not vary."""
        self._settle()
        core = self._roots[core_of(labels)]
        for axis, size in enumerate(core.shape):
            first = core.narrow(axis, 0, 1) if size else core
            if size > 1 and bool((core == first).all()):
                core = first
        return core.expand(labels.shape)

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Let labels of two shapes that broadcast stand or fall together, element by element."""
        first, second = core_of(first), core_of(second)
        shape = np.broadcast_shapes(first.shape, second.shape)
        first, second = first.expand(shape), second.expand(shape)
        pairs = torch.stack([first.reshape(-1), second.reshape(-1)])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.shape[1]:
            self._pending.append(pairs)

    def mix(self, labels: Tensor, axis: int, reason: str, tie: bool = False) -> Tensor:
        """Let all labels along an axis stand or fall together.

        Args:
            tie: the reason counts only where nothing else keeps them.

        Returns:
            labels with one entry on the axis.
        """
        labels = self.classes(labels)
        first = labels.narrow(axis, 0, 1)
        if axis % labels.ndim in varying(labels):
            (self._ties if tie else self._reasons).append((core_of(labels).reshape(-1), reason))
            self.unite(labels, first)
        return self.classes(first)

    def pin(self, labels: Tensor, reason: str) -> None:
        """Keep all channels of these labels."""
        labels = core_of(labels).reshape(-1)
        labels = labels[labels != 0]
        if len(labels):
            self._reasons.append((labels, reason))
            self.unite(labels, torch.zeros(1, dtype=torch.int64))

    def reasons(self, several: Sequence[Tensor]) -> list[str | None]:
        """For each of some labels the first reason that was given for one of them, else for one of the same class, else
        what ties them; None without."""
        self._settle()
        told = [*self._reasons, *self._ties]
        none, words = len(told), len(self._reasons)
        own = torch.full_like(self._roots, none)  # label -> number of its first reason
        of_class = own.clone()  # class -> number of its first reason in words
        for number, (given, reason) in reversed([*enumerate(told)]):
            if number < words:
                own[given] = number
            if reason:
                of_class[self._roots[given]] = number
        own[0] = of_class[0] = none
        found = []
        for labels in several:
            core = core_of(labels)
            number = int(own[core].min())
            if number == none:
                number = int(of_class[self._roots[core]].min())
            found.append(None if number == none else told[number][1])
        return found

    def count(self) -> int:
        """How many classes there are."""
        self._settle()
        return len(torch.unique(self._roots))

    def _settle(self) -> None:
        if not self._pending:
            return
        pairs = self._roots[torch.cat(self._pending, 1)].numpy()
        self._pending.clear()
        touched, index = np.unique(pairs, return_inverse=True)
        heads = _heads(index.reshape(2, -1), len(touched))
        table = torch.arange(len(self._roots))
        table[torch.from_numpy(touched)] = torch.from_numpy(touched[heads])
        self._roots = table[self._roots]


def _heads(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """For each of ``count`` nodes the smallest one it is connected to by pairs (2, n)."""
    graph = coo_array((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    smallest = np.full(count, count)
    np.minimum.at(smallest, component, np.arange(count))
    heads: NDArray[np.int64] = smallest[component]
    return heads


def cut_axis(labels: Tensor) -> int | None:
    """The axis along which the classes of a value can be cut out of it, None where they do not vary.

    Args:
        labels: classes, see `Channels.classes`.

    Returns:
        the axis on which most classes remain when all that shares an index there is united.
    """
    axes = varying(labels)
    if len(axes) < 2:
        return axes[0] if axes else None
    return max(axes, key=lambda axis: _remaining(core_of(labels), axis))


def _remaining(core: Tensor, axis: int) -> int:
    rows = core.movedim(axis, 0).reshape(core.shape[axis], -1)
    values, index = np.unique(rows.numpy(), return_inverse=True)
    index = index.reshape(rows.shape)
    pairs = np.stack([np.repeat(np.arange(len(rows)), rows.shape[1]), index.reshape(-1) + len(rows)])
    return len(np.unique(_heads(pairs, len(rows) + len(values))))
