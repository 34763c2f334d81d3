"""What rounding to an engine's codes leaves of a value, in torch."""

from torch import Tensor, div

__all__ = ["fake_quantize"]


def fake_quantize(value: Tensor, scale: float, zero_point: int, smallest: int, largest: int) -> Tensor:
    """What is left of a value when it is quantized, rounding ties to even, as QuantizeLinear does.

    torch's own operator takes four times as long on a CPU.
    """
    codes = div(value, scale).round_()
    return codes.clamp_(smallest - zero_point, largest - zero_point).mul_(scale)
