"""What rounding to an engine's codes leaves of a value, in torch."""

from torch import Tensor, div, float8_e4m3fn

__all__ = ["fake_quantize", "fake_quantize_fp8"]


def fake_quantize(value: Tensor, scale: float, zero_point: int, smallest: int, largest: int) -> Tensor:
    """What is left of a value when it is quantized, rounding ties to even, as QuantizeLinear does.

    torch's own operator takes four times as long on a CPU.
    """
    codes = div(value, scale).round_()
    return codes.clamp_(smallest - zero_point, largest - zero_point).mul_(scale)


def fake_quantize_fp8(value: Tensor, scale: float, largest: float) -> Tensor:
    """What is left of a value in E4M3, cut off at ``largest`` times the scale. Gradients pass through the rounding.

    A cast back and forth would round the gradients to E4M3 as well.
    """
    cut = (value / scale).clamp(-largest, largest)
    rounding = cut.detach().to(float8_e4m3fn).to(value.dtype) - cut.detach()  # exact, and so is the sum
    return (cut + rounding) * scale
