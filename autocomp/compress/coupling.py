"""Which channels must be pruned together, as plain data.

The idea of a graph of dependencies between channels is that of Fang et al., DepGraph: Towards Any Structural Pruning
(CVPR 2023, section 3); here every element of every value is followed instead (`following`), so that no operator needs
a rule that says how its input's channels lie in its output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from autocomp.compress.channels import cut_axis
from autocomp.compress.following import Followed, follow
from autocomp.compress.sizes import Pieces, free_sizes, pieces_of
from autocomp.graph import Group, Layer, Member

__all__ = ["Coupling", "admit", "couple"]

T = TypeVar("T")


@dataclass(frozen=True)
class Coupling:
    """Groups of coupled channels, and the layers whose channels cannot be pruned with the reason for each.

    Attributes:
        module: computes what the model did, with sizes that follow those of its tensors.
    """

    module: fx.GraphModule
    groups: tuple[Group, ...]
    left_whole: Mapping[str, str]


def couple(
    module: fx.GraphModule,
    example: Tensor,
    layers: Sequence[Layer],
    names: Mapping[str, str],
    shared: frozenset[str],
) -> Coupling:
    """Find the groups of channels that are written by the model's layers.

    Args:
        module: traced; not changed.
        example: (n, ...), n at least 2.
        layers: of the traced graph, in topological order.
        names: node -> layer that it is a use of.
        shared: names of layers whose weight several operators read.

    Returns:
        candidates, in the order of their first writing layer. Whether they can really be pruned is for a trial.
    """
    followed = follow(module, example, names, shared)
    pieces = pieces_of(followed)
    groups = _groups(_axes(followed, pieces), layers)
    return Coupling(free_sizes(module, followed, pieces), groups, _whole(followed, layers, groups))


def _axes(followed: Followed, pieces: Sequence[Pieces]) -> dict[tuple[str, int], NDArray[np.int64]]:
    """(parameter, axis) -> classes along it, of everything that a cut changes."""
    channels = followed.channels
    axes = {key: channels.classes(labels) for key, labels in followed.axes.items()}
    for name, labels in followed.free.items():
        found = channels.classes(labels)
        if (axis := cut_axis(found)) is not None:
            axes[name, axis] = found.movedim(axis, 0).flatten(1)[:, 0] if found.ndim > 1 else found
    for entry in pieces:
        axes |= {(name, 0): labels for name, labels in zip(entry.names, entry.labels, strict=True)}
    return {key: labels.numpy() for key, labels in axes.items()}


def _groups(axes: Mapping[tuple[str, int], NDArray[np.int64]], layers: Sequence[Layer]) -> tuple[Group, ...]:
    """Classes that a layer writes, those together that lie equally often on each axis; at least two of them.

    Args:
        axes: (parameter, axis) -> class of each position, 0 where it stays; in topological order.
    """
    names, index = np.unique(np.concatenate([*axes.values(), np.zeros(1, np.int64)]), return_inverse=True)
    parts = dict(zip(axes, np.split(index, np.cumsum([len(vector) for vector in axes.values()]))[:-1], strict=True))
    order = {(layer.weight, 0): index for index, layer in enumerate(layers)}
    writer = np.full(len(names), len(layers))
    place = np.zeros(len(names), np.int64)  # first position on the writer's axis
    counts = np.zeros((len(names), 2), np.uint64)  # sums of counts times random numbers tell sets of axes apart
    random = np.random.default_rng(0)
    for key, part in parts.items():
        present, first, count = np.unique(part, return_index=True, return_counts=True)
        counts[present] += count[:, None].astype(np.uint64) * random.integers(2**63, size=2, dtype=np.uint64)
        if key in order:
            new = order[key] < writer[present]
            writer[present[new]], place[present[new]] = order[key], first[new]
    writer[names == 0] = len(layers)
    written = np.flatnonzero(writer < len(layers))
    written = written[np.lexsort((place[written], writer[written]))]
    classes: dict[tuple[int, ...], list[int]] = {}
    for name in written.tolist():
        classes.setdefault((int(writer[name]), *counts[name].tolist()), []).append(name)
    several = [(layers[key[0]].name, found) for key, found in classes.items() if len(found) > 1]
    number_of, within = np.full(len(names), -1), np.zeros(len(names), np.int64)
    for number, (_, found) in enumerate(several):
        number_of[found], within[found] = number, np.arange(len(found))
    members: list[list[Member]] = [[] for _ in several]
    for (parameter, axis), part in parts.items():
        for number in np.unique(number_of[part]).tolist():
            if number >= 0:
                own = np.flatnonzero(number_of[part] == number)
                rows = own[np.argsort(within[part[own]], kind="stable")].reshape(len(several[number][1]), -1)
                members[number].append(Member(parameter, axis, tuple(tuple(row) for row in rows.tolist())))
    uses: dict[str, int] = {}
    groups = []
    for (layer, found), each in zip(several, members, strict=True):
        uses[layer] = uses.get(layer, 0) + 1
        suffix = "" if uses[layer] == 1 else f":{uses[layer]}"
        groups.append(Group(layer + suffix, len(found), tuple(each)))
    return tuple(groups)


def _whole(followed: Followed, layers: Sequence[Layer], groups: Sequence[Group]) -> dict[str, str]:
    """Layers without a group of their channels -> why; the logits need no reason."""
    written = {member.parameter for group in groups for member in group.members if member.axis == 0}
    left = [
        layer
        for layer in layers
        if layer.weight not in written and (layer.weight, 0) in followed.axes and layer.weight_shape[0] > 1
    ]
    reasons = followed.channels.reasons([followed.axes[layer.weight, 0] for layer in left])
    return {
        layer.name: reason or "its channels are tied to those of the output"
        for layer, reason in zip(left, reasons, strict=True)
        if reason != ""
    }


def admit(candidates: Sequence[T], fits: Callable[[Sequence[T]], bool]) -> tuple[T, ...]:
    """The candidates that fit together: all at once where possible, else by bisection.

    Args:
        fits: whether some candidates can be applied together; asked about 2 log2(n) times per failing one.
    """
    admitted: list[T] = []

    def visit(part: Sequence[T]) -> None:
        if not part:
            return
        if fits([*admitted, *part]):
            admitted.extend(part)
        elif len(part) > 1:
            middle = len(part) // 2
            visit(part[:middle])
            visit(part[middle:])

    visit(candidates)
    return tuple(admitted)
