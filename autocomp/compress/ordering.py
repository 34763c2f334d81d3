"""In which order the channels of a group go."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocomp.compress.moments import Moments
from autocomp.graph import Group, LayerGraph
from autocomp.policy import Policy, Recipe

__all__ = ["group_l2", "least_error", "order_channels", "select"]

STEPS = 64  # removals after which inverses are brought up to date, at most: wide groups lose several channels at once


def order_channels(
    graph: LayerGraph, tensors: Mapping[str, Tensor], moments: Mapping[str, Moments], recipe: Recipe
) -> dict[str, tuple[int, ...]]:
    """Group -> its channels, the most dispensable first. A policy keeps the last ones of it."""
    orders = {}
    for group in graph.groups:
        order = None
        if recipe.importance == "least_error":
            order = least_error(group, tensors, moments, recipe.ridge)
        orders[group.name] = order or _ascending(group_l2(group, tensors))
    return orders


def select(orders: Mapping[str, tuple[int, ...]], policy: Policy) -> dict[str, tuple[int, ...]]:
    """Group -> channels that stay, ascending, for the groups that lose some."""
    return {name: tuple(sorted(orders[name][-count:])) for name, count in policy.kept.items()}


def _ascending(values: NDArray[np.float64]) -> tuple[int, ...]:
    """Indices by value; of equal ones the later comes first, so that the earlier stays."""
    return tuple(int(channel) for channel in np.lexsort((-np.arange(len(values)), values)))


def group_l2(group: Group, tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """Squared L2 norm per channel, (channels,), over all folded weights that write or read it.

    The group form of weight-magnitude importance (Fang et al., DepGraph, CVPR 2023, section 3.3).
    """
    total = np.zeros(group.channels)
    for member in group.members:
        weight = tensors[member.parameter]
        if weight.ndim > 1:
            others = tuple(axis for axis in range(weight.ndim) if axis != member.axis)
            squares = weight.double().square().sum(others).numpy()
            total += squares[np.asarray(member.positions)].sum(axis=1)
    return total


@dataclass
class _Reader:
    """A layer that reads a group, as what is left of its inputs shrinks.

    Attributes:
        weight: (out * pooled, features), updated for what is gone.
        inverse: of the ridged second moment of the remaining features, (features, features).
        features: (channels, width), the features of each channel.
    """

    weight: Tensor
    inverse: Tensor
    features: Tensor

    def errors(self, channels: Tensor) -> Tensor:
        """Growth of the squared output error if each of ``channels`` went next, the rest making up for it."""
        index = self.features[channels]
        blocks = self.inverse[index[:, :, None], index[:, None, :]]
        weight = self.weight[:, index].permute(1, 2, 0)
        solved: Tensor = torch.linalg.solve(blocks, weight)
        return (weight * solved).sum((1, 2))

    def remove(self, channels: Tensor) -> None:
        gone = self.features[channels].flatten()
        rows = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])
        self.weight = self.weight - self.weight[:, gone] @ rows
        self.inverse = self.inverse - self.inverse[:, gone] @ rows


def least_error(
    group: Group, tensors: Mapping[str, Tensor], moments: Mapping[str, Moments], ridge: float
) -> tuple[int, ...] | None:
    """Channels in the order in which they cost the reading layers' outputs least, each removal compensated.

    Backward elimination with the optimal brain surgeon's update over whole blocks of inputs (Kurtic et al., ZipLM,
    NeurIPS 2023, section 3.1), summed over all readers. The orders of all counts are nested.

    Returns:
        the most dispensable first; None where no reader has moments.
    """
    readers = []
    for member in group.members:
        name = member.parameter.rpartition(".")[0]
        if member.axis == 1 and name in moments:
            readers.append(_reader(member.positions, tensors[member.parameter], moments[name], ridge))
    if not readers:
        return None
    alive, order = list(range(group.channels)), []
    at_once = -(-group.channels // STEPS)
    while len(alive) > 1:
        channels = torch.tensor(alive)
        errors = torch.stack([reader.errors(channels) for reader in readers]).sum(0)
        going = channels[torch.argsort(errors, stable=True)[: min(at_once, len(alive) - 1)]]
        for reader in readers:
            reader.remove(going)
        order.extend(going.tolist())
        alive = [channel for channel in alive if channel not in set(order)]
    return (*order, *alive)


def _reader(positions: tuple[tuple[int, ...], ...], weight: Tensor, moments: Moments, ridge: float) -> _Reader:
    features = len(moments.mean)
    dtype = torch.float64 if features <= 2048 else torch.float32
    per_entry = features * moments.pooled // weight.shape[1]  # weight columns of one position on axis 1
    columns = np.asarray(positions)[:, :, None] * per_entry + np.arange(per_entry)
    index = np.stack([np.unique(entry) for entry in columns.reshape(len(positions), -1) // moments.pooled])
    matrix = moments.gram.to(dtype)
    scale = float(matrix.diagonal().mean())
    matrix = matrix + max(ridge, 1e-6) * (scale if scale > 0 else 1.0) * torch.eye(features, dtype=dtype)
    flat = weight.to(dtype).reshape(weight.shape[0], features, moments.pooled).transpose(1, 2).flatten(0, 1)
    return _Reader(flat, torch.linalg.inv(matrix), torch.from_numpy(index))
