"""Greedy elimination of a group's channels, the readers making up for every one that goes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autocomp.compress.damping import damped_cholesky
from autocomp.compress.readers import Reader

__all__ = ["eliminated"]

STEPS = 64  # removals after which inverses are brought up to date, at most: wide groups lose several channels at once


def eliminated(readers: Sequence[Reader], ridge: float) -> tuple[int, ...]:
    """Channels in the order in which they cost the reading layers' outputs least, each removal compensated.

    Backward elimination with the optimal brain surgeon's update over whole blocks of inputs (Kurtic et al., ZipLM,
    NeurIPS 2023, section 3.1); a stream's readers count by the share of their output's variance that is lost. The
    orders of all counts are nested.

    Args:
        readers: at least one, of the same group.
        ridge: as a fraction of the mean variance of a reader's inputs.

    Returns:
        the most dispensable first.
    """
    states = [_State.of(reader, ridge) for reader in readers]
    channels = len(readers[0].features)
    alive, order = list(range(channels)), []
    at_once = -(-channels // STEPS)
    while len(alive) > 1:
        candidates = torch.tensor(alive)
        errors = torch.stack([state.errors(candidates) for state in states]).sum(0)
        going = candidates[torch.argsort(errors, stable=True)[: min(at_once, len(alive) - 1)]]
        for state in states:
            state.remove(going)
        order.extend(going.tolist())
        alive = [channel for channel in alive if channel not in set(order)]
    return (*order, *alive)


@dataclass
class _State:
    """A reader as what is left of its inputs shrinks.

    Attributes:
        weight: (out * pooled, features), updated for what is gone; in units of the output's deviation.
        inverse: of the ridged second moment of the remaining features, (features, features).
        features: (channels, width), the places of each remaining channel's features.
        left: (features,), which of these places are of channels that remain.
    """

    weight: Tensor
    inverse: Tensor
    features: Tensor
    left: Tensor

    @classmethod
    def of(cls, reader: Reader, ridge: float) -> "_State":
        variance = reader.variance
        inverse = torch.cholesky_inverse(damped_cholesky(reader.gram, max(ridge, 1e-6)))
        weight = reader.weight / (variance**0.5 if variance > 0 else 1.0)
        return cls(weight, inverse, reader.features, torch.ones(len(inverse), dtype=torch.bool))

    def errors(self, channels: Tensor) -> Tensor:
        """Growth of the squared output error if each of ``channels`` went next, the rest making up for it."""
        index = self.features[channels]
        if index.shape[1] == 1:  # blocks of one number: nothing to solve, and no copy of all weights to make
            only = index.flatten()
            return self.weight.square().sum(0)[only] / self.inverse.diagonal()[only]
        blocks = self.inverse[index[:, :, None], index[:, None, :]]
        weight = self.weight[:, index].permute(1, 2, 0)
        solved: Tensor = torch.linalg.solve(blocks, weight)
        return (weight * solved).sum((1, 2))

    def remove(self, channels: Tensor) -> None:
        gone = self.features[channels].flatten()
        rows = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])
        self.weight.addmm_(self.weight[:, gone], rows, alpha=-1)
        self.inverse.addmm_(self.inverse[:, gone], rows, alpha=-1)
        self.left[gone] = False
        if 2 * int(self.left.sum()) <= len(self.left):  # the larger part is computed for nothing
            self.weight, self.inverse = self.weight[:, self.left], self.inverse[self.left][:, self.left]
            self.features = (self.left.cumsum(0) - 1)[self.features]
            self.left = self.left[self.left]
