"""Files taken apart between their layers, put together again."""

import numpy as np
import pytest

from autocomp.engines.cuts import cuts_of, head, tail
from autocomp.engines.onnxruntime import exact_engine
from autocomp.engines.tensorrt.backend import NUMERICS
from autocomp.engines.torch_cuda import torch_function
from autocomp.errors import EngineError
from autocomp.policy import FP32, INT8, Policy, Precision
from tests.engines.conftest import Case

MIXED = (FP32, INT8, Precision("fp16", "fp16"), Precision("int4", "int8"))


@pytest.mark.parametrize("seed", range(3))
def test_an_engine_up_to_any_layer_and_torch_behind_it_are_the_whole(resnet8: Case, seed: int) -> None:
    graph, draw = resnet8.net.graph, np.random.default_rng(seed)
    kinds = {layer.name: MIXED[draw.integers(len(MIXED))] for layer in graph.layers}
    data = resnet8.emit(Policy({graph.groups[0].name: 4}, frozenset(), kinds), NUMERICS)
    batch = len(resnet8.images)
    with exact_engine(data, batch) as engine:
        whole = engine.run(resnet8.images)
    cuts = cuts_of(data)
    assert [cut.layer for cut in cuts] == [layer.name for layer in graph.layers]
    for cut in cuts:
        given = []
        for source in cut.values.values():
            with exact_engine(head(data, source), batch) as engine:
                given.append(engine.run(resnet8.images))
        found = torch_function(tail(data, cut))(*given)
        # Values near the middle between two codes may fall to either side, and half types are computed in float32 by
        # one of the two.
        assert np.linalg.norm(found - whole) <= 0.02 * np.linalg.norm(whole)


def test_a_value_that_is_not_there_is_named(resnet8: Case) -> None:
    with pytest.raises(EngineError, match="no value missing: give one that was written for this policy"):
        head(resnet8.emit(Policy()), "missing")
