"""The layers that read a group, laid out by its channels."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autocomp.compress.damping import damped_cholesky
from autocomp.compress.moments import Moments
from autocomp.graph import Group, Member

__all__ = ["Reader", "readers_of"]

TALL = 2  # rows for each column from which a factor of the inner products is smaller to work with


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group.

    Attributes:
        weight: (out * pooled, features), or where that is tall (features, features) with the same inner products of
            columns, of which all criteria are made; float64, or float32 above 2,048 features.
        features: (channels, width), the features of each of the group's channels.
        moments: of all features.
    """

    weight: Tensor
    features: Tensor
    moments: Moments

    @property
    def gram(self) -> Tensor:
        """Centred second moment, (features, features), in the weight's type."""
        return self.moments.gram.to(self.weight.dtype)

    @property
    def variance(self) -> float:
        """Of the layer's outputs, summed over them; 0 where it reads constants only."""
        return float(((self.weight @ self.gram) * self.weight).sum().clamp_min(0.0))


def readers_of(group: Group, tensors: Mapping[str, Tensor], moments: Mapping[str, Moments]) -> tuple[Reader, ...]:
    """The group's readers that have moments, in the members' order."""
    return tuple(
        _reader(member, tensors[member.parameter], moments[name])
        for member in group.members
        if member.axis == 1 and (name := member.parameter.rpartition(".")[0]) in moments
    )


def _reader(member: Member, weight: Tensor, moments: Moments) -> Reader:
    features, pooled = len(moments.mean), moments.pooled
    dtype = torch.float64 if features <= 2048 else torch.float32
    per_entry = features * pooled // weight.shape[1]  # weight columns of one position on axis 1
    columns = np.asarray(member.positions)[:, :, None] * per_entry + np.arange(per_entry)
    index = np.stack([np.unique(entry) for entry in columns.reshape(len(member.positions), -1) // pooled])
    flat = weight.to(dtype).reshape(weight.shape[0], features, pooled).transpose(1, 2).flatten(0, 1)
    if len(flat) > TALL * features:
        flat = damped_cholesky(flat.T @ flat, 0.0).T
    return Reader(flat, torch.from_numpy(index), moments)
