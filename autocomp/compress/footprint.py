"""Memory that compression of a traced model takes, from its shapes alone."""

from collections.abc import Mapping
from math import prod

from autocomp.compress.moments import Sums, reading_layers
from autocomp.compress.statistics import BATCH
from autocomp.graph import LayerGraph

__all__ = ["footprint"]

MOMENT_BYTES = 12  # of an entry while it is summed in float64 and turned into float32
FILES = 5  # copies of all parameters to come: equalized, exported, in template, file and engine
LIVE = 2  # values of an operator, its input and output, that are there at once


def footprint(graph: LayerGraph, images: int) -> Mapping[str, int]:
    """What statistics, files and engines take, about, beside the traced model.

    Args:
        images: for calibration.

    Returns:
        what for -> bytes.
    """
    moments = 0
    for layer in reading_layers(graph):
        features = prod(layer.weight_shape[1:]) // Sums.of(layer, graph, images).pooled
        moments += MOMENT_BYTES * features**2
    largest = max(prod(node.shape) for node in graph.nodes)
    return {
        f"for {FILES} more copies of its parameters": 4 * FILES * sum(map(prod, graph.parameters.values())),
        "for the second moments of what its layers read": moments,
        f"for {images:,} calibration images": 4 * images * (prod(graph.input_shape) + prod(graph.output_shape)),
        "for the values of one batch": 4 * LIVE * min(BATCH, images) * largest,
    }
