"""Trained weights in a compressed model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from autocomp.compress import compress, logits_of, quantize_tuned
from autocomp.errors import CompressError
from autocomp.policy import INT8, Policy, Precision, Recipe
from tests.compress.conftest import UNSIGNED, Case

RECIPE = Recipe(reconstruction="sequential", images=64)


def policies(case: Case) -> tuple[Policy, Policy]:
    kept = {group.name: group.channels // 2 for group in case.traced.graph.groups}
    kinds = {layer.name: INT8 for layer in case.traced.graph.layers}
    kinds["conv2"] = Precision.parse("w4a8")
    return Policy(kept), Policy(kept, frozenset(), kinds)


def test_untouched_weights_give_what_compression_gives(chain: Case) -> None:
    channels, whole = policies(chain)
    pruned = compress(chain.traced, chain.statistics, channels, RECIPE, UNSIGNED, chain.images)
    expected = compress(chain.traced, chain.statistics, whole, RECIPE, UNSIGNED, chain.images)
    found = quantize_tuned(pruned, pruned.tensors, whole, RECIPE, UNSIGNED, chain.images, chain.statistics.logits)
    assert found.params == expected.params and found.kept == expected.kept and found.policy == expected.policy
    for name, codes in expected.weights.items():
        assert np.array_equal(found.weights[name].codes, codes.codes), name
    for name, array in expected.tensors.items():
        assert np.array_equal(found.tensors[name], array), name
    images = chain.images.numpy()
    assert np.array_equal(logits_of(found.module, images), logits_of(expected.module, images))


def test_ranges_are_those_of_the_trained_weights(chain: Case) -> None:
    channels, whole = policies(chain)
    pruned = compress(chain.traced, chain.statistics, channels, RECIPE, UNSIGNED, chain.images)
    tuned = {name: 3 * array if name.startswith("conv1.") else array for name, array in pruned.tensors.items()}
    first, second = (
        quantize_tuned(pruned, tensors, whole, RECIPE, UNSIGNED, chain.images, chain.statistics.logits)
        for tensors in (pruned.tensors, tuned)
    )
    layer = chain.traced.graph.layer_by_name["conv1"]
    assert second.weights[layer.weight].scale == pytest.approx(3 * first.weights[layer.weight].scale)
    plain = quantize_tuned(pruned, tuned, channels, RECIPE, UNSIGNED, chain.images, chain.statistics.logits)
    assert not plain.weights and np.array_equal(plain.tensors[layer.weight], tuned[layer.weight])
    with torch.no_grad():
        assert torch.isfinite(plain.module(chain.images)).all()


def test_weights_of_other_channels_are_refused(chain: Case) -> None:
    channels, whole = policies(chain)
    pruned = compress(chain.traced, chain.statistics, channels, RECIPE, UNSIGNED, chain.images)
    other = replace(whole, kept={})
    with pytest.raises(CompressError, match="other channels or branches"):
        quantize_tuned(pruned, pruned.tensors, other, RECIPE, UNSIGNED, chain.images, chain.statistics.logits)
