"""A metric of your own: what a search makes small, in place of the divergence from the uncompressed model.

::

    python examples/own_model.py own_model.safetensors
    autocomp search --model examples.own_model:model --weights own_model.safetensors --data examples.own_model:data \
        --metric examples.own_metric:worst_class --budget 0.5x
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax


def worst_class(outputs: NDArray[np.float32], reference: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """What ``--metric`` names: the mean cross-entropy of the class that fares worst.

    Args:
        outputs: of the engine, (images, outputs).
        reference: of the uncompressed model's engine on the same images; a metric may leave it alone.
        labels: (images,), or where the data has none the index of each image in its dataset.

    Returns:
        a finite number, the smaller the better. It should change with every small change of the outputs: a count of
        errors would leave a search among ties.
    """
    losses = -log_softmax(outputs.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
    return float(max(losses[labels == name].mean() for name in np.unique(labels)))
