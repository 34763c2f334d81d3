import pytest

from autocomp.capabilities import Capabilities
from autocomp.errors import InputError
from autocomp.policy import FEWER_BITS, FP32, INT8, Policy, Precision


def test_precisions_that_an_engine_does_not_run_are_named() -> None:
    engine = Capabilities(precisions=(FP32, INT8))
    engine.validate(Policy(precisions={"stem": INT8, "head": FP32}))
    for wrong in (Precision("fp16", "fp16"), *FEWER_BITS):
        with pytest.raises(InputError, match=f"head cannot run as {wrong} on this engine: it runs fp32, int8"):
            engine.validate(Policy(precisions={"stem": INT8, "head": wrong}))
    Capabilities(precisions=(FP32, *FEWER_BITS)).validate(Policy(precisions={"head": FEWER_BITS[0]}))


def test_fewer_bits_are_seven_to_two() -> None:
    assert [str(precision) for precision in FEWER_BITS] == ["w7a8", "w6a8", "w5a8", "w4a8", "w3a8", "w2a8"]
