"""Learned step sizes against the published formulas, and against torch's own rounding."""

import pytest
import torch
from torch import Tensor

from autocomp.train.qat import rounded


def by_the_paper(value: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Appendix B of arXiv:1902.08153, its rounding and scaling of gradients by detaching, in float64."""
    factor = (value[0].numel() * high) ** -0.5
    scaled = (step - step * factor).detach() + step * factor
    along = scaled.reshape(-1, *[1] * (value.ndim - 1)) if step.ndim else scaled
    ratio = (value / along).clamp(low, high)
    return ((ratio.round() - ratio).detach() + ratio) * along


@pytest.mark.parametrize(
    ("shape", "channels", "low", "high"),
    [((6, 3, 5, 5), 0, 0, 255), ((6, 20), 0, -100, 155), ((4, 3, 3, 3), 4, -63, 63), ((5, 40), 5, -3, 3)],
    ids=["behind a ReLU", "signed", "convolution", "2 bits"],
)
def test_values_and_gradients_are_those_of_the_paper(
    shape: tuple[int, ...], channels: int, low: int, high: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    value = torch.randn(shape, generator=draw, dtype=torch.float64)
    step = 1.5 / high * (0.5 + torch.rand(channels or 1, generator=draw, dtype=torch.float64))
    step = step if channels else step[0]  # about one value in eight is cut off
    upstream = torch.randn(shape, generator=draw, dtype=torch.float64)
    found = [tensor.clone().requires_grad_(True) for tensor in (value, step)]
    wanted = [tensor.clone().requires_grad_(True) for tensor in (value, step)]
    result, expected = rounded(*found, low, high), by_the_paper(*wanted, low, high)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    (result * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert 0 < int((found[0].grad == 0).sum()) < value.numel()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_rounding_is_torchs() -> None:
    value = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    whole = rounded(value, torch.tensor(0.01), -128, 127)
    assert torch.equal(whole, torch.fake_quantize_per_tensor_affine(value, 0.01, 0, -128, 127))
    steps = torch.tensor([0.5, 0.02, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4])
    rows = torch.fake_quantize_per_channel_affine(value, steps, torch.zeros(8, dtype=torch.int32), 0, -63, 63)
    assert torch.equal(rounded(value, steps, -63, 63), rows)


def test_a_step_that_crosses_zero_counts_by_its_size() -> None:
    value = torch.linspace(-1, 1, 24).reshape(2, 12)
    steps = torch.tensor([-0.1, 1e-9], requires_grad=True)
    found = rounded(value, steps, -7, 7)
    dead = torch.tensor([0.1, 0.1 / 1024])
    assert torch.equal(found, rounded(value, dead, -7, 7))
    found.sum().backward()
    assert steps.grad is not None and bool(steps.grad.isfinite().all())
