"""How much each channel of a group is worth: criteria from the literature, each a function of a group and evidence.

All give one number a channel, the higher the longer it stays; those that choose greedily give the step at which the
channel goes. A group with several writers and readers (a residual stream) is scored over all of them.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocomp.compress.elimination import eliminated
from autocomp.compress.gradients import Gradients, gradients_of
from autocomp.compress.moments import Moments
from autocomp.compress.readers import Reader, readers_of
from autocomp.compress.tracing import Traced
from autocomp.graph import Group, Member
from autocomp.policy import Importance

__all__ = ["CRITERIA", "Criterion", "Evidence"]

GRADIENT_IMAGES = 256  # behind one backward pass
SINGULAR = 1e-6  # of the mean variance, added where a matrix must have a full rank
CHUNK = 64  # channels whose covariances with all others are held at once

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """What criteria may look at, all of the unpruned model.

    Attributes:
        traced: the model.
        tensors: its parameters by name, batch norms folded.
        moments: reading layer -> moments of its inputs.
        images: calibration images (n, *input_shape).
        ridge: of the solve that follows, as in `Recipe`.
        seed: of the random criterion.
    """

    traced: Traced
    tensors: Mapping[str, Tensor]
    moments: Mapping[str, Moments]
    images: Tensor
    ridge: float
    seed: int

    @cached_property
    def gradients(self) -> Gradients:
        """From a backward pass over the first 256 images, when first asked for."""
        return gradients_of(self.traced, self.images[:GRADIENT_IMAGES])

    def readers(self, group: Group) -> tuple[Reader, ...]:
        """The layers that read the group, those without moments left out."""
        return readers_of(group, self.tensors, self.moments)


Criterion = Callable[[Group, Evidence], Scores]


def least_error(group: Group, evidence: Evidence) -> Scores:
    """Step of a greedy elimination in which all readers make up for every removal (see `eliminated`).

    A group without a reader is scored by `group_l2`, here and in all criteria below that look at readers.
    """
    readers = evidence.readers(group)
    return _steps(eliminated(readers, evidence.ridge)) if readers else group_l2(group, evidence)


def group_l2(group: Group, evidence: Evidence) -> Scores:
    """Squared L2 norm over all folded weights that write or read a channel.

    The group form of weight magnitude (Fang et al., DepGraph, CVPR 2023, section 3.3).
    """
    return _summed(group, [(m, w.square()) for m, w in _weights(group, evidence)])


def group_l1(group: Group, evidence: Evidence) -> Scores:
    """Sum of absolute weights that write or read a channel.

    Li et al., Pruning Filters for Efficient ConvNets (arXiv:1608.08710), section 3.1, over all members of the group.
    """
    return _summed(group, [(m, w.abs()) for m, w in _weights(group, evidence)])


def bn_gamma(group: Group, evidence: Evidence) -> Scores:
    """Magnitude of the batch norms' factors, summed over the layers that write a channel.

    Liu et al., Network Slimming (arXiv:1708.06519), section 3. Groups that no normalised layer writes: `group_l2`.
    """
    norms = evidence.traced.norms
    found = [(m, norms[_layer(m)].gamma.abs()) for m, _ in _weights(group, evidence, 0) if _layer(m) in norms]
    return _summed(group, found) if found else group_l2(group, evidence)


def taylor(group: Group, evidence: Evidence) -> Scores:
    """First-order change of the loss when a channel is gated away: |sum of activation x gradient|, mean over images.

    Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference (arXiv:1611.06440),
    equation 8, where readers see the channel, summed over positions and readers. The loss: see `Gradients`.
    """
    gates = evidence.gradients.gates
    found = [gates[_layer(m)][:, np.asarray(m.positions)].double().sum(2) for m in group.members if _reads(m, gates)]
    return _numpy(torch.stack(found).sum(0).abs().mean(0)) if found else group_l2(group, evidence)


def discrimination(group: Group, evidence: Evidence) -> Scores:
    """Squared norm of the loss's gradient by the readers' weights at a channel.

    The selection rule of Zhuang et al., Discrimination-aware Channel Pruning (arXiv:1810.11809), section 3.3, in a
    simplified form without labels: the gradient is taken once, at the trained weights, of the model's own loss
    (see `Gradients`) instead of again after every choice and of losses attached along the way.
    """
    weights = evidence.gradients.weights
    found = [(m, weights[_layer(m)].square()) for m in group.members if _reads(m, weights)]
    return _summed(group, found) if found else group_l2(group, evidence)


def fpgm(group: Group, evidence: Evidence) -> Scores:
    """Sum of the distances from a channel's filters to those of the other channels.

    He et al., Filter Pruning via Geometric Median (arXiv:1811.00250), section 3.2: what lies near the geometric median
    can be replaced by the others. Filters of several writers are compared as one vector.
    """
    filters = [w.double()[np.asarray(m.positions)].reshape(group.channels, -1) for m, w in _weights(group, evidence, 0)]
    if not filters:
        return group_l2(group, evidence)
    rows = torch.cat(filters, 1)
    return _numpy(torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1))


def activation(group: Group, evidence: Evidence) -> Scores:
    """Mean square of what readers see of a channel, as a share of all channels', summed over the readers.

    Molchanov et al. (arXiv:1611.06440), section 2.2, "Activation".
    """
    readers, total = evidence.readers(group), np.zeros(group.channels)
    for reader in readers:
        power = reader.moments.gram.diagonal().double() + reader.moments.mean.square()
        per_channel = _numpy(power[reader.features].sum(1))
        total += per_channel / (per_channel.sum() or 1.0)
    return total if readers else group_l2(group, evidence)


def thinet(group: Group, evidence: Evidence) -> Scores:
    """Step of a greedy choice of what to remove: least squared sum of the removed channels' contributions.

    Luo et al., ThiNet (arXiv:1707.06342), section 3.2 and algorithm 1: nothing makes up for a removal while choosing.
    """
    readers = evidence.readers(group)
    if not readers:
        return group_l2(group, evidence)
    shared = np.sum([_contributions(reader, _uncentred(reader)) for reader in readers], axis=0)
    own, with_gone = np.diag(shared), np.zeros(group.channels)
    alive, order = list(range(group.channels)), []
    while alive:
        growth = (own + 2 * with_gone)[alive]
        order.append(alive.pop(int(growth.argmin())))
        with_gone = with_gone + shared[order[-1]]
    return _steps(order)


def lasso(group: Group, evidence: Evidence) -> Scores:
    """Penalty at which a channel's coefficient enters the LASSO path: as it grows, the last to leave stay.

    He et al., Channel Pruning (arXiv:1707.06168), section 3.1, equation 2 with the weights as they are, solved for all
    penalties at once by least angle regression on second moments; means are left to the reader's bias.
    """
    from sklearn.linear_model import lars_path_gram  # slow to import

    readers = evidence.readers(group)
    if not readers:
        return group_l2(group, evidence)
    gram = np.sum([_contributions(reader, reader.gram) for reader in readers], axis=0)
    scale = float(np.diag(gram).mean())
    if scale <= 0:
        return np.zeros(group.channels)  # every channel is constant: the bias stands for all
    gram = gram + SINGULAR * scale * np.eye(group.channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a path cut short by rounding: who has not entered by then goes first
        penalties, _, path = lars_path_gram(gram.sum(1), gram, n_samples=1, max_iter=8 * group.channels, method="lasso")
    entered = (path[:, 1:] != 0) * penalties[:-1]  # a coefficient is still 0 at the penalty where it enters
    return np.asarray(entered.max(1, initial=0.0), dtype=np.float64)


def random(group: Group, evidence: Evidence) -> Scores:
    """A draw from the recipe's seed, another one for every group: the baseline of all others."""
    return np.random.default_rng([evidence.seed, crc32(group.name.encode())]).random(group.channels)


CRITERIA: Mapping[Importance, Criterion] = {
    "least_error": least_error,
    "group_l2": group_l2,
    "group_l1": group_l1,
    "bn_gamma": bn_gamma,
    "taylor": taylor,
    "fpgm": fpgm,
    "thinet": thinet,
    "lasso": lasso,
    "discrimination": discrimination,
    "activation": activation,
    "random": random,
}


def _layer(member: Member) -> str:
    return member.parameter.rpartition(".")[0]


def _reads(member: Member, layers: Mapping[str, Tensor]) -> bool:
    return member.axis == 1 and _layer(member) in layers


def _weights(group: Group, evidence: Evidence, *axes: int) -> list[tuple[Member, Tensor]]:
    """Members that slice weights (on one of ``axes``, where given), and these; biases and the like left out."""
    found = [(member, evidence.tensors[member.parameter]) for member in group.members]
    return [(member, weight) for member, weight in found if weight.ndim > 1 and (not axes or member.axis in axes)]


def _summed(group: Group, values: Sequence[tuple[Member, Tensor]]) -> Scores:
    """Sum per channel, (channels,), of every entry of the tensors that lies at one of the channel's positions."""
    total = np.zeros(group.channels)
    for member, value in values:
        rows = value.double().movedim(member.axis, 0)
        per_position = rows.reshape(len(rows), -1).sum(1)
        total += _numpy(per_position[np.asarray(member.positions)].sum(1))
    return total


def _uncentred(reader: Reader) -> Tensor:
    mean = reader.moments.mean.to(reader.weight.dtype)
    return reader.gram + torch.outer(mean, mean)


def _contributions(reader: Reader, second_moment: Tensor) -> Scores:
    """Second moment of what two channels contribute to the reader's outputs, summed over these, (channels, channels).

    As a share of the outputs' variance, so that the readers of a stream are comparable.

    Args:
        second_moment: of the reader's features, centred or not.
    """
    order = reader.features.flatten()
    weight, (channels, width) = reader.weight[:, order], reader.features.shape
    rows = []
    for own in torch.split(reader.features, CHUNK):
        products = (reader.weight[:, own.flatten()].T @ weight) * second_moment[own.flatten()][:, order]
        rows.append(products.reshape(len(own), width, channels, width).sum((1, 3)))
    return _numpy(torch.cat(rows)) / (reader.variance or 1.0)


def _steps(order: Sequence[int]) -> Scores:
    """Channel -> its place in an order."""
    steps = np.empty(len(order))
    steps[list(order)] = np.arange(len(order))
    return steps


def _numpy(values: Tensor) -> Scores:
    return np.asarray(values.double().numpy(), dtype=np.float64)
