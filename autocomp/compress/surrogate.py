"""How much of the reading layers' output no solve can recover, from statistics alone."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocomp.compress.damping import damped_cholesky
from autocomp.compress.moments import Moments
from autocomp.compress.statistics import Statistics
from autocomp.compress.surgery import tensors_of
from autocomp.compress.tracing import Traced
from autocomp.graph import Group, Member

__all__ = ["lost_output", "lost_outputs"]

JITTER = 1e-7  # of the inputs' mean variance, added so that doubled inputs leave a Cholesky factor


def lost_outputs(traced: Traced, statistics: Statistics) -> dict[str, NDArray[np.float64]]:
    """Group -> `lost_output` of its order, for the groups that some layer with moments reads."""
    tensors = tensors_of(traced.module)
    found = {
        group.name: lost_output(group, statistics.orders[group.name], tensors, statistics.moments)
        for group in traced.graph.groups
    }
    return {name: lost for name, lost in found.items() if lost is not None}


def lost_output(
    group: Group, order: Sequence[int], tensors: Mapping[str, Tensor], moments: Mapping[str, Moments]
) -> NDArray[np.float64] | None:
    """Squared output error that least squares leaves for every number of kept channels at once.

    With the removed inputs U predicted from the kept ones K, a layer loses tr(W_U S W_U'), where S is the Schur
    complement G_UU - G_UK G_KK^-1 G_KU of the centred second moment G. Channels go in a fixed order, so all these
    complements are trailing blocks of one Cholesky factor G = LL', inputs sorted from the last to go to the first:
    the loss is the sum of the squared columns of WL that belong to U. Reconstruction ends a little above it, by its
    ridge.

    Args:
        order: the group's channels, the most dispensable first.
        tensors: of the unpruned model.
        moments: layer -> moments of its inputs.

    Returns:
        (channels + 1,): entry k with k channels kept, as a fraction of the variance of the layer's output, summed
        over the layers that read the group; 0 at the end. None where no reader has moments.
    """
    lost = [
        _reader_loss(member, order, tensors[member.parameter], moments[member.parameter.rpartition(".")[0]])
        for member in group.members
        if member.axis == 1 and member.parameter.rpartition(".")[0] in moments
    ]
    return np.sum(lost, axis=0) if lost else None


def _reader_loss(member: Member, order: Sequence[int], weight: Tensor, moments: Moments) -> NDArray[np.float64]:
    features, pooled = len(moments.mean), moments.pooled
    per_entry = features * pooled // weight.shape[1]  # weight columns of one position on axis 1
    columns = np.asarray(member.positions)[:, :, None] * per_entry + np.arange(per_entry)
    of_channel = [np.unique(entry) for entry in columns.reshape(len(order), -1) // pooled]
    going = [of_channel[channel] for channel in reversed(order)]  # the last to go first
    others = np.setdiff1d(np.arange(features), np.concatenate(going))  # of other groups: they stay
    index = torch.from_numpy(np.concatenate([others, *going]))
    flat = weight.double().reshape(len(weight), features, pooled).transpose(1, 2).flatten(0, 1)[:, index]
    gram = moments.gram[index][:, index].double()
    squares = (flat @ damped_cholesky(gram, JITTER)).square().sum(0).numpy()
    total = float(((flat @ gram) * flat).sum())
    ends = len(others) + np.cumsum([0, *map(len, going)])
    behind = np.append(np.cumsum(squares[::-1])[::-1], 0.0)  # [i]: sum of the columns from i on
    return behind[ends] / total if total > 0 else np.zeros(len(ends))
