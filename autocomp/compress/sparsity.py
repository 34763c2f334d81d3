"""Weights pruned to the pattern that sparse tensor cores skip: two of every four along the input channels are zero."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import InputError
from autocomp.graph import LayerGraph
from autocomp.policy import Policy

__all__ = ["halved", "sparse_weights"]


def sparse_weights(
    graph: LayerGraph, policy: Policy, tensors: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """Parameter name -> pruned weight, of every layer of the policy that is left and is to be sparse.

    Raises:
        InputError: a layer's input channels do not come in fours.
    """
    found = {}
    for layer in graph.layers:
        if policy.precision(layer.name).sparse and layer.weight in tensors:
            weight = tensors[layer.weight]
            if layer.groups > 1 or weight.shape[1] % 4:
                raise InputError(
                    f"{layer.name} reads {weight.shape[1]} channels{' a group' * (layer.groups > 1)}, and 2:4 sparsity "
                    "wants fours of all channels: choose a dense precision for it"
                )
            found[layer.weight] = halved(weight)
    return found


def halved(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The two of least magnitude among every four weights along the input channels set to zero.

    2:4 structured sparsity by magnitude (Mishra et al., arXiv:2104.08378, section 4.1); of equal ones the first stay.

    Args:
        weight: (out, in, *kernel), in a multiple of 4.
    """
    out, read = weight.shape[:2]
    fours = weight.reshape(out, read // 4, 4, -1)
    least_last = np.argsort(-np.abs(fours), axis=2, kind="stable")
    kept = np.zeros(fours.shape, bool)
    np.put_along_axis(kept, least_last[:, :, :2], True, axis=2)
    return np.where(kept, fours, np.float32(0)).reshape(weight.shape)
